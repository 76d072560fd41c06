"""Multiply-accumulates of backbones, heads and gates; the only user of fvcore.

MACs are the products of convolutions, linear layers and attention (fused or not, the performer's too), per sample.
Norms, activations, pooling and additions are none.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch
from torch import nn

from dynexit.core.cost import STEM, ExitCosts
from dynexit.models.backbones import Backbone, ImageSize, build_backbone
from dynexit.models.families import State
from dynexit.models.heads import HeadSpec
from dynexit.models.multi_exit import check_positions
from dynexit.models.readers import Reading, measure_reads

with warnings.catch_warnings():  # fvcore scripts a loss of its own when it is imported
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import get_shape

# JEI-DNN's exit head and DyCE's
REPORTED_HEADS = ("linear", "mlp1x1000", "mlp3x500", "mlp3x1000", "mlp5x500", "mlp5x1000")


def head_macs(head_type: str, num_features: int, num_classes: int) -> int:
    """MACs of an exit head of that type (`linear`, `mlp{n}x{w}`)."""
    widths = HeadSpec.parse(head_type).widths(num_features, num_classes)
    return sum(a * b for a, b in pairwise(widths))


def gate_macs() -> int:
    """MACs of a gate: one product for each of its four inputs (JEI-DNN, section 3)."""
    return 4


def backbone_macs(backbone: Backbone, image_size: ImageSize | None = None) -> tuple[list[int], int]:
    """(MACs from the image to the end of every block, MACs of the whole backbone), of one image.

    `image_size` is in pixels, the backbone's own if None.
    """
    path = _path_macs(backbone, image_size)
    return path[1:-1], path[-1]


def _path_macs(backbone: Backbone, image_size: ImageSize | None) -> list[int]:
    """MACs from the image to the end of the stem, of every block, and of the tail."""
    channels, height, width = backbone.input_size
    if image_size is not None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    parameter = next(backbone.parameters())
    image = torch.zeros(1, channels, height, width, dtype=parameter.dtype, device=parameter.device)
    blocks = [partial(backbone.run_block, i) for i in range(backbone.num_blocks)]
    analysis = FlopCountAnalysis(_InParts(backbone, [backbone.stem, *blocks, backbone.tail]), image)
    analysis.set_op_handle(**_HANDLERS).ancestor_mode("caller")
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_part = analysis.by_module()
    return list(accumulate(int(by_part[f"parts.{i}"]) for i in range(backbone.num_blocks + 2)))


def exit_costs(
    backbone: Backbone,
    positions: Sequence[int],
    head_types: Sequence[str],
    image_size: ImageSize | None = None,
    reading: Reading | None = None,
) -> ExitCosts:
    """The costs of a model with heads of all `head_types` and a gate at all `positions`.

    What an exit reads for itself alone is counted to its heads. Raises UserError where the reader does not fit.
    """
    reading = reading or Reading()
    path = _path_macs(backbone, image_size)
    widths, reads = measure_reads(backbone, positions, reading.reader, image_size)
    if reading.concatenate:
        widths, own = list(accumulate(widths)), [0] * len(widths)
    else:
        own = reads
    return ExitCosts(
        full_macs=path[-1],
        positions=tuple(positions),
        backbone_macs=tuple(path[0 if i == STEM else i + 1] for i in positions),
        head_types=tuple(head_types),
        head_macs=tuple(
            tuple(read + head_macs(t, width, backbone.num_classes) for t in head_types)
            for width, read in zip(widths, own, strict=True)
        ),
        gate_macs=tuple(gate_macs() for _ in positions),
        reader_macs=tuple(reads) if reading.concatenate and any(reads) else (),
    )


def macs_report(
    name: str,
    *,
    image_size: ImageSize | None = None,
    num_classes: int = 1000,
    positions: Sequence[int] | None = None,
    head_types: Sequence[str] = REPORTED_HEADS,
    arguments: dict[str, Any] | None = None,
    reading: Reading | None = None,
    stem: bool = False,
) -> dict[str, Any]:
    """What a backbone of that name costs with exits at `positions` (None: after every block but the last), in MACs per
    sample; `stem` adds an exit before the first block.

    Keys: `backbone`, `image_size` ([height, width] in pixels), `num_classes`, `full_macs` (the bare backbone),
    `positions`, and with one entry a position `backbone_macs` (the backbone alone up to there), `num_features` (that
    its heads read), `reader_macs` (of what later exits read too), `gate_macs`, and `head_macs` (head type -> the head
    with what is read for it alone). Raises UserError as `build_backbone` does, for positions and head types that do not
    exist, and for a reader that does not fit.
    """
    reading = reading or Reading()
    backbone = build_backbone(name, arguments=arguments, num_classes=num_classes, image_size=image_size)
    blocks = range(backbone.num_blocks - 1) if positions is None else positions
    positions = [STEM, *blocks] if stem else list(blocks)
    check_positions(backbone, positions)
    costs = exit_costs(backbone, positions, head_types, reading=reading)
    widths, _ = measure_reads(backbone, positions, reading.reader)
    return {
        "backbone": name,
        "image_size": list(backbone.input_size[1:]),
        "num_classes": num_classes,
        "full_macs": costs.full_macs,
        "positions": list(costs.positions),
        "backbone_macs": list(costs.backbone_macs),
        "num_features": list(accumulate(widths)) if reading.concatenate else widths,
        "reader_macs": list(costs.reader_macs or (0,) * len(positions)),
        "head_macs": {t: [row[i] for row in costs.head_macs] for i, t in enumerate(costs.head_types)},
        "gate_macs": list(costs.gate_macs),
    }


class _Part(nn.Module):
    """A part of a backbone as a module, which is what fvcore counts by."""

    def __init__(self, function: Callable[[State], State]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: State) -> State:
        return self.function(h)


class _InParts(nn.Module):
    """A backbone as its parts in a row, for one trace of all of them."""

    def __init__(self, backbone: Backbone, functions: Sequence[Callable[[State], State]]) -> None:
        super().__init__()
        self.backbone = backbone  # the tracer wants to know all parameters
        self.parts = nn.ModuleList(_Part(function) for function in functions)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h: State = x
        for part in self.parts:
            h = part(h)
        logits: torch.Tensor = h
        return logits


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    query, key, value = (get_shape(x) for x in inputs[:3])
    return int(prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))


def _product(left: int) -> Callable[[list[Any], list[Any]], int]:
    """A matrix product whose left factor is input `left`: every output sums over that factor's last axis."""

    def count(inputs: list[Any], outputs: list[Any]) -> int:
        return int(prod(get_shape(outputs[0])) * get_shape(inputs[left])[-1])

    return count


