"""Studies on kept features: near to fresh ones, resumed bit for bit, and every method once from the same files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dynexit.jobs.planning.missing import missing_jobs
from dynexit.study.read import load_study
from dynexit.train.independent import IndependentTask
from tests.command_line import TINY, digests, run_stage
from tests.train.tiny import KilledError

pytestmark = pytest.mark.slow

METHODS = ("jei_dnn", "independent", "boosted", "weighted", "probe", "dyce")
QUICK = (
    *("seed=[0]", "jei_dnn.ce_ic_tradeoff=1", "prepare.num_epochs=1", "train.num_epochs=2"),
    *("jei_dnn.max_warm_up_epochs=1", "dyce.num_warm_up_epochs=1", "dyce.mixup=0", "dyce.cutmix=0"),
)


def trained(folder: Path, name: str, *overrides: str):  # type: ignore[no-untyped-def]
    study = load_study(TINY, [f"runs_dir={folder}", f"name={name}", *QUICK, *overrides])
    for stage in ("prepare", "train"):
        for job in missing_jobs(study, stage):
            run_stage(stage, job.points)
    return study


def test_every_method_trains_on_kept_features_as_on_images(tmp_path: Path) -> None:
    overrides = (f"train.method=[{', '.join(METHODS)}]", "train.precision=float64", "dist.checkpoint_seconds=1000")
    kept = trained(tmp_path, "kept", *overrides, "train.features=kept")
    fresh = trained(tmp_path, "fresh", *overrides)
    for one, other in zip(kept.points, fresh.points, strict=True):
        assert one.ids["prepare"] == other.ids["prepare"]
        assert one.id != other.id
        mine, theirs = (
            load_file(study.directory / "train" / point.id / "heads.safetensors")
            for study, point in ((kept, one), (fresh, other))
        )
        for head, value in theirs.items():
            torch.testing.assert_close(mine[head], value, rtol=1e-3, atol=1e-4, msg=f"{one.label} {head}")
    assert len(list((tmp_path / "features").glob("*/DONE"))) == 2


def test_a_study_on_kept_features_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ("train.method=independent", "train.features=kept")
    whole = trained(tmp_path / "1", "study", *overrides)
    step = IndependentTask.train_step

    def dies(task: IndependentTask, batch, share):  # type: ignore[no-untyped-def]
        if task.step_number == 40:
            raise KilledError
        return step(task, batch, share)

    monkeypatch.setattr(IndependentTask, "train_step", dies)
    with pytest.raises(KilledError):
        trained(tmp_path / "2", "study", *overrides)
    monkeypatch.undo()
    resumed = trained(tmp_path / "2", "study", *overrides)
    assert digests(resumed.directory) == digests(whole.directory)
