"""The authors' recorded points: which study they belong to, and that each is a possible one."""

import csv

import pytest

from dynexit.report.published import _FILE, _STUDIES, published_points


@pytest.mark.parametrize("key", _STUDIES, ids=lambda key: "-".join(map(str, key)))
def test_every_recorded_point_costs_less_than_the_whole_backbone(key: tuple[str, str, int]) -> None:
    points = published_points(*key)
    assert {"jei_dnn", "boosted", "weighted"} <= {point.method for point in points}
    assert all(0 < point.accuracy < 1 for point in points)
    assert all(0.1 < point.relative_macs < 1 for point in points)
    for method in ("boosted", "weighted"):
        costs = [point.relative_macs for point in points if point.method == method]
        assert len(costs) == 39  # the steps of MSDNet's procedure
        assert costs == sorted(costs)


def test_a_point_is_as_in_the_authors_file() -> None:
    (point,) = [p for p in published_points("cifar10", "t2t_vit_7", 224) if p.accuracy == pytest.approx(0.9413)]
    assert point.method == "jei_dnn"
    assert point.relative_macs == pytest.approx(10.9497 / 13.502)


def test_all_59_points_of_jei_dnn_belong_to_a_study() -> None:
    with _FILE.open(newline="") as file:
        recorded = [row for row in csv.DictReader(file) if row["method"] == "jei_dnn"]
    matched = [point for key in _STUDIES for point in published_points(*key) if point.method == "jei_dnn"]
    assert len(recorded) == len(matched) == 59


def test_other_data_sets_backbones_sizes_and_tests_have_none() -> None:
    assert published_points("digits", "t2t_vit_7", 224) == []
    assert published_points("cifar10", "resnet18", 224) == []
    assert published_points("cifar10", "t2t_vit_7", 32) == []
    assert published_points("cifar100_lt", "t2t_vit_7", 224, thin_test=False) == []
    assert published_points("cifar100_lt", "t2t_vit_7", 224, thin_test=True)
