"""What all tests share: one thread, and what to do where a machine lacks something."""

import os
import shutil

# before torch is imported: shared cores make more threads slower, and one thread gives the same bits everywhere
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Several workers (-n) get whole files, whose tests share fixtures, and one of them the cluster."""
    for item in items:
        group = "slurm" if item.get_closest_marker("slurm") else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


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
