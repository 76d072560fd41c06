"""Eight ranks with uneven shares: features are kept, heads trained and outputs recorded as by one process."""

import shutil
import sys
from pathlib import Path

import pytest

from tests.command_line import TINY, digests, dynexit
from tests.launch.test_ranks import assert_close
from tests.train.ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# batches of 101 give ranks 13 or 12 images, the last batch of an epoch one of them a single one; recording has fewer
# batches than ranks
UNEVEN = ("sweep.seed=[0]", "jei_dnn.ce_ic_tradeoff=[0.1, 5]", "train.global_batch_size=101", "record.batch_size=25")
UNEVEN += ("prepare.num_epochs=1", "train.num_epochs=3", "train.features=kept", "dist.checkpoint_seconds=60")


def stages(study: Path, *names: str) -> dict[str, str]:
    """Digests of what the stages left, without logs."""
    return {name: digest for name, digest in digests(study).items() if name.partition("/")[0] in names}


def kept(folder: Path) -> dict[str, bytes]:
    """The kept features."""
    features = folder / "runs" / "features"
    return {str(path.relative_to(features)): path.read_bytes() for path in features.rglob("*.safetensors")}


def test_eight_ranks_agree_with_one_process(tmp_path: Path) -> None:
    one, eight = tmp_path / "one", tmp_path / "eight"
    one.mkdir()
    dynexit(one, "prepare", TINY, *UNEVEN)
    shutil.copytree(one, eight)
    dynexit(one, "record", TINY, *UNEVEN)
    command = [sys.executable, "-m", "launch", "record", str(TINY), *UNEVEN]
    assert run_ranks(2, [*command, f"runs_dir={eight}/runs", "train.global_batch_size=1"], may_fail=True) == [2, 2]
    run_ranks(8, [*command, f"runs_dir={eight}/runs"])
    ours, reference = eight / "runs" / "tiny_study", one / "runs" / "tiny_study"
    assert_close(ours, reference)
    assert kept(eight) == kept(one) != {}
    logs = "".join(path.read_text() for path in ours.rglob("log.txt"))
    for split, idle in (("validation", 2), ("test", 1)):
        assert f"record {split}: {idle} of 8 ranks have nothing to record" in logs
    # from these weights one process records the same bits
    again = tmp_path / "again" / "runs" / "tiny_study"
    for stage in ("prepare", "train"):
        shutil.copytree(ours / stage, again / stage)
    dynexit(tmp_path / "again", "record", TINY, *UNEVEN)
    assert stages(ours, "train") == stages(again, "train") != {}
    assert stages(ours, "record") == stages(again, "record") != {}
