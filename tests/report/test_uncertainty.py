"""The figures of calibration and prediction sets against loops over plain softmaxes, and what they promise."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dynexit.core.calibration import ALPHAS, CONFORMAL_VARIANTS, ece
from dynexit.core.cost import ExitCosts
from dynexit.core.statistics import Interval
from dynexit.core.tradeoff import Configuration
from dynexit.record.manifest import Layout
from dynexit.record.plan import finish, make_plan
from dynexit.record.recorder import Recorder
from dynexit.record.shards import Record
from dynexit.report.judged.outcomes import Judgement
from dynexit.report.table import FrontPoint
from dynexit.report.uncertainty import ALPHA, Measure, Uncertainty, measure, read_outputs, write_uncertainty
from dynexit.report.uncertainty_section import uncertainty_section
from dynexit.search.operating_points import ReportRow

POSITIONS, HEADS, CLASSES = (1, 4, 5), ("linear", "mlp2x7"), 6
COSTS = ExitCosts(1000, POSITIONS, (200, 600, 800), HEADS, ((3, 9),) * 3, (4,) * 3)
CONFIGURATION = Configuration(((1, 0.5), (-1, 0.0), (0, 0.625)))
ROWS = (1, 4, 6)  # of the record: head 1 at position 0, head 0 at position 2, the backbone


def logits(seed: int, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (R, N, K) that get better with depth and are too sure of themselves, and labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.randint(CLASSES, (num_samples,), generator=generator)
    noise_RNK = torch.randn(len(POSITIONS) * 2 + 1, num_samples, CLASSES, generator=generator)
    signal_NK = torch.nn.functional.one_hot(label_N, CLASSES)
    depth_R11 = torch.arange(1, 8).float()[:, None, None]
    return 2 * (noise_RNK + signal_NK * depth_R11 / 2), label_N


def record(directory: Path, seed: int, num_samples: int, topk: int = CLASSES) -> tuple[Record, np.ndarray, np.ndarray]:
    """A record of such logits, their softmax at the configuration's exits (L, N, K), and the labels."""
    logits_RNK, label_N = logits(seed, num_samples)
    exits = [(position, head) for position in POSITIONS for head in HEADS]
    header = {"checkpoint_sha256": "0", "num_classes": CLASSES}
    layout = Layout(tuple(exits), topk, num_gates=3, num_samples=num_samples, batch_size=num_samples)
    plan = make_plan([directory], [header], layout)
    with Recorder(plan) as recorder:
        gate_MGB = torch.rand(1, 3, num_samples, generator=torch.Generator().manual_seed(seed))
        recorder.add(0, torch.arange(num_samples), label_N, logits_RNK[None], gate_MGB)
    finish(plan, recorder.shards)
    return Record.open(directory), torch.softmax(logits_RNK, -1).numpy()[list(ROWS)], label_N.numpy()


def slow_exit(probability_LNK: np.ndarray, n: int) -> int:
    if probability_LNK[0, n].max() > 0.5:
        return 0
    return 1 if probability_LNK[1, n].max() > 0.625 else 2


def slow_quantile(scores: list[float], alpha: float) -> float:
    """The ceil((n + 1)(1 - alpha))-th smallest score, or one that takes in every class."""
    rank = math.ceil((len(scores) + 1) * (1 - alpha) - 1e-9)
    return sorted(scores)[rank - 1] if rank <= len(scores) else 1.0


def measured(tmp_path: Path, topk: int = CLASSES) -> tuple[list[Measure], list, list]:
    found, splits = [], []
    for seed, (name, count) in enumerate((("validation", 240), ("test", 310))):
        one, probability_LNK, label_N = record(tmp_path / name, seed, count, topk)
        found.append(read_outputs(one, COSTS, CONFIGURATION, "max_probability"))
        splits.append((probability_LNK, label_N))
    return list(measure(*found)), *splits


def value(measures: list[Measure], *which: object) -> float:
    (found,) = [m for m in measures if (m.name, m.scope, m.exit, m.variant, m.alpha) == which]
    return found.value


