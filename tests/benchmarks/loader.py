"""Augmented grey images made in batches against one by one: python tests/benchmarks/loader.py [--rounds 7].

Fashion-MNIST's images (its idx files must be there) as `fashion_mnist` loads them, and by the transforms of Pillow that
other data sets have. Both in this process, in turn; printed are the medians of processor time and of the ratio.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from dynexit.data.fashion_mnist import GreyImages, find_fashion_mnist, read_idx
from dynexit.data.images import ArraySource, TransformedImages
from dynexit.data.splits import Images
from dynexit.data.transforms import GREY, train_transform
from dynexit.study.schema import DataSettings

BATCH = 128


def rate(images: Images, num_images: int, num_batches: int) -> float:
    """Images per second of processor time, in random order."""
    batches = np.random.default_rng(0).integers(0, num_images, (num_batches, BATCH)).tolist()
    begun = time.process_time()
    for indices in batches:
        images.load(indices, 0)
    return num_batches * BATCH / (time.process_time() - begun)


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    pixels = read_idx(find_fashion_mnist(DataSettings(name="fashion_mnist")), "train-images-idx3-ubyte", 3)
    batched = GreyImages(pixels, 32, GREY["fashion_mnist"], seed=0)
    source = ArraySource(np.repeat(pixels[..., None], 3, 3), np.zeros(len(pixels)))
    transform, _ = train_transform(DataSettings(name="cifar10"))
    single = TransformedImages(source, torch.arange(len(pixels)), transform, seed=0)
    pairs = [(rate(batched, len(pixels), 40), rate(single, len(pixels), 4)) for _ in range(rounds)]
    fast, slow = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"in batches {fast:.0f} images/s, one by one {slow:.0f}: {ratio:.1f} times")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    main(parser.parse_args().rounds)
