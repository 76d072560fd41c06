import json
import mmap
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dynexit.errors import Failure, UserError
from dynexit.record.manifest import SHARED, Layout
from dynexit.record.plan import finish, make_plan
from dynexit.record.shards import Record, ShardWriter, has_shards
from tests.reference.fake_outputs import contents

LAYOUT = Layout(((1, "linear"), (3, "linear")), topk=2, num_gates=4, num_samples=53, batch_size=5)
HEADER = {"checkpoint_sha256": "ab" * 32, "split": "test", "rows": (1, 2)}
SECOND = "shard-000003-000005.safetensors"


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """A whole record's arrays."""
    generator = np.random.default_rng(seed)
    made = {}
    for name, (dtype, shape) in LAYOUT.arrays(LAYOUT.num_samples).items():
        made[name] = generator.random(shape, dtype) if dtype == np.float32 else generator.integers(0, 7, shape, dtype)
    return {**made, "index": np.arange(LAYOUT.num_samples)}


def write(
    directories: list[Path], contents_: list[dict[str, np.ndarray]], shards_dir: Path | None = None, ranks: int = 1
) -> None:
    """Records of one header; of several `ranks` the first alone writes."""
    headers = [HEADER] * len(directories)
    plan = make_plan(directories, headers, LAYOUT, shards_dir=shards_dir, samples_per_shard=15, world_size=ranks)
    writer = ShardWriter(plan)
    stacked = {
        name: array if name in SHARED else np.stack([content[name] for content in contents_])
        for name, array in contents_[0].items()
    }
    for batch in reversed(writer.missing_batches):  # any order will do
        samples = slice(*LAYOUT.sample_range(batch))
        writer.add(batch, {name: array[..., samples] for name, array in stacked.items()})
    if ranks == 1:
        finish(plan, writer.shards)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write([tmp_path / "it's a record"], [arrays()])
    return tmp_path / "it's a record"


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A study's folder with two records, `record/0` and `record/1`, that share shards."""
    folders = [tmp_path / "study" / "record" / str(member) for member in (0, 1)]
    write(folders, [arrays(0), {**arrays(1), "label": arrays(0)["label"]}], tmp_path / "study" / "shards" / "x")
    return tmp_path / "study"


def test_each_member_of_a_pack_reads_its_own(pack: Path) -> None:
    for member, seed in ((0, 0), (1, 1)):
        expected = {**arrays(seed), "label": arrays(0)["label"]}
        found = contents(pack / "record" / str(member))
        assert {name: found[name] for name in expected} == {n: array.tobytes() for n, array in expected.items()}
    with pytest.raises(UserError, match=r"x holds the shards of 2 records; give the folder of one of them, record/ID"):
        Record.open(pack / "shards" / "x")


def test_a_damaged_member_leaves_the_others_readable(pack: Path) -> None:
    path = pack / "shards" / "x" / SECOND
    header_bytes = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    entry = json.loads(path.read_bytes()[8:header_bytes])["entropy"]["data_offsets"]
    flip(path, header_bytes + entry[1] - 1)  # the last byte is the second member's
    contents(pack / "record" / "0")
    with pytest.raises(Failure) as failure:
        contents(pack / "record" / "1")
    folder = pack / "shards" / "x"
    assert str(failure.value) == (
        f"{path} was altered (its CRC-32 is not the one in the manifest); move it aside with `mv {folder} "
        f"{folder}.damaged` and run the same command again to remake it"
    )


def test_records_move_with_their_study_only(pack: Path, tmp_path: Path) -> None:
    before = contents(pack / "record" / "1")
    moved = pack.rename(tmp_path / "elsewhere")
    assert contents(moved / "record" / "1") == before
    (tmp_path / "link").symlink_to(moved / "record" / "1")
    assert contents(tmp_path / "link") == before
    shutil.copytree(moved / "record" / "1", tmp_path / "far" / "from" / "it")
    with pytest.raises(UserError) as error:
        Record.open(tmp_path / "far" / "from" / "it")
    assert str(error.value) == (
        f"{tmp_path}/far/from/it has its shards in {tmp_path}/far/shards/x, which does not exist; copy a record "
        "together with the folder `shards` of its study, or run `dynexit record` on the study again"
    )
    assert has_shards(moved / "record" / "1")
    (moved / "shards" / "x").rename(moved / "shards" / "x.damaged")
    assert not has_shards(moved / "record" / "1")


