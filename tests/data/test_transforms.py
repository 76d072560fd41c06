"""Transforms against what they are in plain numpy, and what is said of wrong arguments."""

import typing

import numpy as np
import pytest
import torch
from PIL import Image

from dynexit.data import describe_data, transforms
from dynexit.data.images import kept_random_state
from dynexit.data.transforms import GREY, NORMALISATIONS, RECIPES, check_colours, train_transform
from dynexit.errors import UserError
from dynexit.study.data.names import DATA_SETS
from dynexit.study.schema import DataSettings
from tests.data.on_disk import random_pixels

PIXELS = random_pixels(1, seed=5)[0]
IMAGE = Image.fromarray(PIXELS)


def normalised(pixels: np.ndarray, name: str) -> torch.Tensor:
    mean, std = (np.array(values)[:, None, None] for values in NORMALISATIONS[name])
    return torch.from_numpy((pixels.transpose(2, 0, 1) / 255.0 - mean) / std).float()


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == torch.float32 and torch.allclose(one, other, atol=1e-6)


def test_the_schema_and_the_tables_name_the_same() -> None:
    assert set(RECIPES) == {*DATA_SETS, "timm"} - set(GREY)
    assert set(GREY) < set(DATA_SETS)
    names = typing.get_args(typing.get_args(DataSettings.model_fields["normalisation"].annotation)[0])
    assert set(names) == set(NORMALISATIONS)


def test_colours_other_than_those_of_weights_that_stay_are_refused() -> None:
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    for fits in (DataSettings(name="imagenet", normalisation="half"), DataSettings(name="digits")):
        check_colours(fits, half)
    check_colours(DataSettings(name="imagenet"), {"input_size": (3, 8, 8)})
    with pytest.raises(UserError) as caught:
        check_colours(DataSettings(name="imagenet"), half)
    assert str(caught.value) == (
        "data.normalisation = imagenet: the backbone's weights were trained with mean (0.5, 0.5, 0.5) and standard "
        "deviation (0.5, 0.5, 0.5); set data.normalisation=half"
    )
    with pytest.raises(UserError, match=r"fine-tune it \(prepare\.num_epochs\)$"):
        check_colours(DataSettings(name="svhn"), {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)})


@pytest.mark.parametrize(
    ("name", "normalisation"),
    [("cifar10", "cifar10"), ("cifar100", "cifar100"), ("cifar100_lt", "cifar100"), ("svhn", "none")],
)
def test_small_test_images_are_normalised_as_published(name: str, normalisation: str) -> None:
    assert close(transforms.test_transform(DataSettings(name=name))(IMAGE), normalised(PIXELS, normalisation))
    other = transforms.test_transform(DataSettings(name=name, normalisation="half"))(IMAGE)
    assert close(other, normalised(PIXELS, "half"))


def test_small_training_images_are_crops_of_the_padded_image_half_of_them_flipped() -> None:
    transform, is_random = train_transform(DataSettings(name="cifar10"))
    assert is_random
    padded = np.pad(PIXELS, ((4, 4), (4, 4), (0, 0)))
    crops = {(r, c): padded[r : r + 32, c : c + 32] for r in range(9) for c in range(9)}
    possible = {
        (r, c, flip): normalised(crop[:, ::-flip], "cifar10") for (r, c), crop in crops.items() for flip in (1, -1)
    }
    seen = []
    with kept_random_state():
        torch.manual_seed(0)
        for _ in range(120):
            image = transform(IMAGE)
            found = [name for name, expected in possible.items() if close(image, expected)]
            assert len(found) == 1
            seen += found
    rows, columns, flips = (set(values) for values in zip(*seen, strict=True))
    assert rows == columns == set(range(9))
    assert flips == {1, -1}


def test_the_padding_is_28_of_224_pixels() -> None:
    transform, _ = train_transform(DataSettings(name="cifar100", image_size=224))
    crop = next(step for step in transform.transforms if hasattr(step, "padding"))
    assert (crop.size, crop.padding) == ((224, 224), 28)
    assert (
        transform(IMAGE).shape
        == transforms.test_transform(DataSettings(name="cifar100", image_size=224))(IMAGE).shape
        == (3, 224, 224)
    )


