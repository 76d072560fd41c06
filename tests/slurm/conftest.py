"""A cluster of three nodes for the tests of this folder, and how they talk to it."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.command_line import ENVIRONMENT, ROOT, TINY, dynexit
from tests.conftest import require

DEVCLUSTER = ROOT / "slurm" / "devcluster"
SITE = ROOT / "slurm" / "sites" / "devcluster.yaml"


def wait_until(condition: Callable[[], object], what: str, seconds: float = 240) -> None:
    """Returns when `condition` holds; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}\n{Cluster.squeue('-t', 'all')}"
        time.sleep(0.3)


class Cluster:
    """Commands of the running cluster, and studies submitted to it from `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    @classmethod
    def squeue(cls, *options: str) -> str:
        return cls.run("squeue", "--array", "--noheader", *options)

    def submit(self, *overrides: str, jobs: str = "run", site: Path = SITE, study: Path = TINY) -> str:
        """Submits the study, all of it or up to `jobs`; what was printed."""
        return dynexit(self.folder, jobs, study, *overrides, "--on", "slurm", "--site", site).stdout

    def status(self, *overrides: str) -> str:
        return dynexit(self.folder, "status", TINY, *overrides).stdout

    def job(self, name: str) -> str:
        """The id of the job whose name is `name`."""
        return self.squeue("--name", name, "--format=%A").split()[0]

    def wait_for_the_end(self, seconds: float = 400) -> None:
        wait_until(lambda: not self.squeue(), "an empty queue", seconds)

    def ends(self, study: str) -> list[str]:
        """Why jobs of the study ended before they were through, in order."""
        files = sorted((self.folder / "runs" / study / "slurm").glob("*/*.ends"))
        return [line.split()[0] for file in files for line in file.read_text().splitlines()]

    def wait_for_step(self, study: str, step: int) -> None:
        """Returns when the training has come to that step or further."""

        def reached() -> bool:
            logs = list((self.folder / "runs" / study / "pack").glob("*/log.txt"))
            steps = [
                int(line.split(" step ")[1].split("/")[0])
                for log in logs
                for line in log.read_text().splitlines()
                if " step " in line
            ]
            return max(steps, default=-1) >= step

        wait_until(reached, f"step {step} of {study}")


@contextlib.contextmanager
def started(offset: int = 0, **settings: str) -> Iterator[Path]:
    """A cluster that all commands go to until the block ends, its ports `offset` away from others'; its folder."""
    programs = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "slurmdbd", "mariadbd")
    missing = [name for name in programs if shutil.which(name) is None]
    require(not missing, f"SLURM is not installed (no {', '.join(missing)}; slurm/devcluster/install.sh)")
    require(os.geteuid() == 0, "only root may start the cluster")
    folder = Path(tempfile.mkdtemp(prefix="dx"))  # short, and open: there are sockets in it
    folder.chmod(0o755)
    port = str(20000 + os.getpid() % 20000 // 8 * 8 + offset)  # another cluster may be up on this machine
    environment = {**ENVIRONMENT, "DEVCLUSTER": str(folder / "c"), "CPUS": "2", "PORT": port, **settings}
    before = os.environ.get("SLURM_CONF")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # who is told to end takes the cluster down first
    try:
        subprocess.run([DEVCLUSTER / "up.sh"], env=environment, check=True, timeout=120)
        ENVIRONMENT["SLURM_CONF"] = os.environ["SLURM_CONF"] = str(folder / "c" / "slurm.conf")
        yield folder / "c"
    finally:
        subprocess.run([DEVCLUSTER / "down.sh"], env=environment, check=True, timeout=120)
        for names in (os.environ, ENVIRONMENT):
            names.pop("SLURM_CONF", None)
            names.update({} if before is None else {"SLURM_CONF": before})
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def running() -> Iterator[Path]:
    """The folder of a running cluster with a small MaxArraySize and without accounting."""
    with started(EXTRA_CONF="MaxArraySize=5") as folder:
        yield folder


@pytest.fixture
def cluster(running: Path, work: Path) -> Iterator[Cluster]:
    """The cluster with an empty queue before and after."""
    yield Cluster(work)
    names = subprocess.run(["squeue", "-h", "-o", "%A"], capture_output=True, text=True, check=False).stdout.split()
    if names:
        subprocess.run(["scancel", *names], check=False)
        wait_until(lambda: not Cluster.squeue(), "an empty queue")


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all studies run."""
    return tmp_path_factory.mktemp("work")


LONG = ("sweep.jei_dnn.ce_ic_tradeoff=[1]", "train.num_epochs=40", "train.global_batch_size=20", "report.mlflow=false")


@pytest.fixture(scope="session")
def long_reference(work: Path) -> Path:
    """A study of half a minute's training that nothing disturbed."""
    dynexit(work, "run", TINY, *LONG, "dist.checkpoint_seconds=1000", "name=long")
    return work / "runs" / "long"


@pytest.fixture
def long_study(long_reference: Path, request: pytest.FixtureRequest) -> Callable[..., tuple[str, ...]]:
    """Makes the overrides of a copy of it, under another name, in which only the backbone is there."""

    def begin(name: str, *more: str) -> tuple[str, ...]:
        shutil.copytree(long_reference / "prepare", long_reference.parent / name / "prepare")
        return (*LONG, f"name={name}", *(more or ("dist.checkpoint_seconds=1000",)))

    return begin
