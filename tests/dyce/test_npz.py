import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dynexit.record
from dynexit.dyce.npz import convert, read_npz, write_npz
from dynexit.errors import UserError
from dynexit.record import OutputRecorder
from dynexit.record.shards import Record
from tests.reference.fake_outputs import contents, files, record_all

EXITS, BATCH, CLASSES = 4, 6, 9


def logits(batch: int = BATCH, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The backbone's (B, C), the exits' (N, B, C) and labels (B, 1)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (batch, 1), generator=generator)
    return (
        torch.randn(batch, CLASSES, generator=generator),
        torch.randn(EXITS, batch, CLASSES, generator=generator),
        labels,
    )


def slow_record(batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], topk: int) -> dict[str, np.ndarray]:
    """confs, preds (N + 1, samples, topk) and label (samples, 1) by sorting every softmax."""
    rows = [np.concatenate([np.concatenate([e.numpy(), m.numpy()[None]]) for m, e, _ in batches], axis=1)][0]
    p = np.exp(rows) / np.exp(rows).sum(-1, keepdims=True)
    preds = np.argsort(-p, -1, kind="stable")[..., :topk]
    label = np.concatenate([labels.numpy() for _, _, labels in batches])
    return {"label": label, "confs": np.take_along_axis(p, preds, -1), "preds": preds}


@pytest.mark.parametrize("layout", ["NBC", "BNC"])
@pytest.mark.parametrize("topk", [1, 3])
def test_output_recorder_keeps_what_dyce_keeps(tmp_path: Path, layout: str, topk: int) -> None:
    batches = [logits(BATCH, 1), logits(EXITS, 2), logits(BATCH, 3), logits(1, 4)]  # the second one is ambiguous
    recorder = OutputRecorder(topk=topk)
    for model_out, ee_out, label in batches:
        recorder.add_pred(model_out, ee_out if layout == "NBC" else ee_out.transpose(0, 1))
        recorder.add_label(label if topk == 1 else label[:, 0])
    returned = recorder.save(tmp_path / "new" / "record", meta_info={"model": "tiny"})
    slow = slow_record(batches, topk)
    with np.load(tmp_path / "new" / "record.npz", allow_pickle=False) as file:
        assert set(file.files) == {"label", "confs", "preds", "meta_info"} == set(returned)
        assert json.loads(str(file["meta_info"])) == {"model": "tiny"}
        assert np.array_equal(file["label"], slow["label"])
        assert np.array_equal(file["preds"], slow["preds"])
        assert file["preds"].dtype == file["label"].dtype == np.int32
        np.testing.assert_allclose(file["confs"], slow["confs"], rtol=1e-6)
    recorder.initilize()
    with pytest.raises(UserError, match=r"^predictions of 0 samples and labels of 0 were added, must be as many"):
        recorder.save(tmp_path / "again.npz")


def test_output_recorder_without_exits(tmp_path: Path) -> None:
    model_out, _, label = logits()
    recorder = OutputRecorder(1)
    recorder.add_pred(model_out)
    recorder.add_label(label)
    assert recorder.save(str(tmp_path / "record.npz"))["confs"].shape == (1, BATCH, 1)


def test_an_ambiguous_layout_is_asked_for() -> None:
    model_out, ee_out, _ = logits(EXITS)
    message = (
        r"^ee_out has shape \(4, 4, 9\), as many exits as samples, so that \(N, B, C\) and \(B, N, C\) cannot be "
        'distinguished; say which with layout="NBC" or layout="BNC"$'
    )
    with pytest.raises(UserError, match=message):
        OutputRecorder(2).add_pred(model_out, ee_out)
    found = {}
    for layout in ("NBC", "BNC"):
        by_constructor, by_call = OutputRecorder(2, layout), OutputRecorder(2)
        by_constructor.add_pred(model_out, ee_out)
        by_call.add_pred(model_out, ee_out, layout=layout)
        assert np.array_equal(by_constructor.records["preds"][0], by_call.records["preds"][0])
        found[layout] = by_call.records["preds"][0][:-1]
    assert np.array_equal(found["NBC"], ee_out.topk(2).indices)
    assert np.array_equal(found["BNC"], ee_out.transpose(0, 1).topk(2).indices)


