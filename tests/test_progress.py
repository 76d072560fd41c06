"""What a long job says: where it is, and what it waits for."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynexit import progress as progress_module
from dynexit.progress import Progress


class Clock:
    """Time that the test lets pass."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def strftime(self, text: str) -> str:
        return ""


@pytest.mark.parametrize(("loading", "shown"), [(0.05, ""), (0.06, ", 6 % of the time waiting for data"), (0.0, "")])
def test_a_notable_wait_for_data_is_shown(
    loading: float, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)

    def batches() -> Iterator[int]:
        for i in range(4):
            clock.now += loading
            yield i

    progress = Progress("train", tmp_path, 0.5)
    progress.start(4)
    for _ in progress.awaited(batches()):
        clock.now += 1 - loading
        progress.advance(10, {"loss": 0.5})
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[-1] == f"train: step 4/4 loss 0.5000 10 images/s 0 s left{shown}"
    assert json.loads((tmp_path / "progress.json").read_text())["share_waiting_for_data"] == pytest.approx(loading)
