"""Images from memory against images decoded and made one by one: python tests/benchmarks/loader.py [--rounds 7].

First Fashion-MNIST's images (its idx files must be there) as `fashion_mnist` loads them, and by the transforms of
Pillow that other data sets have: medians of processor time. Then images of 224 pixels as uint8, which a GPU finishes,
and as floats. Then a folder of JPEG files of 224 pixels with data.cache
`auto`, once it is filled, and `none`, in this process and with two loading processes, whose processor time counts too.
Both sides in turn; ratios are medians of a round's.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from dynexit.data import Split, Workers, epoch_batches, load_batches, load_data
from dynexit.data.fashion_mnist import GreyImages, read_idx
from dynexit.data.images import ArraySource, TransformedImages
from dynexit.data.splits import Images
from dynexit.data.transforms import GREY, train_transform
from dynexit.study.data.names import find_fashion_mnist
from dynexit.study.schema import DataSettings

BATCH, NUM_FILES, SIDE = 128, 512, 224


def rate(images: Images, num_images: int, num_batches: int, *, as_uint8: bool = False) -> float:
    """Images per second of processor time, in random order."""
    load = images.intensities if as_uint8 else images.load  # type: ignore[attr-defined]
    batches = np.random.default_rng(0).integers(0, num_images, (num_batches, BATCH)).tolist()
    begun = time.process_time()
    for indices in batches:
        load(indices, 0)
    return num_batches * BATCH / (time.process_time() - begun)


def compare(name: str, fast: Callable[[], float], slow: Callable[[], float], rounds: int) -> None:
    """Prints the medians of both rates, taken in turn, and of their ratio."""
    pairs = [(fast(), slow()) for _ in range(rounds)]
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{name}: {medians[0]:.0f} images/s against {medians[1]:.0f}, {ratio:.1f} times", flush=True)


def fashion_mnist(rounds: int) -> None:
    pixels = read_idx(find_fashion_mnist(None), "train-images-idx3-ubyte", 3)
    batched = GreyImages(pixels, 32, GREY["fashion_mnist"], seed=0)
    source = ArraySource(np.repeat(pixels[..., None], 3, 3), np.zeros(len(pixels)))
    transform, _ = train_transform(DataSettings(name="cifar10"))
    rows = torch.arange(len(pixels))
    single = TransformedImages(source, rows, transform, seed=0)
    kept = TransformedImages(source, rows, transform, seed=0, cache="auto", image_size=32)
    one_by_one = lambda: rate(single, len(pixels), 4)  # noqa: E731
    compare("Fashion-MNIST, augmented", lambda: rate(batched, len(pixels), 40), one_by_one, rounds)
    rate(kept, len(pixels), 2000)
    compare("the same by data.cache, in colour", lambda: rate(kept, len(pixels), 40), one_by_one, rounds)


def for_a_gpu(rounds: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_FILES, SIDE, SIDE, 3), dtype=np.uint8)
    transform, _ = train_transform(DataSettings(name="cifar10", image_size=SIDE))
    source, rows = ArraySource(pixels, np.zeros(NUM_FILES)), torch.arange(NUM_FILES)
    kept = TransformedImages(source, rows, transform, seed=0, cache="memory", image_size=SIDE)
    kept.load(rows.tolist(), 0)
    as_uint8 = lambda: rate(kept, NUM_FILES, 4, as_uint8=True)  # noqa: E731
    compare("224 px, cropped and flipped, as uint8", as_uint8, lambda: rate(kept, NUM_FILES, 4), rounds)


def write_folder(root: Path) -> None:
    """Smooth images with some noise, about as large in bytes as photographs."""
    random = np.random.default_rng(0)
    for i in range(NUM_FILES):
        smooth = Image.fromarray(random.integers(0, 256, (14, 14, 3), dtype=np.uint8)).resize((SIDE, SIDE))
        noisy = np.asarray(smooth, np.int16) + random.integers(-12, 13, (SIDE, SIDE, 3))
        path = root / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def processor_seconds() -> float:
    """Of this process and its loading processes."""
    me = psutil.Process()
    return sum(times.user + times.system for times in (one.cpu_times() for one in (me, *me.children())))


def loading(split: Split, num_batches: int = 4) -> Callable[[], float]:
    """Images per second of processor time, of some batches of an epoch."""
    batches = epoch_batches(len(split), BATCH, 0, 0)[:num_batches]
    count = sum(map(len, batches))

    def run() -> float:
        begun = processor_seconds()
        for _ in load_batches(split, batches, 1):
            pass
        return count / (processor_seconds() - begun)

    return run


def folder(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as root:
        write_folder(Path(root))
        for num_workers in (0, 2):
            for name, transform, part in (
                ("evaluation", "timm", "plain_train"),
                ("pad_crop", "pad_crop", "train"),
                ("timm's augmentation", "timm", "train"),
            ):
                runs = []
                for cache in ("auto", "none"):
                    settings = {"name": "image_folder", "dir": root, "image_size": SIDE, "check_images": "none"}
                    sizes = {"num_validation": 10, "num_test": 10, "cache": cache, "transform": transform}
                    data = load_data(DataSettings.model_validate({**settings, **sizes}), Workers(num_workers))
                    runs.append(loading(getattr(data, part)))
                    runs[-1]()  # fills the memory, starts the processes
                compare(f"224 px JPEG folder, {name}, {num_workers} processes", *runs, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    fashion_mnist(options.rounds)
    for_a_gpu(options.rounds)
    folder(options.rounds)