def test_shapes_that_fit_nothing_are_refused() -> None:
    model_out, ee_out, _ = logits()
    for recorder, wrong, message in (
        (OutputRecorder(1), ee_out[:, :5], r"\(4, 5, 9\), must be \(N, 6, 9\) or \(6, N, 9\) as model_out is \(6, 9\)"),
        (OutputRecorder(1), ee_out[0], r"\(6, 9\), must be \(N, 6, 9\) or \(6, N, 9\) as"),
        (OutputRecorder(1, "BNC"), ee_out, r"\(4, 6, 9\), must be \(6, N, 9\) as"),
        (OutputRecorder(1, "NBC"), ee_out.transpose(0, 1), r"\(6, 4, 9\), must be \(N, 6, 9\) as"),
    ):
        with pytest.raises(UserError, match=f"^ee_out has shape {message}"):
            recorder.add_pred(model_out, wrong)
    with pytest.raises(UserError, match=r"^model_out has shape \(6, 9\), must be \(B, C\) with C at least 10$"):
        OutputRecorder(10).add_pred(model_out)
    with pytest.raises(UserError, match=r"^layout is 'BCN', must be one of NBC, BNC$"):
        OutputRecorder(1, "BCN")


def test_labels_and_meta_info_are_checked(tmp_path: Path) -> None:
    model_out, ee_out, label = logits()
    recorder = OutputRecorder(1)
    recorder.add_pred(model_out, ee_out)
    with pytest.raises(UserError, match=r"^predictions of 6 samples and labels of 0 were added"):
        recorder.save(tmp_path / "r.npz")
    recorder.add_label(label)
    with pytest.raises(UserError, match=r"^meta_info cannot be written as JSON \(.*\); keep to numbers, text, lists$"):
        recorder.save(tmp_path / "r.npz", {"model": model_out})
    assert list(tmp_path.iterdir()) == []


def dyce_file(path: Path, topk: int = 2, **changes: Any) -> dict[str, np.ndarray]:
    """A file as DyCE itself writes it: int16 and, if asked for, a pickled meta_info."""
    slow = slow_record([logits(53)], topk)
    arrays = {
        "label": slow["label"].astype(np.int16),
        "confs": slow["confs"].astype(np.float32),
        "preds": slow["preds"].astype(np.int16),
        **changes,
    }
    np.savez_compressed(path, **arrays)
    return arrays


@pytest.mark.parametrize("topk", [1, 2])
def test_a_file_of_dyce_is_read(tmp_path: Path, topk: int) -> None:
    arrays = dyce_file(tmp_path / "r.npz", topk)
    record = read_npz(tmp_path / "r.npz", ["linear", "mlp1x1000"])
    assert record.rows == ((0, "linear"), (0, "mlp1x1000"), (1, "linear"), (1, "mlp1x1000"), (-1, "backbone"))
    assert np.array_equal(record.confidence("max_probability"), arrays["confs"][..., 0])
    assert np.array_equal(record.prediction(topk - 1), arrays["preds"][..., topk - 1])
    assert np.array_equal(record.correct_RN, arrays["preds"][..., 0] == arrays["label"][:, 0])
    assert np.array_equal(record.index, np.arange(53))
    assert record.gate is None
    if topk == 2:
        assert np.array_equal(record.confidence("margin"), arrays["confs"][..., 0] - arrays["confs"][..., 1])
    with pytest.raises(UserError, match=r"has no confidence 'entropy'; it has: max_probability"):
        record.confidence("entropy")
    assert read_npz(tmp_path / "r.npz").positions == (0, 1, 2, 3)


def test_a_pickled_meta_info_is_skipped_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    dyce_file(path, meta_info=np.array({"model": "tiny"}))
    with pytest.warns(UserWarning, match=f"^{path}: meta_info is pickled or not JSON and was skipped$"):
        record = read_npz(path)
    assert record.num_samples == 53
    assert record.header == {"checkpoint_sha256": None, "source": "r.npz", "meta_info": None}


