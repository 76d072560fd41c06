"""The command that compares core with recorded cases: it passes on the project's copy, and cannot pass by accident."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dynexit.core import losses
from tests.reference.check_cases import check_file

SCRIPT = Path(__file__).parents[1] / "reference" / "check_cases.py"
CASES = SCRIPT.with_name("jei_dnn_cases.npz")


def arrays_of(*cases: str) -> dict[str, np.ndarray]:
    with np.load(CASES, allow_pickle=False) as file:
        return {key: file[key] for key in file.files if key.split("/")[0] in cases}


def check(arrays: dict[str, np.ndarray], tmp_path: Path) -> tuple[int, list[str]]:
    path, said = tmp_path / "cases.npz", []
    np.savez(path, **arrays)
    return check_file(str(path), said.append), said


def test_the_projects_copy_is_met() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), str(CASES)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "11 cases, 388 outputs checked, 0 differ\n"), done.stderr


KEYS = [key for key in arrays_of("case03", "case05", "thr1") if "/out/" in key]


@pytest.mark.parametrize("key", KEYS)
def test_every_output_is_compared(key: str, tmp_path: Path) -> None:
    arrays = {name: array for name, array in arrays_of(key.split("/")[0]).items() if "/in/" in name or name == key}
    assert check(arrays, tmp_path) == (0, ["1 cases, 1 outputs checked, 0 differ"])
    original = arrays[key]
    if original.dtype == bool:
        arrays[key] = ~original
    elif original.dtype.kind == "i":
        arrays[key] = original + (np.arange(original.size) == 0).reshape(original.shape)
    else:
        step = 1e-4 * max(1, np.abs(original[np.abs(original) < 1e8]).max())
        arrays[key] = original + (1e3 if "/sets_" in key or "/ece_" in key else step)  # these may lie in a range
    status, said = check(arrays, tmp_path)
    assert status == 1
    assert said[0].startswith("1 cases, 1 outputs checked, ")
    assert said[1].startswith(f"  {key}: ")


def test_shape_nan_and_unknown_outputs_are_reported(tmp_path: Path) -> None:
    arrays = arrays_of("case05")
    arrays["case05/out/warmup_loss"] = arrays["case05/out/warmup_loss"] * np.nan
    arrays["case05/out/scores"] = arrays["case05/out/scores"][:1]
    arrays["case05/out/surprise"] = np.zeros(1)
    status, said = check(arrays, tmp_path)
    assert status == 1
    assert said == [
        "1 cases, 47 outputs checked, 3 differ",
        "  case05/out/warmup_loss: max error nan, allowed nan",
        "  case05/out/scores: shape (3, 54), expected (1, 54)",
        "  case05/out/surprise: unknown output, not checked",
    ]


def test_losses_that_are_not_finite_where_the_published_one_is_nan_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = arrays_of("edge_nan")
    assert check(arrays, tmp_path) == (0, ["1 cases, 2 outputs checked, 0 differ"])
    monkeypatch.setattr(losses, "head_loss", lambda logits, *_: logits.sum((1, 2, 3)) * torch.nan)
    status, said = check(arrays, tmp_path)
    assert status == 1
    assert said[1] == "  edge_nan/out/cls_weighted_loss or _grad: head loss 'reference' is not finite"


def test_nothing_checked_is_not_a_pass(tmp_path: Path) -> None:
    inputs = {key: array for key, array in arrays_of("case05").items() if "/in/" in key}
    expected = ["1 cases, 0 outputs checked, 2 differ", "  case05: no outputs to check", "  nothing was checked"]
    assert check(inputs, tmp_path) == (1, expected)
    assert check({}, tmp_path) == (1, ["0 cases, 0 outputs checked, 1 differ", "  nothing was checked"])
    outputs = {key: array for key, array in arrays_of("case05").items() if "/out/" in key}
    status, said = check(outputs, tmp_path)
    assert status == 1
    assert said[1] == "  case05: cannot be computed: KeyError: 'logits'"


def one_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


UNUSABLE = [None, b"", b"PK\x03\x04 no archive", b"no archive at all", one_array(), CASES.read_bytes()[:100_000]]


@pytest.mark.parametrize("content", UNUSABLE, ids=["missing", "empty", "zip", "text", "npy", "truncated"])
def test_unusable_files_are_status_2(content: bytes | None, tmp_path: Path) -> None:
    path, said = tmp_path / "bad.npz", []
    if content is not None:
        path.write_bytes(content)
    assert check_file(str(path), said.append) == 2
    assert len(said) == 1
    assert said[0].startswith(f"{path} cannot be read as a file of cases: ")
