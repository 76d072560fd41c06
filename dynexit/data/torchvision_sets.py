"""CIFAR-10, CIFAR-100, its long-tailed form, and SVHN, in their own files, read by torchvision.

torchvision unpickles a CIFAR file only after its MD5 has matched; SVHN's are no pickles.
"""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dynexit.data.folders import existing_dir
from dynexit.data.images import ArraySource, Sources
from dynexit.errors import Failure, UserError
from dynexit.study.schema import DataSettings


def read_cifar(data: DataSettings) -> Sources:
    """CIFAR-10 or CIFAR-100; of `cifar100_lt` the long tail of its training images, and, if asked, of its test."""
    from torchvision import datasets

    cls = datasets.CIFAR10 if data.name == "cifar10" else datasets.CIFAR100
    root = data_folder(data)
    folder = root / cls.base_folder
    files = {name: (folder / name, md5) for name, md5 in (*cls.train_list, *cls.test_list)}
    files[cls.meta["filename"]] = (folder / cls.meta["filename"], cls.meta["md5"])
    with one_process_at_a_time(data, root):
        train, test = (
            _read(data, cls, files, f"unpack {cls.url} (MD5 {cls.tgz_md5}) in {root}", root=root, train=is_train)
            for is_train in (True, False)
        )
    class_names = tuple(train.classes)
    sources = [ArraySource(found.data, np.asarray(found.targets)) for found in (train, test)]
    if data.name == "cifar100_lt":
        sources[0] = _thinned(sources[0], data.imbalance_factor)
        sources[1] = _thinned(sources[1], data.imbalance_factor) if data.thin_test else sources[1]
    return Sources(train=sources[0], test=sources[1], class_names=class_names)


def read_svhn(data: DataSettings) -> Sources:
    """SVHN's cropped digits: 73,257 of `train` and 26,032 of `test`; `extra` is not used."""
    from torchvision import datasets

    root = data_folder(data)
    found = []
    with one_process_at_a_time(data, root):
        for split in ("train", "test"):
            url, name, md5 = datasets.SVHN.split_list[split]
            how = f"put {url} there"
            found.append(_read(data, datasets.SVHN, {name: (root / name, md5)}, how, root=root, split=split))
    train, test = (ArraySource(np.ascontiguousarray(one.data.transpose(0, 2, 3, 1)), one.labels) for one in found)
    return Sources(train=train, test=test, class_names=tuple("0123456789"))


def data_folder(data: DataSettings) -> Path:
    """Returns data.dir, made if the data set may be downloaded. Raises UserError if there is none."""
    if data.download and data.dir is not None:
        try:
            Path(data.dir).expanduser().mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.dir = {data.dir}: the folder cannot be made ({error.strerror})") from None
    return existing_dir(data, "the folder with its files (data.download=true puts them there)")


def _read(data: DataSettings, cls: Any, files: dict[str, tuple[Path, str]], how: str, **arguments: Any) -> Any:
    """torchvision's data set. Where its files are missing or not the published ones, says which and what to do."""
    try:
        return cls(download=data.download, **arguments)
    except OSError as error:  # no network, no room, no right to read or write
        raise Failure(f"{data.name} could not be read or downloaded ({error}); {how}, and try again") from None
    except RuntimeError:
        from torchvision.datasets.utils import check_integrity

        missing = [name for name, (path, _) in files.items() if not path.is_file()]
        wrong = [name for name, (path, md5) in files.items() if name not in missing and not check_integrity(path, md5)]
        folder = next(iter(files.values()))[0].parent
        faults = [f"{', '.join(missing)} missing"] * bool(missing)
        faults += [f"{', '.join(wrong)} corrupt (not the published MD5)"] * bool(wrong)
        if not faults:
            raise
        raise UserError(
            f"{data.name} was looked for in {folder}: {'; '.join(faults)}; set data.download=true, or {how}"
        ) from None


def long_tail(labels: np.ndarray, factor: float) -> np.ndarray:
    """Rows, sorted, of a long-tailed subset of a balanced set: int(n factor^(c / (C - 1))) images of class c.

    n is the count of the most frequent class. The images of a class are drawn by a generator that always starts at 0,
    so the subset is one data set, the published one, whatever the seeds. Source: Cao et al. 2019 (LDAM), experiments.
    """
    random = np.random.RandomState(0)  # numpy's old generator: the published subset was drawn by it
    counts = np.bincount(labels)
    rows = []
    for label in range(len(counts)):
        of_class = np.flatnonzero(labels == label)
        random.shuffle(of_class)
        rows.append(of_class[: int(counts.max() * factor ** (label / (len(counts) - 1.0)))])
    return np.sort(np.concatenate(rows))


def _thinned(source: ArraySource, factor: float) -> ArraySource:
    rows = long_tail(source.labels.numpy(), factor)
    return ArraySource(source.pixels[rows], source.labels.numpy()[rows])


@contextlib.contextmanager
def one_process_at_a_time(data: DataSettings, root: Path) -> Iterator[None]:
    """Holds a lock while data is downloaded: ranks would write the same files at the same time."""
    if not data.download:
        yield
        return
    try:
        lock = (root / f".{data.name}.lock").open("a")
    except OSError as error:
        raise UserError(f"data.download = true, but {root} cannot be written to ({error.strerror})") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
