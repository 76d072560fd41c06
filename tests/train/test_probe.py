"""Probes: the optimum of scikit-learn on what the exits read, kills, ranks, folding, and inputs that are no good."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

from dynexit.core.cost import STEM
from dynexit.data import Workers
from dynexit.errors import Failure
from dynexit.models.macs import exit_costs
from dynexit.models.multi_exit import MultiExit
from dynexit.models.readers import Reading
from dynexit.progress import Progress, finished_loads
from dynexit.study.methods import JeiDnnSettings, ProbeSettings
from dynexit.study.schema import ExitsSettings, TrainSettings
from dynexit.train import probe as probe_module
from dynexit.train.checkpoint import Checkpoints
from dynexit.train.independent import IndependentTask
from dynexit.train.jei_dnn import JOINT, JeiDnnTask
from dynexit.train.pack import Pack, PackTask
from dynexit.train.probe import ProbeTask
from tests.train.ranks import run_ranks
from tests.train.tiny import RANKS, KilledError, largest_difference, seed_members, tiny_model, tiny_split

TRAIN = TrainSettings(num_epochs=3, global_batch_size=13, precision="float64")
SETTINGS = ProbeSettings(l2=[1e-1, 1e-2], max_iterations=400, num_epochs=6, global_batch_size=20)
SEEDS = (0, 3)


def probe_pack(head_types: tuple[str, ...] = ("linear",), seeds: tuple[int, ...] = SEEDS, **exits: Any) -> Pack:
    """A pack on rich features of the tiny model, with an exit on the stem."""
    reading = Reading("average_max_std", concatenate=True)
    model, _ = tiny_model()
    costs = exit_costs(model.backbone, (STEM, 0, 2), head_types, reading=reading)
    model = MultiExit(model.backbone, costs.positions, head_types, reading)
    split, validation = tiny_split(), tiny_split(40, seed=4)
    settings = ExitsSettings(**exits)
    return Pack(model, costs, seed_members(seeds), TRAIN, validation, RANKS, len(split), 7, split, settings)


def trained(pack: Pack, folder: Path, task: PackTask | None = None, seconds: float = 1e9) -> PackTask:
    """The task (probes if none is given) after its training; what it says is in log.txt."""
    task = ProbeTask(pack, SETTINGS) if task is None else task
    assert pack.plain_train is not None
    task.train(pack.plain_train, Checkpoints(folder / "pack", seconds), Progress("train", folder, 1e9))
    return task


def log_of(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def standardised(features: torch.Tensor) -> np.ndarray:
    x = features.double().numpy()
    std = x.std(0)
    return (x - x.mean(0)) / np.where(std > 0, std, np.inf)


def test_the_backbones_passes_are_counted_and_timed(tmp_path: Path) -> None:
    finished_loads.clear()
    pack = probe_pack()
    trained(pack, tmp_path)
    assert pack.plain_train is not None
    counts = [len(pack.plain_train), len(pack.validation)]
    assert [load.num_images for load in finished_loads] == counts
    assert all(0 < load.seconds_waited < load.seconds for load in finished_loads)
    lines = [line for line in log_of(tmp_path).splitlines() if "of the time waiting for data" in line]
    assert [f"train: {count} images in " in line for count, line in zip(counts, lines, strict=True)] == [True, True]
    finished_loads.clear()


def test_a_linear_head_is_the_optimum_on_standardised_features(tmp_path: Path) -> None:
    pack = probe_pack()
    task = trained(pack, tmp_path)
    train, validation = tiny_split(), tiny_split(40, seed=4)
    features, _ = pack.model.features(train.images)
    others, _ = pack.model.features(validation.images)
    for p, position in enumerate((STEM, 0, 2)):
        losses, logits = [], []
        for l2 in SETTINGS.l2:
            fitted = LogisticRegression(C=1 / (2 * len(train) * l2), tol=1e-10, max_iter=10_000)
            fitted.fit(standardised(features[p]), train.labels.numpy())
            mean, std = features[p].double().numpy().mean(0), features[p].double().numpy().std(0)
            z = (others[p].double().numpy() - mean) / np.where(std > 0, std, np.inf)
            logits.append(z @ fitted.coef_.T + fitted.intercept_)
            losses.append(torch.nn.functional.cross_entropy(torch.from_numpy(logits[-1]), validation.labels).item())
        for i in range(len(SEEDS)):
            state = task.member_state(i)
            weight, bias = (state[f"heads.{position}.linear.0.{name}"] for name in ("weight", "bias"))
            ours = others[p].double() @ weight.T + bias
            np.testing.assert_allclose(ours, logits[int(np.argmin(losses))], atol=2e-3)
        (row,) = [row for row in task.rows if row["member"] == 0]
        assert row["l2"][p] == SETTINGS.l2[int(np.argmin(losses))]
        assert row["exit_accuracy"][p] == np.mean(ours.argmax(1).numpy() == validation.labels.numpy())
    _, final = pack.model.features(validation.images)
    assert row["exit_accuracy"][-1] == (final.argmax(1) == validation.labels).double().mean().item()
    assert len(row["exit_accuracy"]) == 4
    assert "converged (gradient norm" in log_of(tmp_path)
    assert log_of(tmp_path).count(" s\n") >= 4  # seconds of the pass and of each exit


@pytest.mark.parametrize("whiten", [False, True])
def test_a_member_equals_the_point_alone(whiten: bool, tmp_path: Path) -> None:
    types = ("linear", "mlp2x8")
    together = trained(probe_pack(types, whiten=whiten), tmp_path / "together")
    for i, seed in enumerate(SEEDS):
        alone = trained(probe_pack(types, (seed,), whiten=whiten), tmp_path / str(seed))
        assert largest_difference(together.member_state(i), alone.member_state(0)) <= 1e-12
    first, second = together.member_state(0), together.member_state(1)
    assert torch.equal(first["heads.0.linear.0.weight"], second["heads.0.linear.0.weight"])
    assert not torch.equal(first["heads.0.mlp2x8.0.weight"], second["heads.0.mlp2x8.0.weight"])


def test_an_mlp_head_learns_and_keeps_its_best_epoch(tmp_path: Path) -> None:
    pack = probe_pack(("mlp2x8",))
    task = trained(pack, tmp_path)
    validation = tiny_split(40, seed=4)
    features, _ = pack.model.features(validation.images)
    for i in range(len(SEEDS)):
        state = task.member_state(i)
        total = 0.0
        for p, position in enumerate(pack.model.positions):
            name = f"heads.{position}.mlp2x8"
            hidden = features[p].double() @ state[f"{name}.0.weight"].T + state[f"{name}.0.bias"]
            logits = hidden.relu() @ state[f"{name}.1.weight"].T + state[f"{name}.1.bias"]
            total += torch.nn.functional.cross_entropy(logits, validation.labels).item()
        assert task.rows[i]["validation_mean_cross_entropy"] == pytest.approx(total / 3, rel=1e-9)
        assert total / 3 < 0.9 * np.log(5)
    # a rate that ruins the heads: the first epochs are the best, and patience ends the others
    ruined = ProbeTask(probe_pack(("mlp2x8",)), SETTINGS.model_copy(update={"learning_rate": 3.0, "patience": 1}))
    trained(pack, tmp_path / "ruined", ruined)
    best_MP = np.array([row["best_epoch"] for row in ruined.rows])
    assert best_MP.shape == (2, 3)
    assert best_MP.max() < SETTINGS.num_epochs - 1
    assert "best of 6 epochs" not in log_of(tmp_path / "ruined")


def test_a_killed_fit_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    types = ("linear", "mlp2x8")
    whole = trained(probe_pack(types), tmp_path / "whole")
    fit = probe_module.Prober.fit
    fitted: list[int] = []

    def dies(prober: probe_module.Prober, p: int) -> Any:
        if p == stop_at:
            raise KilledError
        fitted.append(p)
        return fit(prober, p)

    monkeypatch.setattr(probe_module.Prober, "fit", dies)
    for stop_at in (1, 2):
        with pytest.raises(KilledError):
            trained(probe_pack(types), tmp_path / str(stop_at), seconds=0.0)
        before, stop_at, folder = list(fitted), -1, tmp_path / str(stop_at)
        fitted.clear()
        resumed = trained(probe_pack(types), folder)
        assert sorted(before + fitted) == [0, 1, 2]
        assert resumed.rows == whole.rows
        for i in range(len(SEEDS)):
            expected, found = whole.member_state(i), resumed.member_state(i)
            assert all(torch.equal(expected[name], found[name]) for name in expected)
        fitted.clear()


@pytest.mark.slow
def test_world_sizes_1_and_2_agree(tmp_path: Path) -> None:
    states = []
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        run_ranks(world_size, [sys.executable, "-m", "tests.train.one_probe_rank", str(folder)])
        states.append([load_file(folder / f"rank{rank}.safetensors") for rank in range(world_size)])
    ((alone,), ranks) = states
    assert largest_difference(ranks[0], ranks[1]) == 0.0
    assert largest_difference(alone, ranks[0]) <= 1e-6
    assert any(name.startswith("joint.gates") for name in alone)


def test_folded_heads_of_other_methods_read_features_as_they_are(tmp_path: Path) -> None:
    pack = probe_pack(whiten=True)
    task = IndependentTask(pack)
    trained(pack, tmp_path, task)
    images = tiny_split(40, seed=4).images
    trained_BK = task._logits(task.best["heads"], *task._features(images))
    features, _ = pack.model.features(images)
    for i in range(len(SEEDS)):
        state = task.member_state(i)
        for p, position in enumerate(pack.model.positions):
            weight, bias = (state[f"heads.{position}.linear.0.{name}"] for name in ("weight", "bias"))
            torch.testing.assert_close(features[p].double() @ weight.T + bias, trained_BK[i, p], rtol=1e-6, atol=1e-6)


def test_jei_dnn_starts_from_converged_heads(tmp_path: Path) -> None:
    probes = trained(probe_pack(), tmp_path / "probes", ProbeTask(probe_pack(), ProbeSettings()))
    for exits in ({}, {"standardise": True}):
        pack = probe_pack(**exits)  # type: ignore[arg-type]
        pack.plain_train.workers = Workers(1)  # type: ignore[union-attr]  of a split that is both trained on and kept
        members = [dataclasses.replace(member, settings=JeiDnnSettings()) for member in pack.members]
        method = JeiDnnSettings(warm_up="convex", bilevel_batch_count=1000)  # gates alone for all epochs
        folder = tmp_path / f"jei{len(exits)}"
        task = trained(pack, folder, JeiDnnTask(dataclasses.replace(pack, members=members), method))
        assert {row["stage"] for row in task.rows} == {JOINT}
        for i in range(len(SEEDS)):
            found, expected = task.member_state(i), probes.member_state(i)
            heads = {name: value for name, value in found.items() if name.startswith("heads.")}
            assert largest_difference(heads, expected) <= 1e-9
            assert any(name.startswith("gates.") for name in found)


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    pack = probe_pack()
    pack.plain_train.images[5] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(Failure) as caught:
        trained(pack, tmp_path)
    assert str(caught.value) == (
        "exit after the stem: 192 of 192 features are not finite on the training split; look at the backbone's weights "
        "and at the images"
    )


def test_constant_features_and_absent_classes_are_said_once(tmp_path: Path) -> None:
    pack = probe_pack()
    split = pack.plain_train
    assert split is not None
    split.labels[split.labels == 3] = 2
    with torch.no_grad():  # the first channel of the stem becomes a constant
        norm = pack.model.backbone.model.bn1
        norm.weight[0], norm.bias[0] = 0.0, 1.0
    task = trained(pack, tmp_path)
    log = log_of(tmp_path)
    assert log.count("no training image is of class 3; no exit will predict it") == 1
    assert log.count("exit after the stem: 3 of 192 features are constant on the training split and are ignored") == 1
    assert all(value.isfinite().all() for value in task.member_state(0).values())


def test_a_fit_that_stops_early_says_so(tmp_path: Path) -> None:
    task = trained(probe_pack(), tmp_path, ProbeTask(probe_pack(), ProbeSettings(max_iterations=2)))
    assert "stopped as set by probe.max_iterations=2, its best iterate is kept (gradient norm " in log_of(tmp_path)
    assert min(task.rows[0]["gradient_norm"]) > 1e-5