@pytest.mark.parametrize("name", ["svhn", "cifar10", "imagenet", "torch/mnist"])
def test_no_augmentation_is_the_transform_of_the_test(name: str) -> None:
    transform, is_random = train_transform(DataSettings(name=name, transform="none"))
    assert not is_random
    assert torch.equal(transform(IMAGE), transforms.test_transform(DataSettings(name=name))(IMAGE))
    assert not train_transform(DataSettings(name="svhn"))[1]


def test_timm_s_arguments_reach_timm() -> None:
    imagenet = DataSettings(name="imagenet", image_size=48)
    assert "AutoAugment" in str(train_transform(imagenet)[0])
    changed = imagenet.model_copy(update={"train_transform": {"auto_augment": "rand-m9-n3", "re_prob": 0.25}})
    steps = str(train_transform(changed)[0])
    assert "RandAugment(n=3" in steps
    assert "RandomErasing" in steps
    assert "AutoAugment" not in str(train_transform(DataSettings(name="image_folder"))[0])
    squeezed = transforms.test_transform(
        imagenet.model_copy(update={"test_transform": {"crop_pct": 1.0, "crop_mode": "squash"}})
    )
    assert squeezed(IMAGE).shape == (3, 48, 48)
    assert "Resize(size=(54, 54)" in str(transforms.test_transform(imagenet)).replace("size=54", "size=(54, 54)")
    assert "CenterCrop" in str(
        transforms.test_transform(DataSettings(name="cifar10", test_transform={"crop_pct": 0.9}))
    )


def test_small_images_in_folders_keep_their_borders() -> None:
    small = DataSettings(name="image_folder", image_size=32, normalisation="none")
    assert close(transforms.test_transform(small)(IMAGE), normalised(PIXELS, "none"))
    assert "padding=4" in str(train_transform(small)[0]).replace("padding=[4, 4, 4, 4]", "padding=4")
    for keys in ({"transform": "timm"}, {"train_transform": {"hflip": 0}}):
        asked = small.model_copy(update=keys)
        assert "RandomResizedCrop" in str(train_transform(asked)[0])
        assert close(transforms.test_transform(asked)(IMAGE), normalised(PIXELS, "none"))
    for large in (small.model_copy(update={"image_size": 65}), DataSettings(name="imagenet")):
        assert "CenterCrop" in str(transforms.test_transform(large))
    assert "CenterCrop" in str(transforms.test_transform(small.model_copy(update={"test_transform": {"crop_pct": 1}})))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"train_transform": {"auto_augmentation": "original"}},
            "data.train_transform.auto_augmentation: timm's transform has no such argument here; did you "
            "mean auto_augment?",
        ),
        (
            {"test_transform": {"mean": [0.5]}},
            "data.test_transform.mean: timm's transform has no such argument here; known",
        ),
        (
            {"train_transform": {"auto_augment": "best"}},
            "data.train_transform = {'auto_augment': 'best', 'interpolation':",
        ),
        ({"train_transform": {"scale": 3}}, "timm refuses it"),
        (
            {"name": "cifar10", "train_transform": {"re_prob": 0.1}},
            "data.train_transform = {'re_prob': 0.1}: these are arguments of timm's transform, and the transform of "
            "cifar10 is pad_crop; remove them or set data.transform=timm",
        ),
    ],
)
def test_wrong_arguments_are_named(keys: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        describe_data(DataSettings.model_validate({"name": "imagenet", **keys}))
    assert expected in str(caught.value)


def test_the_strongest_posterize_is_black_and_no_error() -> None:
    data = DataSettings(name="image_folder", train_transform={"auto_augment": "rand-m10-mstd0-inc1", "hflip": 0})
    transform, _ = train_transform(data)
    posterize = [op for op in transform.transforms[1].ops if op.name == "PosterizeIncreasing"]
    assert len(posterize) == 1
    posterize[0].prob = 1.0
    assert np.asarray(posterize[0](IMAGE)).max() == 0
    posterize[0].magnitude = 5  # keeps 2 of 8 bits
    assert np.array_equal(np.asarray(posterize[0](IMAGE)), PIXELS & 0b11000000)
