"""Kept features: training on them is training on the images; written once, whole, and refused where they are not."""

import dataclasses
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dynexit.data import DataSets, Split, load_batches
from dynexit.dist import Ranks
from dynexit.errors import Failure, Interrupted, UserError, received_signals
from dynexit.features import kept as kept_module
from dynexit.features import store
from dynexit.features.kept import FEATURES_DIR, keep_features_of, rows_of
from dynexit.models.backbones import build_backbone
from dynexit.models.multi_exit import MultiExit
from dynexit.models.readers import Reading
from dynexit.progress import Progress
from dynexit.run_dir import DONE, read_json
from dynexit.study.grid import Point, expand
from dynexit.study.methods import JeiDnnSettings
from dynexit.study.schema import Config, TrainSettings
from dynexit.train.checkpoint import Checkpoints
from dynexit.train.jei_dnn import JeiDnnTask
from dynexit.train.pack import Member
from tests.train.ranks import run_ranks
from tests.train.tiny import NUM_CLASSES, RANKS, largest_difference, tiny_model, tiny_pack, tiny_split

MODEL, COSTS = tiny_model()
NUM_TRAIN, NUM_VALIDATION = 150, 40  # of three shards and one


class Shifted:
    """Images that the epoch makes brighter, each by its own amount."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def file_names(self) -> None:
        return None

    def share(self) -> None: ...

    def load(self, indices: Any, epoch: int) -> torch.Tensor:
        index = torch.as_tensor(list(indices), dtype=torch.int64)
        return self.images[index] + 0.1 * epoch + 0.001 * index[:, None, None, None]


def tiny_data(*, augmented: bool = False) -> DataSets:
    plain, validation = tiny_split(NUM_TRAIN), tiny_split(NUM_VALIDATION, seed=4)
    images = plain.images
    assert isinstance(images, torch.Tensor)
    train = Split(Shifted(images), plain.labels, plain.origin) if augmented else plain
    return DataSets(train, plain, validation, validation, NUM_CLASSES, 1, 24, tuple("abcde"))


def point_at(folder: Path, backbone_sha256: str = "b" * 64, **train: Any) -> Point:
    """A point in `folder` whose backbone has been prepared."""
    config = Config(runs_dir=str(folder), train=TrainSettings(features="kept", **train))
    (point,) = expand(config, {})
    prepared = point.study_dir / "prepare" / point.ids["prepare"]
    prepared.mkdir(parents=True, exist_ok=True)
    done = {"id": point.ids["prepare"], "files": {"backbone.safetensors": {"bytes": 0, "sha256": backbone_sha256}}}
    store.write_json(prepared / DONE, done)
    return point


def keep(folder: Path, data: DataSets | None = None, model: MultiExit | None = None, **train: Any) -> Any:
    """(data, model) on kept features in `folder`."""
    return keep_features_of(point_at(folder, **train), RANKS, data or tiny_data(), model or MODEL)


def folders_of(folder: Path, split: str = "train") -> list[Path]:
    found = sorted((folder / FEATURES_DIR).glob("*/features.json"))
    return [path.parent for path in found if read_json(path)["split"] == split]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_BATCH_SIZE", 32)
    monkeypatch.setattr(store, "_MIN_SHARD_ROWS", 64)


@pytest.mark.parametrize("reader", [None, "average_max_std"])
@pytest.mark.parametrize("concatenate", [False, True])
def test_kept_features_are_those_of_the_images(reader: str | None, concatenate: bool, tmp_path: Path) -> None:
    model = MultiExit(MODEL.backbone, (0, 1, 3), reading=Reading(reader, concatenate))
    data, kept = keep(tmp_path, model=model)
    for split, found in ((tiny_data().train, data.train), (tiny_data().validation, data.validation)):
        assert isinstance(split.images, torch.Tensor)
        order = list(range(len(split)))[::-1]
        (batch,) = load_batches(found, [order])
        features, final = kept.features(batch[1])
        expected, expected_final = model.features(split.images[order])
        for one, other in zip(features, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(final, expected_final, rtol=1e-5, atol=1e-6)
        assert torch.equal(batch[2], split.labels[order])
    assert kept.feature_dims == model.feature_dims


def test_two_reads_of_a_class_token_model_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(3)
    arguments = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8}
    backbone = build_backbone(
        "vit_tiny_patch16_224", arguments=arguments, num_classes=NUM_CLASSES, image_size=24, in_channels=1
    )
    model = MultiExit(backbone, (0, 1), ("linear", "mlp2x4"))
    data, kept = keep(tmp_path, model=model)
    ((_, rows, _),) = load_batches(data.validation, [range(NUM_VALIDATION)])
    expected, _ = model.features(tiny_data().validation.images)  # type: ignore[arg-type]
    features, _ = kept.features(rows)
    assert features[1].shape == (NUM_VALIDATION, 2, 24)
    torch.testing.assert_close(features[1], expected[1], rtol=1e-5, atol=1e-5)


def test_epochs_go_through_the_augmented_views_in_turn(tmp_path: Path) -> None:
    data, model = tiny_data(augmented=True), MODEL
    kept_data, _ = keep(tmp_path, data, model, kept_views=2)
    batch = [5, 140, 17]
    for epoch, view in ((0, 0), (1, 1), (2, 0), (5, 1)):
        ((_, rows, _),) = load_batches(kept_data.train, [batch], epoch)
        ((_, images, _),) = load_batches(data.train, [batch], view)
        torch.testing.assert_close(rows, rows_of(model, images), rtol=1e-5, atol=1e-5)
    ((_, rows, _),) = load_batches(kept_data.plain_train, [batch], 1)
    ((_, images, _),) = load_batches(data.plain_train, [batch])
    torch.testing.assert_close(rows, rows_of(model, images), rtol=1e-5, atol=1e-5)
    before = sorted(folder.name for folder in folders_of(tmp_path))
    keep(tmp_path, data, model, kept_views=3)  # one more view, the others are there
    after = sorted(folder.name for folder in folders_of(tmp_path))
    assert (len(before), len(after)) == (3, 4)
    assert set(before) < set(after)


def test_features_in_bf16_are_the_rounded_ones_in_half_the_room(tmp_path: Path) -> None:
    data, _ = keep(tmp_path)
    rounded, _ = keep(tmp_path, kept_precision="bf16")  # in folders of its own
    batch = [[5, 140, 17]]
    ((_, rows, _),), ((_, half, _),) = load_batches(data.train, batch), load_batches(rounded.train, batch)
    assert half.dtype == torch.float32
    assert torch.equal(half, rows.bfloat16().float())
    assert not torch.equal(half, rows)
    sizes = {}
    for file in (tmp_path / FEATURES_DIR).glob("*/*.safetensors"):
        row = load_file(file)["row"]
        sizes.setdefault(row.dtype, []).append(row.nbytes)
    assert sum(sizes[torch.bfloat16]) * 2 == sum(sizes[torch.float32])


def test_plain_views_serve_methods_and_sets_without_augmentation(tmp_path: Path) -> None:
    keep(tmp_path / "set", kept_views=2)
    keep(tmp_path / "probe", tiny_data(augmented=True), method="probe", kept_views=2)
    assert [len(folders_of(tmp_path / name)) for name in ("set", "probe")] == [1, 1]


def test_the_backbone_runs_once_for_each_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[int] = []

    def counting(model: MultiExit, images: torch.Tensor) -> torch.Tensor:
        passed.append(len(images))
        return rows_of(model, images)

    monkeypatch.setattr(kept_module, "rows_of", counting)
    for method in ("jei_dnn", "independent", "probe"):
        keep(tmp_path, method=method)
    assert sum(passed) == NUM_TRAIN + NUM_VALIDATION
    with pytest.raises(UserError):  # nothing is computed before the size is known to be allowed
        keep(tmp_path / "large", max_feature_gb=1e-6)
    assert sum(passed) == NUM_TRAIN + NUM_VALIDATION


def test_training_on_kept_features_is_fresh_training(tmp_path: Path) -> None:
    data, model, costs = tiny_data(), MODEL, COSTS
    settings = TrainSettings(num_epochs=4, global_batch_size=16, precision="float64")
    members = [Member(seed, str(seed), JeiDnnSettings(ce_ic_tradeoff=0.3)) for seed in (0, 1)]
    method = JeiDnnSettings(max_warm_up_epochs=2, bilevel_batch_count=5)
    states = []
    for split, exits in ((data, model), keep(tmp_path, data, model)):
        pack = dataclasses.replace(
            tiny_pack(members, settings), model=exits, costs=costs, validation=split.validation, num_train=NUM_TRAIN
        )
        task = JeiDnnTask(pack, method)
        folder = tmp_path / f"pack{len(states)}"
        task.train(split.train, Checkpoints(folder, 1e9), Progress("train", folder, 1e9, quiet=True))
        states.append([task.member_state(i) for i in range(2)])
    for fresh, kept in zip(*states, strict=True):
        for name in fresh:
            torch.testing.assert_close(fresh[name], kept[name], rtol=1e-4, atol=1e-5)


def shard_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in [*sorted(folder.glob("shard-*")), folder / DONE]}


def test_a_killed_pass_resumes_at_the_shard_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tmp_path / "whole")
    passed: list[int] = []

    def killed(model: MultiExit, images: torch.Tensor) -> torch.Tensor:
        passed.append(len(images))
        if len(passed) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return rows_of(model, images)

    monkeypatch.setattr(kept_module, "rows_of", killed)
    process = multiprocessing.get_context("fork").Process(target=keep, args=(tmp_path / "killed",))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (folder,) = folders_of(tmp_path / "killed")
    assert len(list(folder.glob("shard-*.safetensors"))) == 2
    passed[:] = [0] * 10
    keep(tmp_path / "killed")
    assert sum(passed) == NUM_TRAIN - 128 + NUM_VALIDATION
    assert shard_files(folder) == shard_files(*folders_of(tmp_path / "whole"))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [".lock", DONE, "features.json", "log.txt", *(path.name for path in folder.glob("shard-*.safetensors"))]
    )


def _keep_slowly(folder: Path, queue: Any) -> None:
    def slowly(model: MultiExit, images: torch.Tensor) -> torch.Tensor:
        queue.put(len(images))
        store.time.sleep(0.2)
        return rows_of(model, images)

    kept_module.rows_of = slowly
    data, _ = keep(folder)
    queue.put(-sum(int(batch[1].shape[0]) for batch in load_batches(data.train, [range(NUM_TRAIN)])))


def test_jobs_that_start_together_write_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_keep_slowly, args=(tmp_path, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    numbers = [queue.get(timeout=5) for _ in range(5 + 2 + 3)]
    assert sum(number for number in numbers if number > 0) == NUM_TRAIN + NUM_VALIDATION
    assert numbers.count(-NUM_TRAIN) == 3
    logs = [(folder / "log.txt").read_text() for folder in folders_of(tmp_path)]
    assert "another job writes these features to" in "".join(logs)


def test_a_job_that_waits_for_another_ends_at_a_signal(tmp_path: Path) -> None:
    keep(tmp_path)
    (folder,) = folders_of(tmp_path)
    (folder / DONE).unlink()
    with store._lock_file(folder) as lock:
        assert store._locked(lock)
        received_signals.append(signal.SIGTERM)
        try:
            with pytest.raises(Interrupted, match="stopped by a signal while another job wrote"):
                keep(tmp_path)
        finally:
            received_signals.clear()


def test_too_large_features_are_refused_with_their_size(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        keep(tmp_path, tiny_data(augmented=True), max_feature_gb=0.00005, kept_views=3)
    width = sum(MODEL.own_dims) + NUM_CLASSES
    size = 4 * width * (4 * NUM_TRAIN + NUM_VALIDATION) / 1e9
    assert str(caught.value) == (
        "train.max_feature_gb = 5e-05: the features of 150 training images, plain and in 3 augmented views, and 40 of "
        f"validation take {size:.3g} GB; raise it, keep fewer views (train.kept_views) or exits, or set "
        "train.features=fresh"
    )
    assert not (tmp_path / FEATURES_DIR).exists()


def test_a_disk_without_room_is_found_before_the_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(Failure, match=r"the features need 2.\d+e-05 GB in .*/features, and 1e-06 GB are free; free"):
        keep(tmp_path)


def test_a_disk_that_fills_up_is_one_error(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        with pytest.raises(Failure) as caught:
            keep(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    (folder,) = folders_of(tmp_path)
    assert str(caught.value).startswith(f"{folder}/shard-00000000-00000064.safetensors could not be written: ")
    assert str(caught.value).endswith("free space or fix the permissions, then run again")
    keep(tmp_path)


@pytest.mark.parametrize("damage", ["byte", "cut", "removed", "backbone", "partial", "labels"])
def test_damaged_or_foreign_features_are_refused(damage: str, tmp_path: Path) -> None:
    keep(tmp_path)
    (folder,) = folders_of(tmp_path)
    shard = folder / "shard-00000064-00000128.safetensors"
    data, sha256 = tiny_data(), "b" * 64
    if damage == "byte":
        content = bytearray(shard.read_bytes())
        content[-9] ^= 1
        shard.write_bytes(content)
        text = f"{shard} was altered (its SHA-256 is not the one in DONE); "
    elif damage == "cut":
        os.truncate(shard, 100)
        text = f"{shard} has 100 bytes instead of "
    elif damage == "removed":
        shard.unlink()
        text = f"{shard} is missing although its job is finished; "
    elif damage == "labels":
        data.plain_train.labels[100] = (data.plain_train.labels[100] + 1) % NUM_CLASSES
        text = f"{shard} has other labels than the data set: its images have changed since; "
    else:
        sha256 = "c" * 64
        keep(tmp_path / "other", backbone_sha256=sha256)
        (other,) = folders_of(tmp_path / "other")
        folder = folder.rename(folder.parent / other.name)
        text = f"{folder} holds the work of another configuration (id "
        if damage == "partial":
            (folder / DONE).unlink()
            text = f"{folder} holds other features: backbone_sha256 is '{'b' * 64}', expected '{sha256}'; "
    point = point_at(tmp_path, sha256)
    with pytest.raises(Failure) as caught:
        keep_features_of(point, RANKS, data, MODEL)
    assert str(caught.value).startswith(text)
    assert f"move it aside with `mv {folder} {folder}.damaged` and run the same command again" in str(caught.value)
    folder.rename(f"{folder}.damaged")
    keep_features_of(point, RANKS, data, MODEL)


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / FEATURES_DIR).write_text("a file")
    with pytest.raises(Failure, match=r"could not be written: (Not a directory|File exists); free space or fix"):
        keep(tmp_path)


def test_shards_hold_whole_batches_and_every_row_once() -> None:
    for num_rows, width in ((1, 3), (256, 5), (300_000, 40), (70_000, 300_000)):
        folder = store.FeatureFolder(Path(), {"num_rows": num_rows, "width": width})
        assert np.concatenate([np.asarray(shard) for shard in folder.shards]).tolist() == list(range(num_rows))
        assert all(shard.start % store._BATCH_SIZE == 0 for shard in folder.shards)
        assert all(4 * width * len(shard) <= max(store._MAX_SHARD_BYTES, 1024 * width) for shard in folder.shards)
        assert folder.num_bytes == 4 * width * num_rows


def test_ranks_share_the_shards_between_them() -> None:
    folder = store.FeatureFolder(Path(), {"num_rows": 3000, "width": 4})
    shares = [Ranks(rank, 3, torch.device("cpu")).share(folder.shards) for rank in range(3)]
    assert sorted(row for share in shares for shard in share for row in shard) == list(range(3000))


@pytest.mark.slow
def test_world_sizes_1_and_8_keep_the_same_bytes(tmp_path: Path) -> None:
    states, files = [], []
    for world_size in (1, 8):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        run_ranks(world_size, [sys.executable, "-m", "tests.features.one_rank", str(folder)])
        states.append([load_file(folder / f"rank{rank}.safetensors") for rank in range(world_size)])
        files.append(shard_files(*folders_of(folder)))
    assert len(files[0]) == 10 + 1  # shards of 16 rows, of which two ranks write two, and DONE
    assert files[0] == files[1]
    ((alone,), ranks) = states
    assert all(largest_difference(ranks[0], rank) == 0.0 for rank in ranks[1:])
    assert largest_difference(alone, ranks[0]) <= 1e-10
