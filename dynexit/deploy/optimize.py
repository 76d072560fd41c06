"""A backbone made faster: batch norms folded, channels last, bfloat16, quick max pooling and linear layers."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynexit.errors import UserError
from dynexit.models.backbones import Backbone
from dynexit.models.cut.backbone import OwnBackbone
from dynexit.models.products import quick_linear

DIFFERENCES = {"float32": 1e-3, "bf16": 5e-2}
"""By precision how far logits may lie from the saved ones, relative to the largest."""


def optimized_backbone(backbone: Backbone, precision: str, device: torch.device) -> Backbone:
    """Returns a copy on `device`: folded, its convolutions channels last, in `precision` (float32 or bf16).

    Raises UserError for another precision, and for bf16 on a device without instructions for it.
    """
    if precision not in (*DIFFERENCES,):  # which may have no hash
        raise UserError(f"precision is {precision!r}, allowed are {', '.join(DIFFERENCES)}")
    if precision == "bf16" and not _has_bf16(device):
        raise UserError(f"precision = bf16: this {device.type} device has no instructions for it; use float32")
    folded = copy.deepcopy(backbone).cpu()
    if not (isinstance(backbone, OwnBackbone) and backbone.is_graph):  # which runs no modules
        fold_batch_norms(folded)
    if device.type == "cpu":
        _quicken_pooling(folded)
        _quicken_linear_layers(folded)
    changed = copy.deepcopy(folded)  # a copy is cut again, with the modules that took the places of others
    changed.to(device).to(memory_format=torch.channels_last)
    return changed.to(torch.bfloat16) if precision == "bf16" else changed


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported())
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


class QuickMaxPool(nn.MaxPool2d):
    """As nn.MaxPool2d, bit for bit, but by oneDNN where torch's own loop over maps takes five to ten times as long."""

    def forward(self, maps: Tensor) -> Tensor:
        """The pooled maps."""
        few = torch.compiler.is_compiling() or maps.numel() < _FEW_VALUES
        if few or maps.device.type != "cpu" or not maps.is_contiguous():
            plain: Tensor = super().forward(maps)
            return plain
        pooled: Tensor = torch.mkldnn_max_pool2d(
            maps.to_mkldnn(), self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        ).to_dense()
        return pooled


_FEW_VALUES = 1 << 14
"""Of these oneDNN's preparation takes longer than the pooling."""


def with_quick_pooling(backbone: Backbone) -> Backbone:
    """Returns a copy with the same outputs, bit for bit, whose max pooling is quicker on a CPU."""
    changed = copy.deepcopy(backbone)
    _quicken_pooling(changed)
    return copy.deepcopy(changed)


def _quicken_pooling(backbone: Backbone) -> None:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for name, module in list(backbone.model.named_modules()):
        if type(module) is nn.MaxPool2d and module.dilation == 1 and not module.return_indices:
            pool = QuickMaxPool(module.kernel_size, module.stride, module.padding, ceil_mode=module.ceil_mode)
            _replace(backbone.model, name, pool)


class QuickLinear(nn.Linear):
    """As nn.Linear, by `quick_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """The products."""
        if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            product: Tensor = _quick_linear(x, self.weight, self.bias)
            return product
        return quick_linear(x, self.weight, self.bias)


@torch.library.custom_op("dynexit::quick_linear", mutates_args=())
def _quick_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `quick_linear`, which torch.compile would replace by MKL's products."""
    return quick_linear(x, weight, bias)


@_quick_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _quicken_linear_layers(backbone: Backbone) -> None:
    for module in backbone.model.modules():
        if type(module) is nn.Linear:
            module.__class__ = QuickLinear


@torch.inference_mode(False)
def fold_batch_norms(backbone: Backbone) -> int:
    """Folds every batch norm that reads a convolution's output into it, in place. Returns how many it folded.

    Runs one image to see which follows which. A convolution whose output anything else reads too stays as it is.
    """
    model: Any = backbone.model
    pairs: list[tuple[int, str, str]] = []  # the id of what passes between the two, and their names
    names = {module: name for name, module in model.named_modules()}
    outputs: dict[int, tuple[Tensor, nn.Module]] = {}  # the tensors are kept, so that no id comes again
    calls: dict[nn.Module, int] = {}
    reads = _Reads()

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            outputs[id(output)] = (output, module)
            del reads.count[id(output)]  # of tensors that are gone
        elif id(inputs[0]) in outputs:
            pairs.append((id(inputs[0]), names[outputs[id(inputs[0])][1]], names[module]))

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, kinds)]
    try:
        with torch.no_grad(), reads:
            model(torch.zeros(1, *backbone.input_size))
    finally:
        for hook in hooks:
            hook.remove()
    num_folded = 0
    for between, conv_name, norm_name in pairs:
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        if calls[conv] == calls[norm] == reads.count[between] == 1:
            _replace(model, conv_name, fuse_conv_bn_eval(conv, norm))
            _replace(model, norm_name, _rest_of(norm))
            num_folded += 1
    return num_folded


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts by id how many operations read each tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count.update(id(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))
        return func(*args, **(kwargs or {}))


def _rest_of(norm: Any) -> nn.Module:
    """What timm's batch norms do after the norm itself."""
    rest = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
    return nn.Sequential(*rest) if rest else nn.Identity()


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def usable_device(device: str | torch.device) -> torch.device:
    """Returns the device. Raises UserError if torch cannot use it."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found).cpu()  # not of `meta`
    except (RuntimeError, AssertionError, TypeError) as error:  # no such device, or a torch built without it
        text = "it is no device" if isinstance(error, TypeError) else str(error).splitlines()[0]
        raise UserError(f"device = {str(device)!r} cannot be used ({text}); give cpu, or cuda with a GPU") from None
    return found