def test_outputs_are_those_of_the_exits_that_are_on(tmp_path: Path) -> None:
    one, probability_LNK, label_N = record(tmp_path, 0, 97)
    outputs = read_outputs(one, COSTS, CONFIGURATION, "max_probability")
    assert outputs.exits == (0, 2, 3)
    assert outputs.exit_index_N.tolist() == [slow_exit(probability_LNK, n) for n in range(97)]
    assert np.allclose(outputs.probability_LNk, -np.sort(-probability_LNK, -1))
    assert np.allclose(outputs.label_probability_LN, probability_LNK[:, np.arange(97), label_N])
    assert np.array_equal(outputs.correct_LN, probability_LNK.argmax(-1) == label_N)
    gated = read_outputs(one, COSTS, None, "max_probability")
    assert gated.exits == (0, 1, 2, 3)
    assert len(np.unique(gated.exit_index_N)) > 1


def test_coverage_and_size_equal_loops(tmp_path: Path) -> None:
    measures, (validation, validation_label), (test, test_label) = measured(tmp_path)
    score = {(exit_, n): 1 - float(validation[exit_, n, validation_label[n]]) for exit_ in range(3) for n in range(240)}
    left = {n: slow_exit(validation, n) for n in range(240)}
    for alpha in (0.01, 0.05):
        general = slow_quantile([score[left[n], n] for n in range(240)], alpha)
        everybody = [slow_quantile([score[exit_, n] for n in range(240)], alpha) for exit_ in range(3)]
        strict = [slow_quantile([score[left[n], n] for n in left if left[n] == exit_], alpha) for exit_ in range(3)]
        for variant, quantile in (("general", [general] * 3), ("gated_all", everybody), ("gated_strict", strict)):
            covered = size = 0
            for n in range(310):
                exit_ = slow_exit(test, n)
                members = [c for c in range(CLASSES) if test[exit_, n, c] >= 1 - quantile[exit_] - 1e-9]
                covered, size = covered + (test_label[n] in members), size + len(members)
            which = ("taken", None, variant, alpha)
            assert value(measures, "coverage", *which) == pytest.approx(covered / 310, abs=1e-9)
            assert value(measures, "set_size", *which) == pytest.approx(size / 310, abs=1e-9)
            assert value(measures, "greatest_set_size", *which) == pytest.approx(size / 310, abs=1e-9)


def test_the_quantile_of_the_reference_is_kept(tmp_path: Path) -> None:
    splits = [record(tmp_path / name, seed, count)[0] for seed, (name, count) in enumerate((("v", 240), ("t", 310)))]
    calibration, test = (read_outputs(one, COSTS, CONFIGURATION, "max_probability") for one in splits)
    sizes = {}
    for quantile in ("finite_sample", "reference"):
        found = list(measure(calibration, test, quantile=quantile))
        sizes[quantile] = value(found, "set_size", "taken", None, "general", 0.05)
    assert sizes["finite_sample"] < sizes["reference"]  # whose score is one rank higher


def test_parts_add_up_to_the_whole(tmp_path: Path) -> None:
    measures, *_ = measured(tmp_path)
    counts = [m.value for m in measures if m.name == "num_samples" and m.scope == "leaving"]
    assert sum(counts) == value(measures, "num_samples", "taken", None, "", None) == 310
    for variant in CONFORMAL_VARIANTS:
        parts = [value(measures, "coverage", "leaving", exit_, variant, ALPHA) for exit_ in (0, 2, 3)]
        whole = value(measures, "coverage", "taken", None, variant, ALPHA)
        assert np.dot(parts, counts) / 310 == pytest.approx(whole)
    assert {m.alpha for m in measures if m.scope == "taken" and m.variant} == set(ALPHAS)


