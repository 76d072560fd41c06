"""What all tests share: one thread, and what to do where a machine lacks something."""

import os
import shutil
import tempfile
from typing import Any

# before torch is imported: shared cores make more threads slower, and one thread gives the same bits everywhere
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="dynexit-tests-")  # no test leaves files in the user's

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Several workers (-n) get whole files, whose tests share fixtures, and one of them all that needs the cluster."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "cluster" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)

    return ByFile(config, log)


def require(present: bool, reason: str) -> None:
    """Skips the test where something is not present; fails it where DYNEXIT_REQUIRE_ALL=1 says that all must run."""
    if present:
        return
    if os.environ.get("DYNEXIT_REQUIRE_ALL") == "1":
        pytest.fail(f"{reason}, and DYNEXIT_REQUIRE_ALL=1 forbids to skip")
    pytest.skip(reason)


@pytest.fixture
def chromium() -> str:
    """The path of a headless browser."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    require(path is not None, "chromium is not installed")
    return str(path)
