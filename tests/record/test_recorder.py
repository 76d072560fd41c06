import os
import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from dynexit.core.confidence import CONFIDENCES, LOGIT_CONFIDENCES
from dynexit.errors import Failure, UserError
from dynexit.record import recorder as recorder_module
from dynexit.record import shard_file
from dynexit.record.manifest import BACKBONE_ROW, Layout
from dynexit.record.plan import finish, make_plan
from dynexit.record.recorder import Recorder, statistics
from dynexit.record.shards import Record
from tests.reference.fake_outputs import (
    BATCH_SIZE,
    CLASSES,
    EXITS,
    GATES,
    LAYOUT,
    MEMBERS,
    NUM_SAMPLES,
    TOPK,
    contents,
    files,
    headers,
    outputs,
    plan,
    record_all,
    record_rank,
    slow_statistics,
)

ROOT = Path(__file__).parents[2]


def both(directory: Path) -> list[Path]:
    return [directory / "a", directory / "b"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of two members, written by one rank."""
    directory = tmp_path_factory.mktemp("whole")
    record_all(both(directory))
    return directory


def assert_same_records(directory: Path, whole: Path) -> None:
    for one, other in zip(both(directory), both(whole), strict=True):
        assert contents(one) == contents(other)
    assert not [path for path in directory.rglob("*") if path.name.startswith((".", "manifest-"))]


def test_statistics_equal_the_definitions() -> None:
    _, label, logits, _ = outputs(0, 9)
    found = statistics(logits, label, CLASSES)
    for member, row, sample in np.ndindex(MEMBERS, len(EXITS) + 1, 9):
        slow = slow_statistics(logits[member, row, sample].tolist(), int(label[sample]))
        for name, values in found.items():
            np.testing.assert_allclose(values[member, row, ..., sample].numpy(), slow[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_confidences_are_those_of_core_bit_for_bit(scale: float, dtype: torch.dtype) -> None:
    logits = (scale * torch.randn(2, 3, 17, 13, generator=torch.Generator().manual_seed(1))).to(dtype)
    found = statistics(logits, torch.zeros(17, dtype=torch.int64), 2)
    for name in LOGIT_CONFIDENCES:
        values = found["probability"][..., 0, :] if name == "max_probability" else found[name]
        assert torch.equal(values, CONFIDENCES[name].function(logits.float()))


def test_of_tied_classes_the_lower_comes_first() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    prediction = statistics(logits, torch.zeros(2, dtype=torch.int64), 5)["prediction"]
    assert prediction.T.tolist() == [[1, 2, 4, 0, 3], [1, 3, 0, 2, 4]]
    assert statistics(logits, torch.zeros(2, dtype=torch.int64), 1)["prediction"].tolist() == [[1, 1]]


def test_a_record_holds_what_the_model_said(whole: Path) -> None:
    _, label, logits, gates = outputs(0, NUM_SAMPLES)
    for member, directory in enumerate(both(whole)):
        record = Record.open(directory, headers()[member]["checkpoint_sha256"])
        assert record.rows == (*EXITS, BACKBONE_ROW)
        expected = statistics(logits[member], label, TOPK)
        for k in range(TOPK):
            assert np.array_equal(record.prediction(k), expected["prediction"][:, k])
            assert np.array_equal(record.probability(k), expected["probability"][:, k])
        for kind in ("margin", "entropy", "label_probability"):
            assert np.array_equal(record.confidence(kind), expected[kind])
        assert np.array_equal(record.gate, gates[member])
        assert np.array_equal(record.label, label)
        assert np.array_equal(record.index, np.arange(NUM_SAMPLES))
        assert np.array_equal(record.correct_RN, (logits[member].argmax(-1) == label).numpy())


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_any_world_size_records_the_same_bits(whole: Path, tmp_path: Path, world_size: int) -> None:
    planned = plan(both(tmp_path), world_size)
    with ThreadPoolExecutor(world_size) as ranks:
        written = list(ranks.map(lambda rank: record_rank(planned, rank), range(world_size)))
    finish(planned, [shard for shards in written for shard in shards])
    assert_same_records(tmp_path, whole)


def test_resumes_with_another_world_size(whole: Path, tmp_path: Path) -> None:
    planned = plan(both(tmp_path), 2)
    record_rank(planned, 0, stop_after=3)  # one shard and a half
    record_rank(planned, 1, stop_after=2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shard-*")}
    assert len(before) == 2
    planned = plan(both(tmp_path), 3)
    assert sum(last - first + 1 for share in planned.shares for first, last in share) == 13 - 4
    record_rank(planned, 2)
    record_all(both(tmp_path), 2)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_same_records(tmp_path, whole)


def test_a_complete_record_gets_its_manifest_again(whole: Path, tmp_path: Path) -> None:
    record_all(both(tmp_path))
    before = files(tmp_path)
    (tmp_path / "b" / "manifest.json").unlink()
    planned = plan(both(tmp_path), 4)
    assert planned.shares == ((), (), (), ())
    finish(planned, [])
    assert files(tmp_path) == before


def test_members_share_their_shards(whole: Path) -> None:
    assert {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()} == {
        "a/manifest.json",
        "b/manifest.json",
        "shards/manifest.json",
        *(f"shards/shard-{first:06d}-{min(first + 1, 12):06d}.safetensors" for first in range(0, 13, 2)),
    }


@pytest.mark.slow
def test_killed_recorders_resume_to_the_same_bits(whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.reference.killed_recorder", str(tmp_path), "3", "15"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    assert_same_records(tmp_path, whole)


def test_backbone_logits_may_come_once_for_all_members(tmp_path: Path) -> None:
    _, label, logits, gates = outputs(0, NUM_SAMPLES)
    logits[1, -1] = logits[0, -1]
    for name in ("apart", "together"):
        planned = plan(both(tmp_path / name))
        with Recorder(planned) as recorder:
            for batch in recorder.missing_batches():
                samples = slice(*recorder.layout.sample_range(batch))
                index = torch.arange(samples.start, samples.stop)
                if name == "together":
                    recorder.add(batch, index, label[samples], logits[:, :, samples], gates[:, :, samples])
                else:
                    exits, last = logits[:, :-1, samples], logits[0, -1, samples]
                    recorder.add(batch, index, label[samples], exits, gates[:, :, samples], backbone_logits_BK=last)
        finish(planned, recorder.shards)
    assert files(tmp_path / "apart") == files(tmp_path / "together")


def test_a_backbone_alone_without_gates(tmp_path: Path) -> None:
    _, label, logits, _ = outputs(0, 7)
    planned = make_plan([tmp_path / "r"], headers(1), Layout((), topk=1, num_gates=0, num_samples=7, batch_size=4))
    with Recorder(planned) as recorder, torch.inference_mode():
        for batch, samples in ((0, slice(0, 4)), (1, slice(4, 7))):
            index = torch.arange(samples.start, samples.stop)
            last = logits[0, -1, samples]
            recorder.add(batch, index, label[samples], torch.empty(1, 0, len(index), CLASSES), backbone_logits_BK=last)
    finish(planned, recorder.shards)
    record = Record.open(tmp_path / "r")
    assert record.rows == (BACKBONE_ROW,)
    assert record.positions == record.head_types == ()
    assert record.gate is None
    assert np.array_equal(record.prediction(), logits[0, -1:].argmax(-1))


def test_add_returns_while_a_shard_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    write = shard_file.write_shard

    def slow_write(*arguments: object) -> object:
        assert release.wait(30)
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("dynexit.record.shards.write_shard", slow_write)
    planned = plan(both(tmp_path))
    with Recorder(planned) as recorder:
        for batch in recorder.missing_batches():
            if batch == 5:
                release.set()  # without a thread we would never get here: batch 1 completes a shard
            recorder.add(batch, *outputs(*recorder.layout.sample_range(batch)))
    finish(planned, recorder.shards)
    assert Record.open(tmp_path / "a").num_samples == NUM_SAMPLES


def add_batch(directory: Path, batch: int = 0, **changes: torch.Tensor) -> None:
    with Recorder(plan(both(directory))) as recorder:
        first, stop = recorder.layout.sample_range(batch)
        index, label, logits, gates = outputs(min(first, stop - 1), stop)
        tensors = {"index_B": index, "label_B": label, "logits_MRBK": logits, "gate_MGB": gates, **changes}
        recorder.add(batch, **tensors)  # type: ignore[arg-type]


def test_a_sample_out_of_place_is_refused(tmp_path: Path) -> None:
    index = torch.tensor([8, 9, 10, 12, 11, 13, 14, 15])
    message = (
        "batch 1 brought sample 12 where sample 11 belongs; the loader must give the samples of a batch in the order "
        "of their index"
    )
    with pytest.raises(Failure, match=f"^{message}$"):
        add_batch(tmp_path, 1, index_B=index)


def test_a_label_that_is_no_class_is_refused(tmp_path: Path) -> None:
    _, label, _, _ = outputs(0, BATCH_SIZE)
    label[3] = CLASSES
    message = "sample 3 has label 11, outside 0 to 10; fix the data set or the number of classes"
    with pytest.raises(Failure, match=f"^{message}$"):
        add_batch(tmp_path, label_B=label)


def test_nan_is_refused_and_names_member_exit_and_sample(tmp_path: Path) -> None:
    _, _, logits, gates = outputs(0, BATCH_SIZE)
    logits[1, 2, 6, 4] = torch.nan
    remedy = f"its checkpoint is unsound: move it aside with `mv {tmp_path / 'b'} {tmp_path / 'b'}.damaged` and run"
    with pytest.raises(Failure) as failure:
        add_batch(tmp_path, logits_MRBK=logits)
    assert str(failure.value).startswith(
        f"exit (2, 'linear') of {tmp_path / 'b'} gave NaN or infinity for sample 6; {remedy}"
    )
    gates[0, 4, 2] = torch.inf
    with pytest.raises(Failure, match=r"^gate 4 of .*/a gave NaN or infinity for sample 2; "):
        add_batch(tmp_path, gate_MGB=gates)


def test_wrong_calls_are_refused_at_once(tmp_path: Path) -> None:
    _, label, logits, gates = outputs(0, BATCH_SIZE)
    with pytest.raises(ValueError, match=r"^logits of batch 0 has shape \(2, 6, 8, 11\), expected \(2, 7, 8, 11\)$"):
        add_batch(tmp_path, logits_MRBK=logits[:, :6])
    with pytest.raises(ValueError, match=r"^gate of batch 0 has shape None, expected \(2, 5, 8\)$"):
        add_batch(tmp_path, gate_MGB=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^label of batch 0 has shape \(7,\), expected \(8,\)$"):
        add_batch(tmp_path, label_B=label[:7])
    with pytest.raises(UserError, match=r"^topk is 3, must be at most the number of classes, 2$"):
        add_batch(tmp_path, logits_MRBK=logits[..., :2])
    with pytest.raises(ValueError, match=r"^batch 13 is not missing here, or was already added$"):
        add_batch(tmp_path, 13, index_B=label)
    with pytest.raises(ValueError, match="checkpoint_sha256"):
        Recorder(make_plan([tmp_path], [{}], LAYOUT))
    with pytest.raises(ValueError, match="several need a folder for their shards"):
        make_plan(both(tmp_path), headers(), LAYOUT)
    assert gates.shape == (MEMBERS, GATES, BATCH_SIZE)
    assert files(tmp_path) == {}


def test_a_shard_that_cannot_be_written_leaves_nothing_half_written(whole: Path, tmp_path: Path) -> None:
    record_rank(plan(both(tmp_path)), stop_after=4)
    path = tmp_path / "shards" / "shard-000004-000005.safetensors"
    planned, limits = plan(both(tmp_path)), resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "shards" / "shard-000002-000003.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
    try:
        with pytest.raises(Failure) as failure:
            record_rank(planned)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(failure.value).startswith(f"{path} could not be written: File too large; free space or ")
    assert set(files(tmp_path / "shards")) == {
        "manifest-complete.json",
        "shard-000000-000001.safetensors",
        "shard-000002-000003.safetensors",
    }
    record_all(both(tmp_path))
    assert files(tmp_path) == files(whole)


def test_an_unforeseen_error_of_the_writing_thread_reaches_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(recorder_module, "_check_finite", broken)
    with pytest.raises(Failure, match=r"^recording into .*/a failed: KeyError\('surprise'\)$"):
        record_all(both(tmp_path))


def interrupted(directory: Path) -> None:
    with Recorder(plan(both(directory))) as recorder:
        for batch in recorder.missing_batches():
            recorder.add(batch, *outputs(*recorder.layout.sample_range(batch)))
            if batch == 8:
                raise KeyboardInterrupt


def test_leaving_by_an_exception_keeps_complete_shards_only(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path)
    names = {Path(name).name for name in files(tmp_path)}
    assert all(name.startswith(("shard-", "manifest-rank0of1")) for name in names)
    assert "shard-000008-000009.safetensors" not in names
    assert all(thread.name != "recorder" for thread in threading.enumerate())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_records_what_the_cpu_records(whole: Path, tmp_path: Path) -> None:
    planned = plan(both(tmp_path))
    with Recorder(planned) as recorder:
        for batch in recorder.missing_batches():
            index, label, logits, gates = outputs(*recorder.layout.sample_range(batch))
            recorder.add(batch, index, label, logits.cuda(), gates.cuda())
    finish(planned, recorder.shards)
    on_cpu, on_gpu = Record.open(whole / "b"), Record.open(tmp_path / "b")
    for k in range(TOPK):
        assert np.array_equal(on_cpu.prediction(k), on_gpu.prediction(k))
    for kind in on_cpu.layout.statistics:
        np.testing.assert_allclose(on_cpu.confidence(kind), on_gpu.confidence(kind), atol=1e-6, rtol=0)
    assert np.array_equal(on_cpu.gate, on_gpu.gate)