def test_npz_to_shards_and_back_is_the_same(tmp_path: Path) -> None:
    source, directory, back = tmp_path / "r.npz", tmp_path / "shards", tmp_path / "back.npz"
    arrays = dyce_file(source)
    convert(source, directory, ["linear"])
    assert Record.open(directory).rows == read_npz(source, ["linear"]).rows
    convert(directory, back)
    with np.load(back, allow_pickle=False) as file:
        for name, array in arrays.items():
            assert np.array_equal(file[name], array)
    convert(back, tmp_path / "again")
    assert files(tmp_path / "again") == files(directory)


def test_shards_to_npz_and_back_lose_nothing(tmp_path: Path) -> None:
    record_all([tmp_path / "shards"])
    convert(tmp_path / "shards", tmp_path / "r.npz")
    convert(tmp_path / "r.npz", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "shards")
    record, given = Record.open(tmp_path / "shards"), read_npz(tmp_path / "r.npz")
    for kind in record.layout.statistics:
        assert np.array_equal(given.confidence(kind), record.confidence(kind))
        assert np.array_equal(given.read_row(2, kind), record.read_row(2, kind))
    assert np.array_equal(given.gate, record.gate)


def confs(value: float) -> np.ndarray:
    changed = slow_record([logits(53)], 2)["confs"].astype(np.float32)
    changed[3, 17, 0] = value
    return changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": np.zeros((52, 1), np.int16)}, "holds label (52, 1), confs (5, 53, 2) and preds (5, 53, 2), must be"),
        ({"preds": np.zeros((5, 53, 1), np.int16)}, "holds label (53, 1), confs (5, 53, 2) and preds (5, 53, 1), must"),
        ({"confs": confs(np.nan)}, ": probability holds nan, must be between 0 and 1; record it again"),
        ({"confs": confs(1.5)}, ": probability holds 1.5, must be between 0 and 1; record it again"),
        ({"label": np.full((53, 1), -3, np.int16)}, ": label must hold whole numbers from 0 up, its smallest is -3"),
        ({"preds": np.full((5, 53, 2), -1, np.int16)}, ": preds must hold whole numbers from 0 up, its smallest is -1"),
        ({"preds": np.full((5, 53, 2), 0.5)}, ": preds must hold whole numbers from 0 up, not float64"),
        ({"confs": confs(0.5).astype(complex)}, ": confs must hold floating-point numbers, not complex128"),
        ({"confs": confs(0.5).astype("U8")}, ": confs must hold floating-point numbers, not <U8"),
        ({"entropy": np.ones((5, 53), bool)}, ": entropy must hold floating-point numbers, not bool"),
        ({"gate": np.zeros((2, 53), [("a", "f4")])}, ": gate must hold floating-point numbers, not [('a', '<f4')]"),
        ({"preds": np.full((5, 53, 2), 2**63, np.uint64)}, f": preds holds {2**63}; the largest class is 2147483647"),
        ({"label": np.full((53, 1), "3")}, ": label must hold whole numbers from 0 up, not <U1"),
        ({"preds": np.array([{}])}, " cannot be read as a .npz file without pickles (Object arrays cannot be loaded"),
    ],
)
def test_a_bad_npz_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "r.npz"
    dyce_file(path, **changes)
    with pytest.raises(UserError) as error:
        read_npz(path)
    assert str(error.value).removeprefix(str(path)).lstrip().startswith(message.lstrip())
    with pytest.raises(UserError):
        convert(path, tmp_path / "shards")
    assert [found.name for found in tmp_path.iterdir()] == ["r.npz"]


def test_what_is_no_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    with pytest.raises(UserError, match=f"^there is no record {path}; give the .npz that was recorded$"):
        read_npz(path)
    path.write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"r\.npz cannot be read as a \.npz file without pickles"):
        read_npz(path)
    np.savez(path, label=np.zeros(3), other=np.zeros(3))
    with pytest.raises(UserError, match=r"r\.npz is not a DyCE record: it lacks confs, preds; it has label, other$"):
        read_npz(path)
    dyce_file(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"r\.npz cannot be read as a \.npz file without pickles"):
        read_npz(path)