def test_a_record_of_version_1_is_read(directory: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(directory, old)
    manifest = json.loads((old / "manifest.json").read_text())
    for name in ("num_members", "first_member", "shards_dir"):
        del manifest[name]
    manifest |= {"version": 1, "header": manifest.pop("headers")[0]}
    manifest["layout"]["batches_per_shard"] = 3
    for shard in manifest["shards"]:
        path = old / shard["file"]
        save_file({n: a if n in SHARED else a[0].copy() for n, a in load_file(path).items()}, path)
        shard |= {"bytes": path.stat().st_size, "crc32": f"{zlib.crc32(path.read_bytes()):08x}"}
    (old / "manifest.json").write_text(json.dumps(manifest))
    assert contents(old) == contents(directory)
    assert has_shards(old)
    flip(old / SECOND, (old / SECOND).stat().st_size - 1)
    with pytest.raises(Failure, match=f"{SECOND} was altered"):
        contents(old)


def test_what_is_written_is_read(directory: Path) -> None:
    content = arrays()
    record = Record.open(directory, HEADER["checkpoint_sha256"])
    assert record.num_samples == 53
    assert record.header == {**HEADER, "rows": [1, 2]}
    assert record.positions == (1, 3)
    assert record.head_types == ("linear",)
    for k in range(2):
        assert np.array_equal(record.prediction(k), content["prediction"][:, k])
        assert np.array_equal(record.probability(k), content["probability"][:, k])
    for kind in ("margin", "entropy", "label_probability"):
        assert np.array_equal(record.confidence(kind), content[kind])
    assert np.array_equal(record.confidence("max_probability"), content["probability"][:, 0])
    assert np.array_equal(record.gate, content["gate"])
    assert np.array_equal(record.label, content["label"])
    assert np.array_equal(record.index, content["index"])
    assert np.array_equal(record.correct_RN, content["prediction"][:, 0] == content["label"])
    assert record.confidence("margin") is record.confidence("margin")


def test_one_row_is_read_alone(directory: Path) -> None:
    content = arrays()
    record = Record.open(directory)
    assert np.array_equal(record.read_row(2, "entropy"), content["entropy"][2])
    assert np.array_equal(record.read_row(1), content["probability"][1, 0])
    assert np.array_equal(record.read_row(0, "prediction"), content["prediction"][0, 0])


def test_parts_are_mapped_and_not_copied(directory: Path) -> None:
    content = arrays()
    start = 0
    for part in Record.open(directory).parts():
        stop = start + len(part["index"])
        for name, array in part.items():
            assert np.array_equal(array, content[name][..., start:stop])
            owner = array
            while isinstance(owner, np.ndarray):
                owner = owner.base
            assert isinstance(owner if isinstance(owner, mmap.mmap) else owner.obj, mmap.mmap)
            assert not array.flags.writeable
        start = stop
    assert start == 53


def test_shards_are_plain_safetensors(directory: Path) -> None:
    found = load_file(directory / SECOND)
    content = arrays()
    assert found.keys() == content.keys()
    for name, array in found.items():
        assert np.array_equal(array if name in SHARED else array[0], content[name][..., 15:30])


def test_an_unknown_confidence_names_those_there_are(directory: Path) -> None:
    with pytest.raises(UserError) as error:
        Record.open(directory).confidence("gate")
    assert str(error.value) == (
        f"{directory} has no confidence 'gate'; it has: max_probability, margin, entropy, label_probability; choose one"
        " of these, or record again"
    )


def test_no_record_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        Record.open(tmp_path / "nowhere")
    assert str(error.value) == (
        f"there is no record in {tmp_path / 'nowhere'} (no manifest.json); give a directory that `record` wrote"
    )


def test_an_unfinished_record_says_how_to_finish_it(tmp_path: Path) -> None:
    write([tmp_path], [arrays()], ranks=2)
    with pytest.raises(Failure) as failure:
        Record.open(tmp_path)
    assert str(failure.value) == (
        f"{tmp_path}: batch 5 is in no shard (a gap); recording is not finished: run the same command again"
    )


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def edit_manifest(directory: Path, change: Callable[[list[dict[str, object]]], None]) -> None:
    content = json.loads((directory / "manifest.json").read_text())
    change(content["shards"])
    (directory / "manifest.json").write_text(json.dumps(content))


def copy_first_over_second(directory: Path) -> None:
    shutil.copy(directory / "shard-000000-000002.safetensors", directory / SECOND)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda d: (d / SECOND).unlink(), "{shard} is missing although its manifest lists it"),
    "truncated": (
        lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes()[:-1]),
        "{shard} has {bytes} bytes instead of {more}",
    ),
    "duplicate samples": (
        copy_first_over_second,
        "{shard} holds sample 0 where sample 15 belongs, so that not every sample is there exactly once",
    ),
    "header": (lambda d: flip(d / SECOND, 9), "{shard} is damaged (not a safetensors file: "),
    "length of the header": (lambda d: flip(d / SECOND, 6), "{shard} is damaged (not a safetensors file: no header)"),
    "gap": (lambda d: edit_manifest(d, lambda s: s.pop(1)), "{directory}: batch 3 is in no shard (a gap)"),
    "overlap": (
        lambda d: edit_manifest(d, lambda s: s.append({**s[1], "last_batch": 4})),
        "{directory}: shard-000003-000004.safetensors holds batches that other shards hold too",
    ),
    "manifest": (
        lambda d: (d / "manifest.json").write_text("{"),
        "{directory}/manifest.json is damaged (Invalid JSON: ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_refused_when_opened(directory: Path, damage: str) -> None:
    act, message = DAMAGES[damage]
    size = (directory / SECOND).stat().st_size
    act(directory)
    with pytest.raises(Failure) as failure:
        Record.open(directory)
    quoted = "'" + str(directory).replace("'", "'\"'\"'") + "'"
    expected = message.format(shard=directory / SECOND, directory=directory, bytes=size - 1, more=size)
    assert str(failure.value).startswith(expected)
    assert str(failure.value).endswith(
        f"; move it aside with `mv {quoted} {quoted}.damaged` and run the same command again to remake it"
    )


def test_the_record_of_another_checkpoint_is_refused(directory: Path) -> None:
    with pytest.raises(Failure) as failure:
        Record.open(directory, "cd" * 32)
    assert str(failure.value).startswith(
        f"{directory} is the record of another checkpoint ({'ab' * 32}, expected {'cd' * 32}); move it aside with `mv "
    )


def test_any_altered_byte_is_found_when_its_shard_is_first_read(directory: Path) -> None:
    path = directory / SECOND
    sound = path.read_bytes()
    for place in range(7, len(sound), 97):
        flip(path, place)
        with pytest.raises(Failure) as failure:
            Record.open(directory).read_row(0)
        assert str(path) in str(failure.value)
        assert f"move it aside with `mv {str(directory)[:3]}" in str(failure.value).replace("`mv '", "`mv ")
        path.write_bytes(sound)
    flip(path, len(sound) - 1)
    with pytest.raises(Failure) as failure:
        Record.open(directory).correct_RN  # noqa: B018
    assert str(failure.value).startswith(f"{path} was altered (its CRC-32 is not the one in the manifest); move it")


def test_a_plan_refuses_another_record_or_a_lost_shard(directory: Path) -> None:
    with pytest.raises(Failure) as failure:
        make_plan([directory], [{**HEADER, "split": "validation"}], LAYOUT)
    assert str(failure.value).startswith(
        f"{directory} holds another record: its header has split 'test', expected 'validation'; move it aside with"
    )
    other = Layout(LAYOUT.exits, 2, 4, 54, 5)
    with pytest.raises(Failure, match="its layout has num_samples 53, expected 54"):
        make_plan([directory], [HEADER], other)
    with pytest.raises(Failure, match="holds shards of 1 records, expected 2"):
        make_plan([directory, directory], [HEADER, HEADER], LAYOUT, shards_dir=directory)
    before = (directory / "manifest.json").read_bytes()
    (directory / SECOND).unlink()
    with pytest.raises(Failure, match=f"{SECOND} is missing although its manifest lists it"):
        make_plan([directory], [HEADER], LAYOUT, world_size=4)
    assert (directory / "manifest.json").read_bytes() == before


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    for name in (f".{SECOND}.x1.tmp", ".manifest-rank0of1.json.x2.tmp", "shard-000003-000004.safetensors", "mine"):
        (tmp_path / name).write_text("half")
    write([tmp_path], [arrays()])
    assert contents(tmp_path)
    shards = {f"shard-{i:06d}-{min(i + 2, 10):06d}.safetensors" for i in (0, 3, 6, 9)}
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "manifest.json", *shards}


def test_reading_leaves_no_file_open(tmp_path: Path) -> None:
    layout = Layout((), topk=1, num_gates=0, num_samples=40, batch_size=1)
    plan = make_plan([tmp_path], [{}], layout, samples_per_shard=1)
    writer = ShardWriter(plan)
    for sample in range(40):
        content = {name: np.zeros(shape, dtype) for name, (dtype, shape) in layout.shard_arrays(1, 1).items()}
        writer.add(sample, {**content, "index": np.array([sample])})
    finish(plan, writer.shards)
    record = Record.open(tmp_path)
    assert record.correct_RN.all()
    descriptors = Path("/proc/self/fd")
    if descriptors.exists():
        assert not [f for f in descriptors.iterdir() if f.is_symlink() and str(f.readlink()).startswith(str(tmp_path))]
