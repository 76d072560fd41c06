import pytest

from dynexit.errors import UserError
from dynexit.report.published import PublishedPoint, read_published

OURS = "folder,lambda,acc_whole_test(last),cost_whole_test\nc10,1.0,80.0,8\nc10,0.1,90.0,9\nc100,0.1,70,5\n"
BASELINES = "folder,method,p_index,acc_mean_of_10_splits,cost_Mops\nc10,boosted,1,50,4\n"


def test_both_kinds_of_files_are_read_as_fractions(tmp_path):
    (tmp_path / "a.csv").write_text(OURS)
    (tmp_path / "b.csv").write_text(BASELINES)
    assert read_published(tmp_path / "a.csv", "c10", 16.0) == [
        PublishedPoint("jei_dnn", 0.8, 0.5),
        PublishedPoint("jei_dnn", 0.9, 0.5625),
    ]
    assert read_published(tmp_path / "b.csv", "c10", 16.0) == [PublishedPoint("boosted", 0.5, 0.25)]


def test_what_is_not_there_is_named(tmp_path):
    (tmp_path / "a.csv").write_text(OURS)
    with pytest.raises(UserError, match=r"a.csv has no points of 'svhn'; it has: c10, c100"):
        read_published(tmp_path / "a.csv", "svhn", 16.0)
    (tmp_path / "a.csv").write_text("folder,cost_Mops\nc10,3\n")
    with pytest.raises(UserError, match=r"no column 'acc_whole_test\(last\)' or 'acc_mean_of_10_splits'"):
        read_published(tmp_path / "a.csv", "c10", 16.0)