def test_head_types_must_divide_the_exits(tmp_path: Path) -> None:
    dyce_file(tmp_path / "r.npz")
    message = r"has 4 exits and the backbone, which 3 head types \(a, b, c\) at every position cannot make"
    with pytest.raises(UserError, match=message):
        read_npz(tmp_path / "r.npz", ["a", "b", "c"])


def test_a_meta_info_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    record_all([tmp_path / "shards"])
    write_npz(Record.open(tmp_path / "shards"), tmp_path / "r.npz")
    with np.load(tmp_path / "r.npz") as file:
        arrays = dict(file)
    meta = json.loads(str(arrays["meta_info"]))
    meta["dynexit_record"]["layout"]["num_samples"] = 102
    np.savez(tmp_path / "r.npz", **{**arrays, "meta_info": np.array(json.dumps(meta))})
    with pytest.raises(UserError, match=r"index has shape \(103,\), must be \(102,\); record it again$"):
        read_npz(tmp_path / "r.npz")
    np.savez(tmp_path / "r.npz", **{**arrays, "meta_info": np.array('{"dynexit_record": 3}')})
    with pytest.raises(UserError, match=r"meta_info is not what write_npz makes"):
        read_npz(tmp_path / "r.npz")


def test_convert_says_what_it_cannot_do(tmp_path: Path) -> None:
    dyce_file(tmp_path / "r.npz")
    with pytest.raises(UserError, match=r"^cannot convert .*r\.npz to .*s\.npz: one must end in \.npz"):
        convert(tmp_path / "r.npz", tmp_path / "s.npz")
    convert(tmp_path / "r.npz", tmp_path / "shards")
    before = files(tmp_path)
    for source, destination in (("r.npz", "shards"), ("shards", "r.npz")):
        with pytest.raises(UserError, match=f"{destination} exists already; give another destination, or remove it"):
            convert(tmp_path / source, tmp_path / destination)
    with pytest.raises(UserError, match=r"^there is no record in .*/nowhere \(no manifest\.json\)"):
        convert(tmp_path / "nowhere", tmp_path / "new.npz")
    assert files(tmp_path) == before


def test_importing_the_room_does_not_bring_torch() -> None:
    code = "import sys, dynexit.record, dynexit.record.shards; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, check=True)
    assert done.stdout == b"False\n"
    with pytest.raises(AttributeError, match=r"^module 'dynexit\.record' has no attribute 'Recorder'$"):
        dynexit.record.Recorder  # noqa: B018


def test_classes_that_int32_cannot_hold_are_refused(tmp_path):
    path = tmp_path / "r.npz"
    arrays = {"label": np.array([[2**40]]), "confs": np.ones((2, 1, 1)), "preds": np.zeros((2, 1, 1), int)}
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=rf"{path}: label holds {2**40}; the largest class is 2147483647"):
        read_npz(path)


def test_a_compression_bomb_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "r.npz"
    np.savez(path, label=np.zeros(1), preds=np.zeros(1))
    with zipfile.ZipFile(path, "a") as archive, archive.open("confs.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (2**45,)})
    with pytest.raises(UserError, match=r"its arrays need 140737\.5 GB, [0-9.]+ GB of memory are free"):
        read_npz(path)
    dyce_file(path)
    with zipfile.ZipFile(path, "a") as archive, archive.open("meta_info.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<U9", "fortran_order": False, "shape": (2**45,)})
    with pytest.raises(UserError, match=r"its arrays need 1266637\.4 GB"):
        read_npz(path)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [(6, 1, "is encrypted, password required"), (8, 99, "That compression method is not supported")],
)
def test_encrypted_or_unknown_compression_is_one_error(tmp_path, place, value, reason):
    path = tmp_path / "r.npz"
    dyce_file(path)
    content = bytearray(path.read_bytes())
    for signature, shift in ((b"PK\3\4", 0), (b"PK\1\2", 2)):  # of every member's own and central header
        at = content.find(signature)
        while at >= 0:
            content[at + place + shift] = value
            at = content.find(signature, at + 4)
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"r\.npz cannot be read as a \.npz file without pickles \(.*{reason}"):
        read_npz(path)
