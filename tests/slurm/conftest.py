"""A cluster of three nodes for the tests of this folder, and studies that run side by side on it."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path

import pytest

from launch.tasks.attempts import COMPLETED, Attempts, read_attempts
from tests.command_line import ENVIRONMENT, ROOT, SERVER, TINY, run_in_fork
from tests.conftest import require

DEVCLUSTER = ROOT / "slurm" / "devcluster"
SITE = ROOT / "slurm" / "sites" / "devcluster.yaml"
_HANGS_SECONDS = 900  # of one wait; not a measure of speed

Condition = Callable[[], object]
Scenario = Generator[Condition, None, None]  # yields what it waits for
Call = Generator[Condition, None, str]  # the same, and returns what a command printed


class Cluster:
    """Commands of the running cluster `place`, and studies submitted to it from `folder`."""

    def __init__(self, place: Path, folder: Path) -> None:
        self.place, self.folder, self.num_calls = place, folder, 0

    @staticmethod
    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def squeue(self, *options: str) -> str:
        return self.run("squeue", "--array", "--noheader", *options)

    def study(self, name: str) -> Path:
        return self.folder / "runs" / name

    def call(self, command: str, *arguments: str | Path, status: int = 0) -> Call:
        """Runs `dynexit` on the study while other scenarios go on; returns what it printed (of an error, that)."""
        words = [command, str(TINY), *map(str, arguments)]
        self.num_calls += 1
        with tempfile.TemporaryDirectory() as printed:
            process = SERVER.Process(target=run_in_fork, args=(self.folder, words, ENVIRONMENT, Path(printed)))
            process.start()
            yield lambda: process.exitcode is not None
            self.num_calls -= 1
            out, err = ((Path(printed) / name).read_text() for name in ("out", "err"))
        assert process.exitcode == status, f"exit status {process.exitcode}\n{out}\n{err}"
        return err if status else out

    def submit(self, *overrides: str, jobs: str = "run", site: Path = SITE) -> Call:
        """Submits the study, all of it or up to `jobs`."""
        return self.call(jobs, *overrides, "--on", "slurm", "--site", site)

    def status(self, *overrides: str) -> Generator[Condition, None, list[str]]:
        """The lines of `status`: a head, a line for every point, the report, the counts."""
        return (yield from self.call("status", *overrides)).splitlines()

    def job(self, name: str) -> str:
        """The id of the job whose name is `name`."""
        return self.squeue("--name", name, "--format=%A").split()[0]

    def node(self, job: str) -> str:
        return self.squeue("--job", job, "--format=%N").strip()

    def is_live(self, study: str) -> bool:
        """Whether jobs of the study wait or run."""
        return any(line.startswith(f"{study}-") for line in self.squeue("--format=%j").splitlines())

    def is_over(self, study: str) -> Condition:
        return lambda: not self.is_live(study)

    def attempts(self, study: str, stage: str = "train") -> list[Attempts]:
        """Those of every job of a stage, in the order of submission."""
        found = []
        for path in sorted((self.study(study) / "slurm").glob("*/jobs.json")):
            for array in json.loads(path.read_text())["arrays"]:
                jobs = array["tasks"] if array["stage"] == stage else ()
                found += [read_attempts(path.parent / job) for job in jobs]
        return found

    def ends(self, study: str) -> list[str]:
        """Why attempts at trainings of the study ended before they were complete, in order."""
        ends = [end.reason for one in self.attempts(study) for end in one.ends]
        return [reason for reason in ends if reason != COMPLETED]

    def num_starts(self, study: str) -> int:
        return sum(len(one.starts) for one in self.attempts(study))

    def is_at_step(self, study: str, step: int) -> bool:
        """Whether the training has come to that step or further."""
        logs = list((self.study(study) / "pack").glob("*/log.txt"))
        lines = [line for log in logs for line in log.read_text().splitlines() if " step " in line]
        return max((int(line.split(" step ")[1].split("/")[0]) for line in lines), default=-1) >= step


def point_of(line: str) -> str:
    """The id of the point in a line of `status`."""
    found = re.search(r"\b[0-9a-f]{12}\b", line)
    assert found is not None, line
    return found[0]


def run_side_by_side(scenarios: Mapping[str, Scenario]) -> dict[str, BaseException | None]:
    """Runs all scenarios at once, each up to what it waits for; what each raised, if anything."""
    outcomes: dict[str, BaseException | None] = {}
    waits: dict[str, tuple[float, Condition]] = {name: (0.0, lambda: True) for name in scenarios}
    while waits:
        for name, (since, is_there) in list(waits.items()):
            try:
                if is_there():
                    waits[name] = (time.monotonic(), next(scenarios[name]))
                elif time.monotonic() - since > _HANGS_SECONDS:
                    raise AssertionError(f"{name} waits for ever\n{Cluster.run('squeue', '-t', 'all')}")
            except StopIteration:
                outcomes[name] = None
                del waits[name]
            except BaseException as error:
                if isinstance(error, (KeyboardInterrupt, SystemExit)):
                    raise
                outcomes[name] = error
                del waits[name]
        time.sleep(0.2)
    return outcomes


@contextlib.contextmanager
def started(**settings: str) -> Iterator[Path]:
    """A cluster that all commands go to until the block ends; its folder."""
    programs = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "slurmdbd", "mariadbd")
    missing = [name for name in programs if shutil.which(name) is None]
    require(not missing, f"SLURM is not installed (no {', '.join(missing)}; slurm/devcluster/install.sh)")
    require(os.geteuid() == 0, "only root may start the cluster")
    folder = Path(tempfile.mkdtemp(prefix="dx"))  # short, and open: there are sockets in it
    folder.chmod(0o755)
    port = str(20000 + os.getpid() % 20000 // 8 * 8)  # another cluster may be up on this machine
    environment = {**ENVIRONMENT, "DEVCLUSTER": str(folder / "c"), "CPUS": "2", "PORT": port, **settings}
    before = os.environ.get("SLURM_CONF")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the cluster is taken down first
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


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running cluster as the module's CLUSTER says, and a folder for its studies."""
    with started(**request.module.CLUSTER) as place:
        yield Cluster(place, tmp_path_factory.mktemp("work"))