# what fvcore counts and we do not
_NOT_COUNTED = [
    f"aten::{name}"
    for name in (
        "batch_norm",
        "group_norm",
        "layer_norm",
        "instance_norm",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "adaptive_avg_pool2d",
        "grid_sampler",
    )
]

_HANDLERS: dict[str, Callable[[list[Any], list[Any]], int]] = {
    "aten::scaled_dot_product_attention": _attention,
    "aten::matmul": _product(0),
    "aten::mm": _product(0),
    "aten::bmm": _product(0),
    "aten::baddbmm": _product(1),
    **dict.fromkeys(_NOT_COUNTED, lambda inputs, outputs: 0),
}


def macs_table(report: dict[str, Any]) -> str:
    """Returns what `macs_report` found as a table of text, in millions of MACs up to each exit."""
    full, heads = report["full_macs"], report["head_macs"]
    height, width = report["image_size"]
    lines = [f"{report['backbone']} at {height}x{width}, {report['num_classes']} classes: {full / 1e6:,.1f} M MACs"]
    columns = ["position", "backbone M", "relative", "features", "read M", "gate", *(f"{name} M" for name in heads)]
    lines.append("  ".join(columns))
    for p, position in enumerate(report["positions"]):
        macs = report["backbone_macs"][p]
        cells = [f"{'stem' if position == STEM else position:>8}", f"{macs / 1e6:10,.1f}", f"{macs / full:8.3f}"]
        cells += [f"{report['num_features'][p]:8d}", f"{report['reader_macs'][p] / 1e6:6.3f}"]
        cells += [f"{report['gate_macs'][p]:4d}"]
        cells += [f"{values[p] / 1e6:{len(name) + 2},.3f}" for name, values in heads.items()]
        lines.append("  ".join(cells))
    return "\n".join(lines)