def test_calibration_errors_before_and_after_temperatures(tmp_path: Path) -> None:
    measures, (validation, validation_label), (test, test_label) = measured(tmp_path)
    exit_N = [slow_exit(test, n) for n in range(310)]
    temperatures = [value(measures, "temperature", "all", exit_, "", None) for exit_ in (0, 2, 3)]
    for index, best in enumerate(temperatures):

        def loss(t: float, index: int = index) -> float:
            p = torch.from_numpy(validation[index]).double().log() / t
            return float(torch.nn.functional.cross_entropy(p, torch.from_numpy(validation_label)))

        assert loss(best) <= min(loss(best * 1.01), loss(best / 1.01))
    raw = np.array([test[exit_N[n], n].max() for n in range(310)])
    scaled = np.array(
        [
            torch.softmax(torch.from_numpy(test[exit_N[n], n]).double().log() / temperatures[exit_N[n]], 0).max()
            for n in range(310)
        ]
    )
    correct = np.array([test[exit_N[n], n].argmax() == test_label[n] for n in range(310)])
    for binning in ("quantile", "width"):
        for name, confidence in (("", raw), ("_scaled", scaled)):
            expected = ece(confidence, correct, binning=binning)
            assert value(measures, f"ece_{binning}{name}", "taken", None, "", None) == pytest.approx(expected, abs=1e-6)
    assert value(measures, "ece_quantile_scaled", "all", 0, "", None) < value(
        measures, "ece_quantile", "all", 0, "", None
    )


@pytest.mark.parametrize("topk", [1, 3])
def test_sizes_are_bounded_where_not_all_classes_are_recorded(tmp_path: Path, topk: int) -> None:
    whole, *_ = measured(tmp_path / "whole")
    part, *_ = measured(tmp_path / "part", topk)
    for measure_ in whole:
        which = (measure_.scope, measure_.exit, measure_.variant, measure_.alpha)
        if measure_.name == "set_size":
            least, greatest = (value(part, name, *which) for name in ("set_size", "greatest_set_size"))
            assert least <= measure_.value <= greatest
        elif measure_.name == "coverage":
            assert value(part, "coverage", *which) == measure_.value
    assert not [m for m in part if m.name == "temperature" or "scaled" in m.name]


def test_nobody_leaving_somewhere_is_no_error(tmp_path: Path) -> None:
    one, *_ = record(tmp_path, 0, 60)
    never = Configuration(((1, 1.0), (-1, 0.0), (0, 1.0)))
    outputs = read_outputs(one, COSTS, never, "max_probability")
    found = list(measure(outputs, outputs))
    assert [m.value for m in found if m.name == "num_samples"] == [60, 0, 0, 60]
    assert all(math.isfinite(m.value) for m in found)


def front_point(relative_macs: float) -> FrontPoint:
    row = ReportRow(
        "search", "jei_dnn", 0, 0.1, 0.5, "test", 0.9, 1.0, relative_macs, (0.5, 0.5), True, "id", "[[0,0.5]]"
    )
    return FrontPoint(row, row, 0.01)


@pytest.mark.parametrize(("share", "topk"), [(0.0, CLASSES), (0.25, 1)])
def test_table_and_section_say_what_was_measured(tmp_path: Path, share: float, topk: int) -> None:
    measures, *_ = measured(tmp_path, topk)
    found = [Uncertainty(front_point(cost), tuple(measures)) for cost in (0.2, 0.31, 0.5)]
    write_uncertainty(tmp_path / "uncertainty.csv", found)
    with (tmp_path / "uncertainty.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * len(measures)
    assert [float(row["value"]) for row in rows[: len(measures)]] == [m.value for m in measures]
    first = found[0].point.test
    judgement = Judgement(Interval(0.9, 0.85, 0.93), Interval(-0.01, -0.03, 0.01), Interval(0.2, 0.2, 0.2), 60)
    judged = {(first.key, "test"): judgement}  # the key does not depend on the cost: of all three
    section = uncertainty_section(found, share, (topk, CLASSES), tmp_path / "uncertainty.png", judged)
    assert section.table[0]["accuracy"].replace("\N{NO-BREAK SPACE}", " ") == "90.00 % (85.00 to 93.00)"
    assert (tmp_path / "uncertainty.png").stat().st_size > 10_000
    assert (tmp_path / "uncertainty_dark.png").is_file()
    assert len(section.table) == 3
    assert all(section.table[0].values()) == (topk == CLASSES)  # without all classes no temperatures
    assert ("measured, not promised" in section.remark) == (share == 0)
    assert ("25 % of" in section.remark or "25 %," in section.remark) == (share > 0)
    assert ("record.topk=6" in section.remark) == (topk < CLASSES)
