"""Which transforms a data set has: two tables, and what makes transforms of their rows.

Sources: JEI-DNN (CIFAR, SVHN), DyCE (ImageNet). Validation and test never see what is random.
"""

import dataclasses
import difflib
import inspect
import itertools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from PIL import Image

from dynexit.data.images import Transform, kept_random_state
from dynexit.errors import UserError
from dynexit.study.data.names import OWN, TORCHVISION_SETS
from dynexit.study.schema import DataSettings

CROP_PADDING = 1 / 8  # of the image size: 28 of 224 pixels, and 4 of 32

# mean and standard deviation of red, green and blue, of the full intensity
NORMALISATIONS: Mapping[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = MappingProxyType(
    {
        "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.24703, 0.24348, 0.26158)),
        "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    }
)

# mean and standard deviation of sets with one grey channel: of the views at the default settings, of the 28x28 pixels
GREY: Mapping[str, tuple[float, float]] = MappingProxyType({"digits": (0.13, 0.27), "fashion_mnist": (0.286, 0.353)})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The transforms of a data set where its keys say nothing else."""

    augmentation: str  # what training adds: a value of data.transform
    normalisation: str
    is_cropped: bool = False  # test images by timm's resize and centre crop; else squeezed to the size
    train_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of timm's transform


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "cifar10": Recipe("pad_crop", "cifar10"),
        "cifar100": Recipe("pad_crop", "cifar100"),
        "cifar100_lt": Recipe("pad_crop", "cifar100"),
        "svhn": Recipe("none", "none"),
        "imagenet": Recipe("timm", "imagenet", True, {"auto_augment": "original", "interpolation": "random"}),
        "image_folder": Recipe("timm", "imagenet", True, {"interpolation": "random"}),
        "timm": Recipe("timm", "imagenet", True, {"interpolation": "random"}),
    }
)
SMALL = Recipe("pad_crop", "imagenet")
_SET_BY_OTHER_KEYS = {
    *("input_size", "is_training", "no_aug", "mean", "std", "normalize", "use_prefetcher", "separate"),
    *("tf_preprocessing", "naflex", "max_seq_len", "patchify", "patchify_channels_last", "patchify_flatten"),
    *("patch_size", "re_num_splits"),
}


def recipe_of(data: DataSettings) -> Recipe:
    """Returns how images are transformed where the keys say nothing else. Small images are not cropped for the test."""
    known = TORCHVISION_SETS.get(data.name)
    if known is not None and known.channels == 1:
        return Recipe("none", "half")
    if known is not None and known.kind == "symbols":
        return Recipe("none", "imagenet")
    if known is not None or data.name.startswith(OWN) or data.labels is not None:
        is_small = data.is_small or (known is not None and known.kind == "small")
        return SMALL if is_small else RECIPES["timm"]
    if data.is_folder and data.is_small:
        asks_for_timms = data.transform == "timm" or data.train_transform
        return dataclasses.replace(RECIPES["timm"], is_cropped=False) if asks_for_timms else SMALL
    return RECIPES["timm" if "/" in data.name else data.name]


def num_channels(data: DataSettings) -> int:
    """Returns the channels of the images that the backbone sees."""
    if data.name in GREY:
        return 1
    known = TORCHVISION_SETS.get(data.name)
    return data.channels or (3 if known is None else known.channels)


def train_transform(data: DataSettings) -> tuple[Transform, bool]:
    """The transform of training images, and whether it is random. Raises UserError for arguments it does not take."""
    recipe = recipe_of(data)
    kind = data.transform or recipe.augmentation
    if data.train_transform and kind != "timm":
        raise UserError(
            f"data.train_transform = {data.train_transform!r}: these are arguments of timm's transform, and the "
            f"transform of {data.name} is {kind}; remove them or set data.transform=timm"
        )
    if kind == "pad_crop":
        return _resize(data, padding=round(data.image_size * CROP_PADDING), flip=0.5), True
    if kind == "none":
        return test_transform(data), False
    arguments = {**(recipe.train_arguments if recipe.augmentation == "timm" else {}), **data.train_transform}
    return _timm_transform(data, "train_transform", arguments, is_training=True), True


def test_transform(data: DataSettings) -> Transform:
    """The transform of validation and test images. Raises UserError for arguments it does not take."""
    if recipe_of(data).is_cropped or data.test_transform:
        return _timm_transform(data, "test_transform", data.test_transform, is_training=False)
    return _resize(data)


def mean_and_std(data: DataSettings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and the standard deviation of each channel, of the full intensity.

    Grey images take the average of three colours. Raises UserError for numbers of another count of channels.
    """
    if data.name in GREY:
        return GREY[data.name][:1], GREY[data.name][1:]
    given, channels = data.normalisation or recipe_of(data).normalisation, num_channels(data)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    if isinstance(given, str):
        mean, std = NORMALISATIONS[given]
    else:
        mean, std = (tuple(values) for values in given)
        if len(mean) not in (1, channels):
            raise UserError(
                f"data.normalisation = {given}: has numbers of {len(mean)} channels, and the images have {channels}; "
                f"give {channels}"
            )
    if channels == 1:
        return (sum(mean) / len(mean),), (sum(std) / len(std),)
    return mean * (channels // len(mean)), std * (channels // len(std))


def check_colours(data: DataSettings, published: Mapping[str, Any]) -> None:
    """Raises UserError where weights that stay as they are were trained on colours brought to another mean and spread.

    `published` is what timm says of the weights.
    """
    mean, std = published.get("mean"), published.get("std")
    if num_channels(data) == 1 or mean is None or std is None:
        return
    pairs = zip(itertools.chain(*mean_and_std(data)), itertools.chain(mean, std), strict=True)
    if all(math.isclose(a, b, abs_tol=2e-3) for a, b in pairs):
        return
    name = next((name for name, one in NORMALISATIONS.items() if one == (mean, std)), None)
    remedy = f"set data.normalisation={name}" if name else "fine-tune it (prepare.num_epochs)"
    raise UserError(
        f"data.normalisation = {data.normalisation or recipe_of(data).normalisation}: the backbone's weights were "
        f"trained with mean {mean} and standard deviation {std}; {remedy}"
    )


def _resize(data: DataSettings, padding: int = 0, flip: float = 0.0) -> Transform:
    from torchvision import transforms

    steps = [transforms.Grayscale(1)] * (num_channels(data) == 1)
    steps.append(transforms.Resize((data.image_size, data.image_size)))
    if padding:
        steps.append(transforms.RandomCrop(data.image_size, padding))
    if flip:
        steps.append(transforms.RandomHorizontalFlip(flip))
    transform: Transform = transforms.Compose(
        [*steps, transforms.ToTensor(), transforms.Normalize(*mean_and_std(data))]
    )
    return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's strongest posterize keeps no bits: Pillow gave black for that, and newer Pillow refuses it."""
    from PIL import ImageOps

    return ImageOps.posterize(image, min(bits, 8)) if bits > 0 else Image.new(image.mode, image.size)


def _timm_transform(data: DataSettings, key: str, arguments: Mapping[str, Any], *, is_training: bool) -> Transform:
    from timm.data import auto_augment
    from timm.data.transforms_factory import create_transform
    from torchvision.transforms import Grayscale

    auto_augment.NAME_TO_OP.update({name: _posterize for name in auto_augment.NAME_TO_OP if "Posterize" in name})
    known = sorted(set(inspect.signature(create_transform).parameters) - _SET_BY_OTHER_KEYS)
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"data.{key}.{name}: timm's transform has no such argument here; {hint}")
    mean, std = mean_and_std(data)
    try:
        transform: Transform = create_transform(
            data.image_size, is_training=is_training, mean=mean, std=std, **arguments
        )
        if len(mean) == 1:
            transform.transforms.insert(0, Grayscale(1))  # type: ignore[attr-defined]
        with kept_random_state():  # tried once, so that a wrong value shows before anything starts
            shape = tuple(transform(Image.new("RGB", (2 * data.image_size, data.image_size))).shape)
    except Exception as error:  # what timm raises for a wrong value is of no one class
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"data.{key} = {dict(arguments)!r}: timm refuses it ({text})") from None
    if shape != (len(mean), data.image_size, data.image_size):
        raise UserError(f"data.{key} = {dict(arguments)!r} gives images of shape {shape} and not of data.image_size")
    return transform
