"""DyCE's training in a pack: each member as alone and as written down slowly, for every loss; mixing; the average."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from dynexit.study.methods import DyceSettings
from dynexit.study.schema import TrainSettings
from dynexit.train.dyce import DyceTask
from tests.reference.deep_supervision_training import build_heads, cosine, divergence, state_of, train_heads
from tests.train.tiny import check_resume, largest_difference, run, seed_members, tiny_model, tiny_pack, tiny_split

TRAIN = TrainSettings(num_epochs=4, global_batch_size=13, precision="float64", keep="last")
DYCE = DyceSettings(learning_rate=0.02, num_warm_up_epochs=1)
HEAD_TYPES = ("mlp1x9", "mlp3x8")
SEEDS = (4, 0)
NUM_STEPS = 4 * 7


def make(seeds: tuple[int, ...] = SEEDS, method: DyceSettings = DYCE, train: TrainSettings = TRAIN) -> DyceTask:
    return DyceTask(tiny_pack(seed_members(seeds), train, HEAD_TYPES), method)


def expected_state(seed: int, method: DyceSettings, distillation: float) -> dict[str, torch.Tensor]:
    """One point, slowly; what to mix with what is asked of the task, whose drawing has a test of its own."""
    model, _ = tiny_model(HEAD_TYPES)
    fresh = make((seed,), method)
    heads = build_heads(model, HEAD_TYPES, fresh.member_state(0))
    average = copy.deepcopy(heads)

    def loss_of(logits: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for i, own in enumerate(logits[:-1]):
            loss = functional.cross_entropy(own, target.double(), reduction="none")
            if method.loss == "distill":
                loss = divergence(own, logits[-1])
            if method.loss == "weighted" and i >= 2:
                loss = loss * 2 * (1 - logits[i % 2].softmax(-1).max(-1).values.detach())
            total = total + loss.mean() + distillation * divergence(own, logits[-1]).mean()
        return total

    def mix(step: int, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fresh.step_number = step
        return fresh._mix(images, labels)

    def after(step: int) -> None:
        decay = 0.0 if step < 2 else min(1 - step ** (-2 / 3), method.ema_decay)
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), heads.parameters(), strict=True):
                slow.copy_(decay * slow + (1 - decay) * fast)

    train_heads(
        model,
        heads,
        torch.optim.AdamW(heads.parameters(), lr=1, weight_decay=method.weight_decay),
        lambda step: cosine(step, NUM_STEPS, method.learning_rate, method.min_learning_rate, 7),
        loss_of,
        tiny_split(),
        num_epochs=4,
        batch_size=13,
        seed=7,
        mix=mix,
        after=after,
    )
    return state_of(model, HEAD_TYPES, average if method.ema_decay else heads)


@pytest.mark.parametrize(
    ("changed", "distillation"),
    [
        ({"loss": "ce"}, 0.0),
        ({"loss": "weighted", "ema_decay": 0.8}, 0.3),
        ({"loss": "distill", "ema_decay": 0.0}, 0.0),
    ],
)
def test_a_member_equals_the_point_alone_and_the_slow_reference(
    changed: dict[str, float], distillation: float, tmp_path: Path
) -> None:
    method = DYCE.model_copy(update=changed)
    settings = TRAIN.model_copy(update={"distillation": distillation})
    pack = run(make(method=method, train=settings), tmp_path)
    for i, seed in enumerate(SEEDS):
        alone = run(make((seed,), method, settings), tmp_path)
        assert largest_difference(pack.member_state(i), alone.member_state(0)) <= 1e-12
    assert largest_difference(pack.member_state(0), expected_state(SEEDS[0], method, distillation)) <= 1e-10


def test_the_weighted_loss_trains_the_first_exit_and_holds_its_confidence() -> None:
    task = make(method=DYCE.model_copy(update={"loss": "weighted"}))
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 8, 6, 5, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.eye(5, dtype=torch.float64)[torch.tensor([0, 3, 2, 1, 4, 4])]
    (gradient,) = torch.autograd.grad(task._loss(logits, torch.zeros(6, 5), target).sum(), logits)
    first = logits[:, :2].detach().softmax(-1)
    assert torch.allclose(gradient[:, :2], (first - target) / 6, atol=1e-14)
    doubt = 2 * (1 - first.amax(-1, keepdim=True))
    later = logits[:, 4:6].detach().softmax(-1)
    assert torch.allclose(gradient[:, 4:6], doubt * (later - target) / 6, atol=1e-14)


def test_mixing_follows_from_the_step_and_leaves_numpy_and_the_batch_alone() -> None:
    task = make(method=DYCE.model_copy(update={"cutmix": 0.0}))
    split = tiny_split()
    _, images, labels = split.__getitems__(range(5))
    whole, numpy_before = images.clone(), np.random.get_state()[1].tolist()  # noqa: NPY002
    mixed, target = task._mix(images, labels)
    assert np.random.get_state()[1].tolist() == numpy_before  # noqa: NPY002
    assert torch.equal(images, whole)
    assert torch.allclose(target.sum(-1), torch.ones(5))
    assert torch.equal(mixed[4], images[4])  # of an odd number the last stays
    assert target[4].max().item() == pytest.approx(0.9 + 0.1 / 5)
    share = (mixed[0] - images[3]).norm() / (images[0] - images[3]).norm()
    smooth = 0.9 * functional.one_hot(labels, 5) + 0.1 / 5
    assert torch.allclose(target[0], share * smooth[0] + (1 - share) * smooth[3], atol=1e-6)
    assert torch.equal(task._mix(images, labels)[0], mixed)
    task.step_number = 1
    assert not torch.equal(task._mix(images, labels)[0], mixed)


def test_without_mixing_only_the_labels_are_smoothed() -> None:
    task = make(method=DYCE.model_copy(update={"cutmix": 0.0, "mixup": 0.0, "label_smoothing": 0.2}))
    _, images, labels = tiny_split().__getitems__(range(4))
    mixed, target = task._mix(images, labels)
    assert torch.equal(mixed, images)
    assert torch.allclose(target, 0.8 * functional.one_hot(labels, 5) + 0.2 / 5)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_killed_training_resumes_bit_for_bit(ema_decay: float, tmp_path: Path) -> None:
    method = DYCE.model_copy(update={"ema_decay": ema_decay})
    best = TRAIN.model_copy(update={"keep": "best"})
    check_resume(lambda: make(method=method, train=best), tmp_path, (1, 17))
