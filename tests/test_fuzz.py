"""Some trials of the fuzzer: damaged input of every kind ends in one error message."""

import subprocess
import sys

import pytest

from tests.command_line import ROOT


@pytest.mark.slow
def test_damaged_input_ends_in_one_error_message() -> None:
    command = [sys.executable, "tests/fuzz.py", "--trials", "200", "--seed", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 trials with seed 0, 0 faults" in done.stdout
