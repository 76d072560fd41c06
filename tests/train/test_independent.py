"""Deep supervision in a pack: each member as alone, and as written down slowly; distillation; what is kept."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from dynexit.study.schema import TrainSettings
from dynexit.train.independent import IndependentTask
from tests.reference.deep_supervision_training import build_heads, cosine, divergence, state_of, train_heads
from tests.train.tiny import check_resume, largest_difference, run, seed_members, tiny_model, tiny_pack, tiny_split

TRAIN = TrainSettings(num_epochs=4, global_batch_size=13, precision="float64", keep="last", learning_rate=0.05)
HEAD_TYPES = ("mlp2x8", "linear")
SEEDS = (0, 3, 1)


def make(seeds: tuple[int, ...] = SEEDS, train: TrainSettings = TRAIN) -> IndependentTask:
    return IndependentTask(tiny_pack(seed_members(seeds), train, HEAD_TYPES))


@pytest.mark.parametrize("distillation", [0.0, 0.7])
def test_a_member_equals_the_point_alone_and_the_slow_reference(distillation: float, tmp_path: Path) -> None:
    settings = TRAIN.model_copy(update={"distillation": distillation})
    pack = run(make(train=settings), tmp_path)
    model, _ = tiny_model(HEAD_TYPES)

    def loss_of(logits: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        losses = [functional.cross_entropy(own, labels) for own in logits[:-1]]
        return sum(losses) + distillation * sum(divergence(own, logits[-1]).mean() for own in logits[:-1])

    for i, seed in enumerate(SEEDS):
        alone = run(make((seed,), settings), tmp_path)
        assert largest_difference(pack.member_state(i), alone.member_state(0)) <= 1e-12
        heads = build_heads(model, HEAD_TYPES, make((seed,)).member_state(0))
        sgd = torch.optim.SGD(heads.parameters(), lr=1, momentum=TRAIN.momentum, weight_decay=TRAIN.weight_decay)
        num_steps = 4 * 7
        train_heads(
            model,
            heads,
            sgd,
            lambda step: cosine(step, num_steps, TRAIN.learning_rate, TRAIN.min_learning_rate),  # noqa: B023
            loss_of,
            tiny_split(),
            num_epochs=4,
            batch_size=13,
            seed=7,
        )
        assert largest_difference(pack.member_state(i), state_of(model, HEAD_TYPES, heads)) <= 1e-10
    assert largest_difference(pack.member_state(0), pack.member_state(1)) > 1e-2


def test_micro_batches_change_nothing_but_the_images_at_once(tmp_path: Path) -> None:
    whole = run(make(), tmp_path)
    task = make(train=TRAIN.model_copy(update={"micro_batch_size": 5}))
    sizes, features = [], task.model.features
    task.model.features = lambda images: [sizes.append(len(images)), features(images)][1]  # type: ignore[method-assign,func-returns-value]
    parts = run(task, tmp_path)
    assert set(sizes[:3]) == {5, 3}
    assert max(sizes) == 5
    for i in range(len(SEEDS)):
        assert largest_difference(whole.member_state(i), parts.member_state(i)) <= 1e-5


def test_a_killed_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    best = TRAIN.model_copy(update={"keep": "best"})
    check_resume(lambda: make(train=best), tmp_path, (3, 14, 22))


def test_nan_stops_one_member_and_no_other(tmp_path: Path) -> None:
    clean = run(make(), tmp_path / "clean")
    task = make()
    step = task.train_step

    def poison(batch, share):  # type: ignore[no-untyped-def]
        if task.step_number == 9:
            task.stack("heads")["0.linear.0.weight"][1] = float("nan")
        return step(batch, share)

    task.train_step = poison  # type: ignore[method-assign]
    run(task, tmp_path / "poisoned")
    assert task.stopped == {
        1: "seed=3: the head loss was not finite at step 9 on rank 0; the member was stopped and "
        "its last good state kept; lower train.learning_rate or look at the data"
    }
    for i in (0, 2):
        assert largest_difference(clean.member_state(i), task.member_state(i)) == 0.0


def test_best_keeps_the_lowest_mean_cross_entropy(tmp_path: Path) -> None:
    # a rate that ruins the heads again and again, so that the last epoch is not the best of every member
    settings = TRAIN.model_copy(update={"keep": "best", "learning_rate": 3.0, "min_learning_rate": 3.0})
    task = run(make(train=settings), tmp_path)
    validation = task.validation
    features, _ = task.model.features(validation.images)
    for i in range(len(SEEDS)):
        rows = [row for row in task.rows if row["member"] == i]
        lowest = min(row["validation_mean_cross_entropy"] for row in rows)
        heads = build_heads(task.model, HEAD_TYPES, task.member_state(i))
        with torch.no_grad():
            losses = [
                functional.cross_entropy(head(features[r // 2].double()), validation.labels)
                for r, head in enumerate(heads)
            ]
        assert sum(losses).item() / len(losses) == pytest.approx(lowest, rel=1e-12)
    assert {len(row["exit_accuracy"]) for row in task.rows} == {2 * 4 + 1}
