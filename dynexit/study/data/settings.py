"""The section `data`: where images come from, how they are divided into splits and transformed."""

from typing import Any, Literal

from dynexit.study.data.names import DATA_SETS, OWN, TORCHVISION_SETS
from dynexit.study.keys import DataSetName, MeanAndStd, Section, key

_LARGEST_SMALL = 64  # pixels a side


class DataSettings(Section):
    name: DataSetName = key(
        "digits",
        f"data set: {', '.join(DATA_SETS)}, torchvision's {', '.join(TORCHVISION_SETS)} (case and underscores do not "
        "matter), or timm's, as hfds/NAME",
    )
    dir: str | None = key(None, "folder that holds the data set's files", changes_results=False)
    download: bool = key(False, "whether a missing data set is fetched and put into dir", changes_results=False)
    seed: int = key(0, "split, views, augmentation, batch order, and the backbone's initialisation", ge=0, lt=2**31)
    num_classes: int | None = key(
        None, "classes, where the data set's name or its folders do not say it (timm's), or a part of ImageNet", ge=2
    )
    class_order: str | None = key(
        None,
        "order of the class folders: torchvision (as strings), timm (naturally, without case), or a file with one name "
        "per line; null takes torchvision's, and is refused where timm's differs and prepare.num_epochs is 0",
        min_length=1,
        omit_default=True,
    )
    labels: str | None = key(
        None,
        "CSV file with the columns file (below dir) and label, and maybe split (train, val, test), for an image_folder "
        "without class folders",
        min_length=1,
        omit_default=True,
    )
    channels: Literal[1, 3] | None = key(
        None,
        "channels of the images that the backbone sees: 1 makes grey images of colour ones, 3 copies grey; null takes "
        "the data set's own, 3 for folders and timm's",
        omit_default=True,
    )
    image_size: int = key(32, "height and width of the images the backbone sees", "pixels", ge=8)
    transform: Literal["pad_crop", "timm", "none"] | None = key(
        None, "augmentation: random crop of the padded image and flip, timm's, or none; null takes the data set's own"
    )
    train_transform: dict[str, Any] = key(
        dict, "arguments of timm.data.create_transform for training images, as auto_augment, scale, re_prob"
    )
    test_transform: dict[str, Any] = key(
        dict, "arguments of timm.data.create_transform for validation and test images, as crop_pct, interpolation"
    )
    normalisation: Literal["none", "cifar10", "cifar100", "imagenet", "half", "clip"] | MeanAndStd | None = key(
        None,
        "mean and standard deviation that colours are brought to 0 and 1 by: a name, or numbers of the full intensity "
        "as [[0.49, 0.48, 0.45], [0.25, 0.24, 0.26]]; null takes the data set's own",
    )
    num_train_views: int = key(8, "fixed random views made of each training image (digits)", ge=1)
    num_evaluation_views: int = key(3, "fixed random views made of each validation and test image (digits)", ge=1)
    num_validation: int = key(
        300, "original images held out of training for validation (folders with val and test have theirs)", ge=1
    )
    num_test: int = key(
        400, "original images held out for the test (data sets with a test split of their own have theirs)", ge=1
    )
    imbalance_factor: float = key(
        0.01, "images of the rarest class (cifar100_lt)", "of the commonest class", ge=0.002, le=1
    )
    thin_test: bool = key(False, "whether the test images are thinned by the same law (cifar100_lt)")
    train_split: str = key("train", "name of the split trained on (timm's)", min_length=1)
    test_split: str | None = key(
        "validation", "name of the split tested on (timm's); null holds num_test images out of the other", min_length=1
    )
    check_images: Literal["none", "headers", "pixels"] | None = key(
        None,
        "what is read of every image, once, before the backbone is fitted; null: headers of an image_folder, else "
        "none; pixels finds damage inside them; files that did not change since are not read again "
        "(alpha is dropped, palettes and CMYK become RGB, integers are scaled by their depth, EXIF rotation ignored)",
        changes_results=False,
    )
    cache: Literal["auto", "memory", "none"] = key(
        "auto",
        "whether decoded images stay in memory (uint8, in each rank; the results are the same): auto keeps a split of "
        "at most 2 GiB and a quarter of the memory available, memory keeps every split",
        changes_results=False,
    )
    noise: float = key(0.1, "standard deviation of the noise added to a view (digits)", "of the full intensity", ge=0)

    @property
    def is_small(self) -> bool:
        """Whether the images have at most 64 pixels a side: a crop to 87.5 % of so few would lose too much."""
        return self.image_size <= _LARGEST_SMALL

    @property
    def is_folder(self) -> bool:
        """Whether the images are those of class folders, or timm's: of no data set with transforms of its own."""
        is_timms = "/" in self.name and not self.name.startswith(OWN)
        return (self.name == "image_folder" and self.labels is None) or is_timms
