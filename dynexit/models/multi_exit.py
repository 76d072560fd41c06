"""A frozen backbone with exits at chosen positions: what every exit reads at once, or one stretch after another."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from dynexit.core.cost import STEM
from dynexit.errors import UserError, counted
from dynexit.models.backbones import Backbone, select
from dynexit.models.families import State
from dynexit.models.precision import products_of
from dynexit.models.readers import Reading, measure_reads, read

__all__ = ["MultiExit", "select"]


def check_positions(backbone: Backbone, positions: Sequence[int]) -> None:
    """Raises UserError unless exits can sit after these blocks: rising indices from 0 to the last block but one.

    The first may be STEM, before the first block. The last block alone is allowed: an exit in place of the classifier.
    """
    if list(positions) == [backbone.num_blocks - 1]:
        return
    last = backbone.num_blocks - 2
    if last < 0:
        raise UserError(
            f"backbone {backbone.name} has {counted(backbone.num_blocks, 'block')}, and exits sit after all but the "
            "last: it has no place for one; give it more blocks"
        )
    blocks = positions[1:] if tuple(positions[:1]) == (STEM,) else positions
    in_order = list(positions) == sorted(set(positions))
    if not positions or not in_order or any(not 0 <= position <= last for position in blocks):
        raise UserError(
            f"exit positions {list(positions)} do not fit {backbone.name}: give block indices in rising order from "
            f"0 to {last} (it has {counted(backbone.num_blocks, 'block')}, and its own classifier sits after the last)"
        )


def features_in_parts(model: "MultiExit", images: Tensor, size: int | None) -> tuple[list[Tensor], Tensor]:
    """`MultiExit.features` of the images, of which at most `size` (None: all) pass through the backbone at once."""
    if size is None or len(images) <= size:
        return model.features(images)
    parts = [model.features(part) for part in images.split(size)]  # type: ignore[no-untyped-call]
    features = [torch.cat(of_one) for of_one in zip(*(found for found, _ in parts), strict=True)]
    return features, torch.cat([final_BK for _, final_BK in parts])


class MultiExit(nn.Module):
    """A backbone, frozen (eval mode and no autograd, always), with exits after the blocks in `positions`.

    `positions` rise strictly and lie in 0..num_blocks-2: after the last block the backbone's own classifier decides.
    The first may be STEM, before the first block; the last block may be the only one. Raises UserError otherwise, and
    for a reader that does not fit.
    Without a reader, linear heads read the class token where there is one, MLP heads pooled features; where
    `head_types` has both, an exit's feature holds the two, (B, 2, D_p), else it is (B, D_p). The last `own_dims[p]` of
    them are read at the exit itself, the others, if features are concatenated, at the exits before.
    """

    def __init__(
        self,
        backbone: Backbone,
        positions: Sequence[int],
        head_types: Sequence[str] = ("linear",),
        reading: Reading | None = None,
    ) -> None:
        super().__init__()
        check_positions(backbone, positions)
        self.positions = tuple(positions)
        self.reading = reading or Reading()
        own, _ = measure_reads(backbone, self.positions, self.reading.reader)
        self.own_dims, self.feature_dims = own, tuple(accumulate(own) if self.reading.concatenate else own)
        self.backbone = backbone.requires_grad_(False).eval()
        self.head_types = tuple(head_types)
        readers = {"linear": backbone.feature, "mlp": backbone.pooled_feature}
        kinds = sorted({"linear" if name == "linear" else "mlp" for name in head_types})
        kinds = kinds if backbone.has_class_token else kinds[:1]
        self._readers = [readers[kind] for kind in kinds]
        own_reads = kinds if backbone.has_class_token else ["average"]
        self.reads = tuple(own_reads) if self.reading.reader is None else (self.reading.reader,)
        """Names of what is read at an exit, for identities."""
        self.reads_two = self.reading.reader is None and len(self._readers) == 2
        self.memory_format = torch.contiguous_format  # of images; see passes.py
        self._run_compiled: Callable[[Tensor], tuple[list[Tensor], Tensor]] | None = None

    def train(self, mode: bool = True) -> "MultiExit":
        """Nothing but the flag: the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """(What every exit reads, P tensors; the backbone's own logits (B, K)) from images (B, C, H, W).

        For no images nothing runs: a rank may have none of a batch, and attention kernels refuse that.
        """
        if not len(x):
            shapes = [(0, 2, width) if self.reads_two else (0, width) for width in self.feature_dims]
            return [x.new_empty(shape) for shape in shapes], x.new_empty(0, self.backbone.num_classes)
        x = x.contiguous(memory_format=self.memory_format)
        with products_of(self.backbone.precision) if x.is_cuda else contextlib.nullcontext():
            if self._run_compiled is None:
                return self._run_all(x)
            torch._dynamo.maybe_mark_dynamic(x, 0)
            return self._run_compiled(x)

    def _run_all(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        features: list[Tensor] = []
        h = self.start(x)
        for p in range(len(self.positions)):
            h = self.advance(h, p - 1, p)
            features.append(self.feature(p, h, features[-1] if p else None))
        return features, self.tail(h, len(self.positions) - 1)

    def compile_features(self) -> None:
        """Has `features` run by torch.compile from now on, compiled once for nearly all batch sizes."""
        self._run_compiled = torch.compile(self._run_all)

    @torch.no_grad()
    def start(self, x: Tensor) -> State:
        """The state before the first block, from images (B, C, H, W)."""
        return self.backbone.stem(x)

    @torch.no_grad()
    def advance(self, h: State, from_p: int, to_p: int) -> State:
        """The state at position number `to_p` (0..P-1), from the state at position number `from_p` (-1: the start)."""
        return self._run(h, from_p, self.positions[to_p] + 1)

    @torch.no_grad()
    def feature(self, p: int, h: State, before: Tensor | None = None) -> Tensor:
        """What the exit at position number p reads, (B, D_p) or (B, 2, D_p), from the state there.

        `before` is what this gave at the position before (None at the first), which only concatenated features need.
        """
        own = self.reader_at(p)(h)
        return torch.cat((before, own), -1) if self.reading.concatenate and before is not None else own

    def reader_at(self, p: int) -> Callable[[State], Tensor]:
        """What turns the state at position number p into what its exit reads there."""
        if self.reading.reader is not None:
            return partial(read, self.backbone.cut, self.reading.reader)
        readers = [partial(reader, self.positions[p]) for reader in self._readers]
        return readers[0] if len(readers) == 1 else lambda h: torch.stack([reader(h) for reader in readers], 1)

    @torch.no_grad()
    def tail(self, h: State, from_p: int) -> Tensor:
        """The backbone's own logits (B, K), from the state at position number `from_p` (-1: the start)."""
        return self.backbone.tail(self._run(h, from_p, self.backbone.num_blocks))

    def blocks_between(self, from_p: int, to_p: int) -> Sequence[Callable[[State], State]]:
        """The blocks that `advance` runs one after another."""
        return self._blocks(from_p, self.positions[to_p] + 1)

    def _blocks(self, from_p: int, stop: int) -> Sequence[Callable[[State], State]]:
        start = 0 if from_p < 0 else max(self.positions[from_p] + 1, 0)
        return self.backbone.cut.blocks[start : max(stop, 0)]  # before the first block (STEM) both are 0

    def _run(self, h: State, from_p: int, stop: int) -> State:
        for block in self._blocks(from_p, stop):
            h = block(h)
        return h
