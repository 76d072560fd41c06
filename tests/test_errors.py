"""Interrupts while a compiled module is loaded, and counts in messages."""

import subprocess
import sys

import pytest

from dynexit.errors import Interrupted, UserError, counted, unmasked_interrupts

CTRL_C_WHILE_A_MODULE_IS_LOADED = """
import importlib.machinery, signal, sys
import launch.__main__ as program

load = importlib.machinery.ExtensionFileLoader.exec_module

def interrupted_load(loader, module):
    if module.__name__ == "scipy.optimize._highspy._core":  # which makes an ImportError of it
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 1e-3)
    return load(loader, module)

def call(options):
    import scipy.optimize

importlib.machinery.ExtensionFileLoader.exec_module = interrupted_load
program._call = call
sys.exit(program.main(["ui", "study.yaml"]))
"""


def test_ctrl_c_while_a_compiled_module_is_loaded() -> None:
    command = [sys.executable, "-c", CTRL_C_WHILE_A_MODULE_IS_LOADED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == "dynexit: interrupted; the same command resumes from there\n"
    assert done.returncode == 130


def test_other_errors_are_left_as_they_are() -> None:
    broken = ImportError("no such symbol")
    with pytest.raises(UserError, match="timm") as caught, unmasked_interrupts():
        raise UserError("timm is broken") from broken
    assert caught.value.__cause__ is broken
    with pytest.raises(Interrupted) as interrupt, unmasked_interrupts():
        raise UserError("timm is broken") from Interrupted("stopped by SIGTERM")
    assert str(interrupt.value) == "stopped by SIGTERM"


def test_a_count_of_one_has_a_singular_noun() -> None:
    assert [counted(count, "point") for count in (0, 1, 2)] == ["0 points", "1 point", "2 points"]
    assert [counted(count, "job is", "jobs are") for count in (1, 3)] == ["1 job is", "3 jobs are"]
