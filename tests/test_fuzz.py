"""Some trials of the fuzzer: damaged input of every kind ends in one error message."""

import pytest

from tests.fuzz import TARGETS, fuzz


@pytest.mark.slow
def test_damaged_input_ends_in_one_error_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz(num_trials=200, seed=0, targets=list(TARGETS)) == 0, capsys.readouterr().out
