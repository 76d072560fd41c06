"""What a long job says: where it is, and what it waits for."""

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dynexit import progress as progress_module
from dynexit.memory import peak_memory_bytes
from dynexit.progress import Progress, finished_loads, job_speed


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


def test_a_job_ends_with_its_speed_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    monkeypatch.setattr(progress_module, "peak_memory_bytes", lambda: 3 << 20)
    finished_loads.clear()
    assert job_speed() == {}

    def batches(seconds: float) -> Iterator[int]:
        for i in range(4):
            clock.now += seconds
            yield i

    for name, num_ranks, loading in (("train", 2, 0.25), ("record test", 1, 0.75)):
        progress = Progress(name, tmp_path, 1e9, num_ranks=num_ranks)
        progress.start(4)
        for _ in progress.awaited(batches(loading)):
            clock.now += 1 - loading
            progress.advance(10, {})
        progress.finish()
    Progress("search", tmp_path, 1e9).finish()  # loads no images
    said = "% of the time waiting for data, at most 3 MiB of memory"
    assert [line.strip() for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        f"train: 40 images in 4.0 s: 10 images/s (5 a rank), 25 {said}",
        f"record test: 40 images in 4.0 s: 10 images/s, 75 {said}",
    ]
    assert job_speed() == {"images_per_second_per_rank": 7.5, "share_waiting_for_data": 0.5}
    finished_loads.clear()


def test_peak_memory_rises_with_what_is_allocated() -> None:
    before = peak_memory_bytes()
    kept = []
    while peak_memory_bytes() < before + (32 << 20):  # what was given back since the peak comes first
        kept.append(bytearray(16 << 20))
        assert 16 * len(kept) << 20 < before + (1 << 30)
    assert abs(peak_memory_bytes() - psutil.Process().memory_info().rss) < 64 << 20
    kept.clear()
    assert peak_memory_bytes() >= before + (32 << 20)
