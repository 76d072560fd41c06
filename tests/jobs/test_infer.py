"""What infer makes of answers that differ from the record's."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dynexit.core.confidence import max_probability
from dynexit.data import Split
from dynexit.deploy.probe import measured_tolerance
from dynexit.deploy.router import NEAR, Answers
from dynexit.errors import Failure
from dynexit.jobs.infer import _compare
from tests.deploy.test_engine import build, images_for
from tests.report.test_uncertainty import COSTS, record


def test_the_tolerance_follows_the_distance_from_the_record() -> None:
    engine = build("ResNet")[0]
    images = images_for(engine, 5)
    recorded_Rn = max_probability(engine.all_logits(images)[0]).flatten(0, 1).numpy()
    assert measured_tolerance(images, engine, recorded_Rn) == pytest.approx(NEAR, abs=1e-5)
    other_Rn = recorded_Rn.copy()
    other_Rn[2, 3] += 0.002  # as of a compiled backbone in bf16
    assert measured_tolerance(images, engine, other_Rn) == pytest.approx(0.008, rel=0.01)
    other_Rn[2, 3] += 0.1
    with pytest.raises(Failure, match=r"confidences differ by 0\.102 from those recorded; .*record the study again"):
        measured_tolerance(images, engine, other_Rn)


def test_few_images_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build("ResNet", tile=30)[0]
    images = images_for(engine, 65)
    recorded_Rn = max_probability(engine.all_logits(images)[0]).flatten(0, 1).numpy()
    sizes, run = [], engine.all_logits
    monkeypatch.setattr(engine, "all_logits", lambda batch: sizes.append(len(batch)) or run(batch))
    assert measured_tolerance(images, engine, recorded_Rn) == pytest.approx(NEAR, abs=1e-5)
    assert sizes == [22, 22, 21, *[1] * 8]
    monkeypatch.setattr(engine, "all_logits", lambda batch: run(batch + 0.01 * (len(batch) == 1)))
    assert measured_tolerance(images, engine, recorded_Rn) > 2 * NEAR  # from one batch size to another


def test_classes_may_change_places_only_in_a_tie(tmp_path: Path) -> None:
    recorded, _, labels = record(tmp_path, 0, 6)
    last = len(recorded.rows) - 1
    prediction_N = recorded.prediction()[last]
    num_classes = 1 + max(map(int, (*prediction_N, *labels)))
    logits_NK = 5.0 * np.eye(num_classes, dtype=np.float32)[prediction_N]
    other_N = (prediction_N + 1) % num_classes
    logits_NK[0, other_N[0]] = 5.00001  # hardly more than the recorded class
    logits_NK[1, other_N[1]] = 6.0
    exits_N = np.full(6, len(COSTS.positions))
    answers = Answers(logits_NK.argmax(1), exits_N, np.zeros(6, bool), logits_NK)
    samples = Split(torch.zeros(6, 1, 2, 2), torch.from_numpy(labels), torch.arange(6))
    rows_L = np.full(len(COSTS.positions) + 1, last)
    summary = _compare(
        answers, samples, recorded, (exits_N, np.arange(len(COSTS.positions) + 1) + 1, rows_L), COSTS, 1e-4
    )
    assert summary["unexplained_differences"] == 1
