"""Site profiles: every key checked, wrong ones named with the right ones."""

import os
from pathlib import Path
from typing import Any

import pytest

from dynexit.errors import UserError
from dynexit.study.dist import DistSettings
from dynexit.study.schema import Config
from launch.slurm.site import Site, StageSite, load_last_site, load_site, site_contradictions

SITES = Path(__file__).parents[3] / "slurm" / "sites"


def write(folder: Path, text: str) -> Path:
    path = folder / "site.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("partitoin: gpu", "partitoin is not a key; did you mean partition?"),
        ("time: 60", "time is not a key; did you mean time_minutes?"),
        ("zebra: 1", "zebra is not a key; the keys are partition, account, qos"),
        ("gpus_per_node: two", "gpus_per_node = 'two': should be a valid integer"),
        ("time_minutes: 0", "time_minutes = 0: should be greater than or equal to 1"),
        ("- partition", "should hold keys, as `partition: gpu`, not list"),
        ("a: [", "cannot be read as YAML"),
        ("sbatch: " + "[" * 60, "cannot be read as YAML: it is nested deeper than 50 levels (line 1, column 58)"),
        ("a: &a [1, 2]\n" + "b: [" + "*a, " * 40_000 + "]", "it holds more than 100,000 values"),
        ("sbatch: {begin: 2026-01-01}", "sbatch.begin = 2026-01-01: is a date in YAML; put it in quotes if it is text"),
        ("x" * 1000 + ": 1", "xxx... (1,000 characters) is not a key; the keys are partition"),
        ("stages: {train: {cpus: 4}}", "stages.train = 'train': should be 'search' or 'report'"),
        ("stages: {search: {gpus: 4}}", "stages.search.gpus is not a key"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        load_site(write(tmp_path, text))
    assert expected in str(error.value)
    assert "site.yaml" in str(error.value)


def test_all_mistakes_come_together(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_site(write(tmp_path, "gpu: 1\nmem_gb: -1\nqos: 3\n"))
    assert len(str(error.value).splitlines()) == 3


def test_options_that_dynexit_sets_are_refused() -> None:
    site = Site(sbatch={"array": "0-3", "no_requeue": True, "mail-type": "END", "--time": 1, "gres": "gpu:a100:2"})
    said = "follows from other keys of profile and study; take it out of the site profile"
    assert site_contradictions(site, Config()) == [f"sbatch = array, no-requeue, time: {said}"]


def test_a_missing_profile_and_none() -> None:
    with pytest.raises(UserError, match=r"there is no site profile nowhere\.yaml; slurm/sites/example\.yaml"):
        load_site(Path("nowhere.yaml"))
    assert load_site(None) == Site()


def test_profiles_in_the_repository_are_valid_and_complete() -> None:
    assert load_site(SITES / "devcluster.yaml").partition == "main"
    text = (SITES / "example.yaml").read_text()
    assert load_site(SITES / "example.yaml").partition == "gpu"
    assert [name for name in Site.model_fields if f"{name}:" not in text] == []


def test_what_follows_from_profile_and_study() -> None:
    dist = DistSettings(timeout_minutes=90, num_threads=3, num_workers=2)
    assert (Site().minutes(dist), Site(time_minutes=4).minutes(dist)) == (90, 4)
    assert (Site().delay_seconds(dist), Site(time_minutes=1).delay_seconds(dist)) == (120, 15)
    assert (Site().cpus(dist), Site(cpus_per_task=7).cpus(dist)) == (5, 7)
    lines = Site(
        modules=["a b"], setup=["export NCCL_DEBUG=WARN"], scratch_dir="/s/$USER", network_interface="ib0"
    ).shell_lines(dist)
    assert lines == [
        "module load 'a b'",
        "export NCCL_DEBUG=WARN",
        'export TMPDIR="/s/$USER"',
        'mkdir -p "$TMPDIR"',
        "export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0",
        "export OMP_NUM_THREADS=3",
    ]


def test_contradictions_with_the_study() -> None:
    cuda = Config(dist=DistSettings(device="cuda", tasks_per_node=4))
    assert "asks for no GPUs" in site_contradictions(Site(), cuda)[0]
    assert site_contradictions(Site(gpus_per_node=2), cuda) == [
        "dist.tasks_per_node = 4: should be the site profile's gpus_per_node, 2, as a rank uses one; set "
        "dist.tasks_per_node=2 in the study, or gpus_per_node: 4 in the profile"
    ]
    assert site_contradictions(Site(gpus_per_node=4), cuda) == []


def test_gpus_that_no_rank_would_use_are_refused() -> None:
    assert site_contradictions(Site(gpus_per_node=8), Config()) == [
        "dist.tasks_per_node = 1: should be the site profile's gpus_per_node, 8, as a rank uses one; set "
        "dist.tasks_per_node=8 in the study, or gpus_per_node: 1 in the profile"
    ]
    assert site_contradictions(Site(gpus_per_node=8), Config(dist=DistSettings(tasks_per_node=8))) == []
    assert site_contradictions(Site(gpus_per_node=1), Config()) == []
    assert site_contradictions(Site(gpus_per_node=8), Config(dist=DistSettings(device="cpu"))) == []


def test_cpu_jobs_hold_no_gpu_and_have_their_own_keys() -> None:
    own = StageSite(partition="cpu", cpus=8, constraint="")
    options = {"gres": "gpu:2", "gpus-per-task": 1, "mail-type": "END"}
    site = Site(partition="gpu", qos="q", constraint="a100", gpus_per_node=4, sbatch=options, stages={"search": own})
    assert site.for_stage("train") is site
    for stage in ("search", "report"):
        cpu = site.for_stage(stage)
        asked = (cpu.partition, cpu.qos, cpu.constraint, cpu.gpus_per_node, cpu.cpus_per_task, cpu.sbatch)
        assert asked == ("cpu", "q", "", 0, 8, {"mail-type": "END"})
    other = site.model_copy(update={"stages": {"search": own, "report": StageSite(partition="tiny")}})
    assert other.for_stage("report").partition == "tiny"


def test_lines_of_setup_may_have_line_breaks(tmp_path: Path) -> None:
    assert load_site(write(tmp_path, 'setup: ["if true\\nthen true; fi"]')).setup == ["if true\nthen true; fi"]


def test_retry_takes_only_an_unchanged_own_profile(tmp_path: Path) -> None:
    path, study_dir = write(tmp_path, "setup: [touch x]"), tmp_path / "runs" / "study"
    source = load_site(path).source
    assert source is not None
    assert load_last_site(source, study_dir) == load_site(path)
    assert load_last_site(None, study_dir) == Site()
    refusal = f"the site profile of the last submission, {path}, is missing, has changed or belongs to another user; "
    refusal += "name the profile with --site SITE.yaml"

    def refused(source: dict[str, Any]) -> str:
        with pytest.raises(UserError) as error:
            load_last_site(source, study_dir)
        return str(error.value)

    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
        assert refused(source) == refusal
        os.chown(path, 0, -1)
    inside = study_dir / "site.yaml"  # comes with a copied run folder
    inside.parent.mkdir(parents=True)
    inside.write_bytes(path.read_bytes())
    assert str(inside) in refused({**source, "path": str(inside)})
    write(tmp_path, "setup: [touch y]")
    assert refused(source) == refusal
    path.unlink()
    assert refused(source) == refusal
    assert "--site" in refused({"partition": "gpu", "setup": ["touch x"]})  # the text that earlier versions kept
