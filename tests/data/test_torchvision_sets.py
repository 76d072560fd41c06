"""CIFAR and SVHN in their true files: what comes out, what is said of files that are missing or others."""

import functools
import http.server
import pickle
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from dynexit.data import DataSets, load_batches, load_data
from dynexit.data.torchvision_sets import long_tail
from dynexit.errors import Failure, UserError
from dynexit.study.schema import DataSettings
from tests.data.on_disk import cyclic_labels, md5, write_cifar, write_svhn


def images_of(data: DataSets, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pixels, labels, origin) of a split whose normalisation is none."""
    samples = data.split(split)
    found = [(images, labels) for _, images, labels in load_batches(samples, [[i] for i in range(len(samples))])]
    images, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy(), labels.numpy(), samples.origin.numpy()


def plain(name: str, root: Path, **keys: object) -> DataSettings:
    keys = {"num_validation": 7, "transform": "none", "normalisation": "none", **keys}
    return DataSettings.model_validate({"name": name, "dir": str(root), **keys})


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_every_image_comes_out_once_with_its_label(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = write_svhn(tmp_path, monkeypatch) if name == "svhn" else write_cifar(tmp_path, name, monkeypatch)
    data = load_data(plain(name, tmp_path))
    pixels, labels = sets["train"]
    for split in ("train", "validation"):
        found, found_labels, origin = images_of(data, split)
        assert np.array_equal(found, pixels[origin])
        assert np.array_equal(found_labels, labels[origin])
    held = [data.train.origin.tolist(), data.validation.origin.tolist()]
    assert len(held[1]) == 7
    assert sorted(held[0] + held[1]) == list(range(len(labels)))
    found, found_labels, origin = images_of(data, "test")
    assert np.array_equal(found, sets["test"][0])
    assert np.array_equal(found_labels, sets["test"][1])
    assert (data.num_classes, data.in_channels) == (100 if name == "cifar100" else 10, 3)


def slow_long_tail(labels: np.ndarray, factor: float) -> list[int]:
    """The reference's loop: one draw after the other from numpy's global generator, started at 0."""
    np.random.seed(0)  # noqa: NPY002
    num_classes = labels.max() + 1
    largest = len(labels) / num_classes
    rows: list[int] = []
    for label in range(num_classes):
        index = np.where(labels == label)[0]
        np.random.shuffle(index)  # noqa: NPY002
        rows.extend(index[: int(largest * (factor ** (label / (num_classes - 1.0))))])
    return rows


@pytest.mark.parametrize(("per_class", "total", "fewest"), [(500, 10847, 5), (100, 2131, 1)])
def test_the_long_tail_is_the_published_one(per_class: int, total: int, fewest: int) -> None:
    labels = cyclic_labels(100 * per_class, 100, seed=2)
    rows = long_tail(labels, 0.01)
    assert rows.tolist() == sorted(slow_long_tail(labels, 0.01))
    counts = np.bincount(labels[rows])
    assert (len(rows), counts.max(), counts.min()) == (total, per_class, fewest)
    assert (np.diff(counts) <= 0).all()
    assert np.array_equal(long_tail(labels, 1.0), np.arange(len(labels)))


def test_the_test_of_the_long_tail_is_balanced_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = write_cifar(tmp_path, "cifar100", monkeypatch, num_train=400, num_test=300)
    kept = {split: long_tail(sets[split][1], 0.3) for split in sets}
    data = load_data(plain("cifar100_lt", tmp_path, imbalance_factor=0.3, seed=4))
    assert len(data.train) + len(data.validation) == len(kept["train"]) < 400
    assert len(data.test) == 300
    found, labels, origin = images_of(data, "train")
    assert np.array_equal(found, sets["train"][0][kept["train"][origin]])
    assert np.array_equal(labels, sets["train"][1][kept["train"][origin]])
    thin = load_data(plain("cifar100_lt", tmp_path, imbalance_factor=0.3, thin_test=True))
    assert np.array_equal(images_of(thin, "test")[0], sets["test"][0][kept["test"]])


def test_nothing_missing_is_fetched_and_it_is_said_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, folder in (("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python"), ("svhn", "")):
        root = tmp_path / name
        root.mkdir()
        with pytest.raises(UserError) as caught:
            load_data(plain(name, root))
        text = str(caught.value)
        assert text.startswith(f"{name} was looked for in {root / folder}: ")
        assert " missing; set data.download=true, or " in text
        assert name == "svhn" or f"unpack {datasets.CIFAR100.url[:30]}" in text
        assert list(root.iterdir()) == []
    write_cifar(tmp_path / "part", "cifar10", monkeypatch)
    (tmp_path / "part" / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(UserError, match=r"cifar-10-batches-py: data_batch_3 missing; set"):
        load_data(plain("cifar10", tmp_path / "part"))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data.dir is not set; svhn needs it: the folder with its files"):
        load_data(DataSettings(name="svhn"))
    with pytest.raises(UserError, match=rf"^data.dir = {tmp_path}/no: there is no such folder"):
        load_data(plain("cifar10", tmp_path / "no"))


class Harm:
    """A pickle that leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("file", ["data_batch_2", "test_batch", "batches.meta"])
def test_nothing_is_unpickled_before_its_checksum_matched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    write_cifar(tmp_path, "cifar10", monkeypatch)
    (tmp_path / "cifar-10-batches-py" / file).write_bytes(pickle.dumps(Harm(tmp_path / "harmed")))
    with pytest.raises(UserError, match=rf"cifar-10-batches-py: {file} corrupt \(not the published MD5\); set data"):
        load_data(plain("cifar10", tmp_path))
    assert not (tmp_path / "harmed").exists()


def test_a_corrupt_mat_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, monkeypatch)
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=rf"^svhn was looked for in {tmp_path}: test_32x32.mat corrupt \(not the"):
        load_data(plain("svhn", tmp_path))


def test_download_fetches_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar(tmp_path / "theirs", "cifar10", monkeypatch)
    archive = tmp_path / "theirs" / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "theirs" / "cifar-10-batches-py", arcname="cifar-10-batches-py")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(archive))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "theirs")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
        monkeypatch.setattr(datasets.CIFAR10, "url", url)
        data = load_data(plain("cifar10", tmp_path / "mine", download=True))
        server.shutdown()
    assert len(data.train) == 43
    assert len(load_data(plain("cifar10", tmp_path / "mine", download=True)).train) == 43  # nothing is fetched twice
    with pytest.raises(Failure, match=rf"^cifar10 could not be read or downloaded \(.*\); unpack {url} \(MD5"):
        load_data(plain("cifar10", tmp_path / "other", download=True))
    capsys.readouterr()  # torchvision's progress bar, and the server's log
