"""A member of a pack is the same point trained alone; the training is that of the formulas; NaN stays where it is."""

from pathlib import Path

import pytest
import torch

from dynexit.data import epoch_batches
from dynexit.study.methods import JeiDnnSettings
from dynexit.study.schema import TrainSettings
from tests.reference.jei_dnn_training import train_alone
from tests.train.tiny import check_resume, largest_difference, run, tiny_model, tiny_split, tiny_task

MEMBERS = [(0, 0.05), (0, 0.4), (1, 0.05), (1, 0.3), (0, 1.1)]
METHOD = JeiDnnSettings(max_warm_up_epochs=2, bilevel_batch_count=4)
TRAIN = TrainSettings(num_epochs=6, global_batch_size=13, precision="float64", keep="last", learning_rate=0.05)


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("head_loss", ["paper", "single"])
def test_a_member_of_a_pack_equals_the_point_trained_alone(
    precision: str, tolerance: float, head_loss: str, tmp_path: Path
) -> None:
    settings = TRAIN.model_copy(update={"precision": precision})
    method = METHOD.model_copy(update={"head_loss": head_loss})
    pack = run(tiny_task(MEMBERS, settings, method), tmp_path)
    assert pack.step_number >= 40
    for i, member in enumerate(MEMBERS):
        alone = run(tiny_task([member], settings, method), tmp_path)
        assert largest_difference(pack.member_state(i), alone.member_state(0)) <= tolerance
    for i in (1, 3):  # the comparison is sharp enough to see another tradeoff
        seed, tradeoff = MEMBERS[i]
        other = run(tiny_task([(seed, 1.5 * tradeoff)], settings, method), tmp_path)
        assert largest_difference(pack.member_state(i), other.member_state(0)) > 1e-3


@pytest.mark.parametrize("head_loss", ["reference", "paper", "single"])
@pytest.mark.parametrize(
    ("positive_weight", "distillation"), [("reference", 0.0), ("cumulative", 0.0), ("none", 0.0), ("none", 0.4)]
)
def test_training_equals_the_slow_reference(
    head_loss: str, positive_weight: str, distillation: float, tmp_path: Path
) -> None:
    settings = TRAIN.model_copy(update={"distillation": distillation})
    alternation = "reference" if head_loss == "reference" else "continuous"
    update = {"head_loss": head_loss, "positive_weight": positive_weight, "alternation": alternation}
    method = METHOD.model_copy(update=update)
    pack = run(tiny_task(MEMBERS, settings, method), tmp_path)
    model, costs = tiny_model()
    for i in (0, 3):
        _, tradeoff = MEMBERS[i]
        fresh = tiny_task([MEMBERS[i]], TRAIN, method).member_state(0)
        splits = tiny_split(), tiny_split(40, seed=4)
        expected = train_alone(model, costs.relative_cost_L(), fresh, tradeoff, settings, method, *splits, seed=7)
        assert largest_difference(pack.member_state(i), expected) <= 1e-10


def test_a_warm_up_leaves_epochs_for_the_gates(tmp_path: Path) -> None:
    bounds = {epochs: JeiDnnSettings().most_warm_up_epochs(epochs) for epochs in (1, 2, 5, 6, 7, 15)}
    assert bounds == {1: 0, 2: 1, 5: 2, 6: 3, 7: 6, 15: 6}
    short = TRAIN.model_copy(update={"num_epochs": 3})
    task = run(tiny_task(MEMBERS[:1], short, JeiDnnSettings(warm_up_patience=9, bilevel_batch_count=2)), tmp_path)
    assert [row["stage"] for row in task.rows] == ["warm-up", "joint", "joint"]


def test_members_of_one_seed_share_the_warm_up(tmp_path: Path) -> None:
    task = tiny_task(MEMBERS, TRAIN, METHOD)
    split = tiny_split()
    for epoch in range(2):
        for batch in epoch_batches(len(split), 13, 7, epoch):
            task.train_step(split.__getitems__(batch), 1.0)
        task.end_epoch(epoch)
    assert [group.stage for group in task.groups] == ["joint", "joint"]
    momenta = task.heads.by_name(task.optimizers["heads"].states[""])
    for tensors in (task.stack("heads"), momenta):
        for value in tensors.values():
            assert torch.equal(value[0], value[1])
            assert torch.equal(value[2], value[3])
            assert not torch.equal(value[0], value[2])


def test_a_killed_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    check_resume(lambda: tiny_task(MEMBERS, TRAIN, METHOD), tmp_path, (3, 11, 16, 24, 38))


@pytest.mark.parametrize("keep", ["last", "best"])
def test_nan_stops_one_member_and_no_other(keep: str, tmp_path: Path) -> None:
    settings = TRAIN.model_copy(update={"keep": keep})
    clean = run(tiny_task(MEMBERS, settings, METHOD), tmp_path / "clean")
    task = tiny_task(MEMBERS, settings, METHOD)
    step = task.train_step

    def poison(batch, share):  # type: ignore[no-untyped-def]
        if task.step_number == 30:
            task.tradeoff_M[3] = float("nan")
            task.stack("gates")["weight"][3] = float("nan")
        return step(batch, share)

    task.train_step = poison  # type: ignore[method-assign]
    run(task, tmp_path / "poisoned")
    assert list(task.stopped) == [3]
    assert task.stopped[3].startswith("seed=1 ce_ic_tradeoff=0.3: the gate loss was not finite at step 3")
    for i in (0, 1, 2, 4):
        assert largest_difference(clean.member_state(i), task.member_state(i)) == 0.0


def test_best_keeps_the_lowest_validation_objective(tmp_path: Path) -> None:
    settings = TRAIN.model_copy(update={"keep": "best"})
    task = run(tiny_task(MEMBERS, settings, METHOD), tmp_path)
    for i, (_, tradeoff) in enumerate(MEMBERS):
        rows = [row for row in task.rows if row["member"] == i and row["stage"] == "joint"]
        objectives = [row["validation_cross_entropy"] + tradeoff * row["validation_relative_cost"] for row in rows]
        assert task.best_objective_M[i].item() == pytest.approx(min(objectives), abs=1e-12)
