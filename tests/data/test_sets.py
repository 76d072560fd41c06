"""What is known of a data set by its name alone, and the digits."""

import pytest
import torch

from dynexit.data import describe_data, load_data
from dynexit.errors import UserError
from dynexit.study.data.names import DATA_SETS
from dynexit.study.schema import DataSettings


def test_known_sets_are_described_without_a_folder() -> None:
    expected = {"digits": (10, 1), "cifar10": (10, 3), "cifar100": (100, 3), "cifar100_lt": (100, 3), "svhn": (10, 3)}
    expected |= {"imagenet": (1000, 3), "fashion_mnist": (10, 1)}
    assert {name: describe_data(DataSettings(name=name)) for name in DATA_SETS if name != "image_folder"} == expected
    with pytest.raises(
        UserError, match=r"^data.dir is not set; image_folder needs it: a folder with train/CLASS/IMAGE"
    ):
        describe_data(DataSettings(name="image_folder"))


def test_classes_that_do_not_fit_are_refused_before_anything_is_read() -> None:
    for name, classes in (("digits", 10), ("cifar100", 100), ("svhn", 10)):
        assert describe_data(DataSettings(name=name, num_classes=classes))[0] == classes
        with pytest.raises(UserError) as caught:
            describe_data(DataSettings(name=name, num_classes=7))
        assert str(caught.value) == f"data.num_classes = 7: {name} has {classes} classes; remove the key"


def test_unknown_names_are_refused() -> None:
    for name in ("cifar", "torch", "torch/", "jax/mnist"):
        with pytest.raises(ValueError, match=r"no data set of this name; .*known are digits, .* and of timm torch/"):
            DataSettings(name=name)
    with pytest.raises(ValueError, match=r"this name; did you mean flowers102\? known"):
        DataSettings(name="flower102")
    assert DataSettings(name="hfds/some/set").name == "hfds/some/set"


def test_wrong_transform_arguments_are_found_by_describing() -> None:
    with pytest.raises(UserError, match=r"^data.train_transform.crop: timm's transform has no such argument"):
        describe_data(DataSettings(name="imagenet", train_transform={"crop": 1}))
    with pytest.raises(UserError, match=r"^data.transform = 'timm': digits come as fixed views; remove the key$"):
        describe_data(DataSettings(transform="timm"))


def test_digits_hold_no_original_in_two_splits() -> None:
    data = load_data(DataSettings(num_train_views=2, num_evaluation_views=1, num_validation=50, num_test=60))
    origins = [set(split.origin.tolist()) for split in (data.train, data.validation, data.test)]
    assert [len(origin) for origin in origins] == [1797 - 110, 50, 60]
    assert len(set.union(*origins)) == 1797
    assert data.validation.labels.bincount().tolist() == [5] * 10
    assert (data.train.images.shape, data.train.images.dtype) == ((2 * 1687, 1, 32, 32), torch.float32)
    with pytest.raises(UserError, match=r"leave 97 of 1797 digits for training; make them smaller$"):
        describe_data(DataSettings(num_validation=1300))  # before anything is read
