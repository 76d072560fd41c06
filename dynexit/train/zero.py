"""DeepSpeed's ZeRO for backbones that do not fit: ranks divide optimizer states, gradients and weights among them.

DeepSpeed is an optional extra, imported here alone and only where dist.deepspeed_stage asks for it. Checkpoints are
the plain run's: one safetensors file, written whole, that holds the weights as the plain run names them.
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynexit.dist import Ranks
from dynexit.errors import UserError
from dynexit.study.schema import PrepareSettings
from dynexit.train.updates import Groups, make_optimizer, set_rate, weigh_statistics


def check_installed(stage: int) -> None:
    """Raises UserError where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"dist.deepspeed_stage = {stage} needs DeepSpeed, which is not installed: pip install 'dynexit[deepspeed]'"
        )


class ZeroModel:
    """The model under ZeRO stage 1 (optimizer states divided), 2 (gradients too) or 3 (weights too)."""

    lockstep = True

    def __init__(self, model: nn.Module, groups: Groups, settings: PrepareSettings, ranks: Ranks, stage: int) -> None:
        check_installed(stage)
        self.model, self.groups, self.settings, self.ranks, self.stage = model, groups, settings, ranks, stage
        self.layout = f"ZeRO-{stage} over {ranks.world_size} ranks"
        self.norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._engine: Any = None

    def _started(self) -> Any:
        """DeepSpeed's engine; made late, since it takes the weights that the model has then."""
        if self._engine is None:
            deepspeed = _import_deepspeed(self.ranks)
            self._engine, *_ = deepspeed.initialize(
                model=self.model,
                optimizer=make_optimizer(self.groups, self.settings),
                config=self._config(),
                dist_init_required=False,
            )
            if self._engine.zero_optimization_stage() != self.stage:
                raise RuntimeError(f"DeepSpeed runs at stage {self._engine.zero_optimization_stage()}")
        return self._engine

    def _config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,  # of no effect: steps are taken and losses weighted by `step`'s caller
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.settings.clip_norm or 0.0,
            "zero_optimization": {"stage": self.stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "torch_autocast": {"enabled": self.settings.precision == "bf16", "dtype": "bfloat16"},
            "steps_per_print": 2**31,
        }

    def logits(self, images: Tensor) -> Tensor:
        if self.settings.channels_last:  # the images alone: DeepSpeed takes weights only as they are by default
            images = images.to(memory_format=torch.channels_last)
        logits: Tensor = self._started()(images)
        return logits.float()

    def evaluate(self, images: Tensor) -> Tensor:
        logits: Tensor = self._started().module(images)
        return logits

    def backward(self, loss: Tensor, *, last: bool) -> None:
        engine = self._started()
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss * self.ranks.world_size)  # what follows is a mean over ranks, not a sum
        if not last:
            engine.step()  # counts, and does nothing else

    def step(self, share: float, rate: float) -> None:
        self.ranks.all_reduce(weigh_statistics(self.norms, share, self.ranks))
        set_rate(self._started().optimizer.optimizer.param_groups, rate)
        self._engine.step()

    def weights(self) -> dict[str, Tensor]:
        if self.stage < 3 or self._engine is None:
            return self.model.state_dict()
        import deepspeed

        state: dict[str, Tensor] = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            if isinstance(value, nn.Parameter):  # frozen ones are divided like the others
                with deepspeed.zero.GatheredParameters([value]):
                    state[name] = value.detach().cpu().clone() if self.ranks.is_main else torch.empty(0)
            else:
                state[name] = value
        return state

    def _parts(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(Number, slots of the optimizer's state) of this rank's part of everything that is trained."""
        zero = self._started().optimizer
        flat = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for i, part in enumerate(flat):
            yield i, zero.optimizer.state[part]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {}
        for i, slots in self._parts():
            for name, value in slots.items():
                if value is not None:
                    tensors[f"{i}.{name}"] = self._of_all_ranks(torch.as_tensor(value))
        return tensors, {}

    def _of_all_ranks(self, mine: Tensor) -> Tensor:
        """On the main rank what every rank has, stacked; one rank's part at a time, so that little memory is needed."""
        rows = []
        for rank in range(self.ranks.world_size):
            part = mine.clone() if rank == self.ranks.global_rank else torch.empty_like(mine)
            part = part.to(self.ranks.device)
            torch.distributed.broadcast(part, rank)
            if self.ranks.is_main:
                rows.append(part.cpu())
        return torch.stack(rows) if rows else torch.empty(0)

    def restore(self, weights: dict[str, Tensor], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.model.load_state_dict(weights)
        for i, slots in self._parts():
            for name, value in tensors.items():
                number, slot = name.split(".", 1)
                if int(number) == i:
                    device = "cpu" if slot == "step" else self.ranks.device  # where torch's optimizers keep it
                    slots[slot] = value[self.ranks.global_rank].clone().to(device)


def _import_deepspeed(ranks: Ranks) -> Any:
    if ranks.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # an extra for CPU ranks on one machine, which would be compiled first; gloo does the same
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if ranks.device.type == "cuda" else "gloo", verbose=False)
    return deepspeed
