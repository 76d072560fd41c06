"""The pixels of decoded images, kept as uint8 from the first time that an image is asked for."""

import mmap

import numpy as np

from dynexit.errors import UserError

LIMIT_BYTES = 2 << 30  # of a split, where data.cache is auto; stated in the key's text
_LIMIT_SHARE = 0.25  # of the memory that is available, likewise


class PixelMemory:
    """Room for the pixels of N images of `shapes_N3`; processes that are forked later share it."""

    def __init__(self, shapes_N3: np.ndarray) -> None:
        self.shapes_N3 = shapes_N3
        self.ends = np.cumsum(shapes_N3.prod(1))
        self._pixels = np.frombuffer(mmap.mmap(-1, max(int(self.ends[-1]), 1)), np.uint8)
        self._filled = np.frombuffer(mmap.mmap(-1, len(shapes_N3)), np.bool_)

    def get(self, i: int) -> np.ndarray | None:
        """The pixels of image i, not to be written to; None before `put`."""
        return self._place(i) if self._filled[i] else None

    def put(self, i: int, pixels: np.ndarray) -> None:
        """Keeps the pixels of image i, unless their shape is not that of its place."""
        place = self._place(i)
        if pixels.shape == place.shape:
            place[:] = pixels
            self._filled[i] = True

    def _place(self, i: int) -> np.ndarray:
        shape, end = self.shapes_N3[i], self.ends[i]
        return self._pixels[end - shape.prod() : end].reshape(shape)


def fits(num_bytes: int, cache: str, what: str) -> bool:
    """Whether images of `num_bytes` are kept where data.cache is `cache`; `what` names them.

    Raises UserError where they are asked for and the memory has no room.
    """
    import psutil

    available = psutil.virtual_memory().available
    if cache == "memory" and num_bytes > available:
        raise UserError(
            f"data.cache = memory: {what} take {num_bytes / 1e9:.3g} GB decoded, and {available / 1e9:.3g} GB of "
            "memory are available; set data.cache=auto, which keeps what fits"
        )
    return cache == "memory" or num_bytes <= min(LIMIT_BYTES, _LIMIT_SHARE * available)
