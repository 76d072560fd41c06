import numpy as np
import pytest

from dynexit.record.held_back import calibration_samples
from dynexit.study.schema import DataSettings


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_all_views_of_an_original_are_on_one_side(share: float) -> None:
    data = DataSettings(name="digits", num_validation=50, num_evaluation_views=3)
    held_back_N = calibration_samples(data, share, 150)
    assert held_back_N.sum() == round(3 * 50 * share)
    assert np.array_equal(held_back_N[:50], held_back_N[50:100])
    assert np.array_equal(held_back_N[:50], held_back_N[100:])


def test_other_data_sets_are_split_by_sample() -> None:
    held_back_N = calibration_samples(DataSettings(name="cifar10", num_validation=300), 0.25, 1000)
    assert held_back_N.sum() == 250
    assert held_back_N[:500].any()
    assert held_back_N[500:].any()


def test_a_share_of_none_holds_nothing_back_and_any_other_leaves_both_sides_one() -> None:
    data = DataSettings(name="cifar10")
    assert not calibration_samples(data, 0.0, 7).any()
    assert calibration_samples(data, 1e-9, 7).sum() == 1
    assert calibration_samples(data, 0.999, 7).sum() == 6
    assert not calibration_samples(data, 0.5, 1).any()
