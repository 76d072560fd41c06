"""The tables of stages and methods: complete, in order, and all that a new method takes."""

import itertools
from pathlib import Path

import pytest

from dynexit.jobs.finished import finished_jobs
from dynexit.run_dir import RunDir
from dynexit.study.methods import METHODS, Method, register_method
from dynexit.study.read import load_study
from dynexit.study.stages import INFER, POINT_STAGES, STAGES, stage_of, stages_until
from tests.command_line import TINY, run_stage

SIXTH = """
from dynexit.train.independent import IndependentTask


class LastExitTask(IndependentTask):
    def _loss(self, logits_MRBK, final_BK, target):
        return super()._loss(logits_MRBK[:, -1:], final_BK, target)
"""


def test_stages_follow_the_one_they_need() -> None:
    assert list(STAGES) == ["prepare", "train", "record", "bench", "search", "report"]
    before = None
    for stage in (*STAGES.values(), INFER):
        if stage.name != "bench":  # beside record, where it is asked for
            assert stage.needs == before
            before = stage.name
        assert callable(stage.runner())
        assert stage_of(stage.name) is stage
    assert stages_until("record") == ("prepare", "train", "record")
    assert stages_until("bench") == ("prepare", "bench")
    assert stages_until("record", by_time=True) == ("prepare", "train", "record")
    assert stages_until("infer", by_time=True) == tuple(STAGES)
    assert stages_until("infer") == tuple(stage for stage in STAGES if stage != "bench")
    for earlier, later in itertools.pairwise(stage for stage in POINT_STAGES if stage != "bench"):
        assert set(STAGES[earlier].sections) < set(STAGES[later].sections)


def test_every_method_has_its_class_and_section() -> None:
    study = load_study(TINY)
    for method in METHODS.values():
        assert method.task_class().__name__.endswith("Task")
        assert hasattr(study.config, method.name) == (method.settings is not None)
    with pytest.raises(ValueError, match="there is already a method 'dyce'; choose another name"):
        register_method(METHODS["dyce"])


@pytest.mark.slow
def test_a_sixth_method_is_a_class_and_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "last_exit_method.py").write_text(SIXTH)
    monkeypatch.syspath_prepend(tmp_path)
    register_method(Method("last_exit", "last_exit_method:LastExitTask"))
    request.addfinalizer(lambda: METHODS.pop("last_exit"))
    study = load_study(TINY, [f"runs_dir={tmp_path}", "train.method=last_exit", "seed=[0]", "report.mlflow=false"])
    (study.directory).mkdir()
    (study.directory / "study.yaml").write_text("")
    (point,) = study.points
    for stage in stages_until("report"):
        run_stage(stage, study.points)
    assert finished_jobs(point) == list(point.stages)
    assert "gates" not in {name.partition(".")[0] for name in RunDir(point, "train").load_tensors("heads.safetensors")}
    assert "last_exit" in (study.directory / "report" / "operating_points.csv").read_text()
