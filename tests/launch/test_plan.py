"""Which configuration a study's folder belongs to."""

from pathlib import Path

import pytest

from dynexit.config_io import load_study
from dynexit.errors import UserError
from launch.plan import check_identity
from tests.command_line import TINY


def test_a_folder_belongs_to_a_configuration_once_a_job_began(tmp_path: Path) -> None:
    wrong = load_study(TINY, [f"runs_dir={tmp_path}", "data.num_validation=1400"])
    right = load_study(TINY, [f"runs_dir={tmp_path}"])
    check_identity(wrong)
    check_identity(right)
    (right.directory / "prepare").mkdir()
    with pytest.raises(UserError, match=r"data\.num_validation was 150 there and is 1400 now; choose another folder"):
        check_identity(wrong)
    check_identity(right)
