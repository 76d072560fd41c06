import json
from pathlib import Path

import pytest

from dynexit.errors import Failure, UserError
from dynexit.record.manifest import BACKBONE_ROW, Layout, Manifest, Shard, read_manifests

EXITS = ((1, "linear"), (1, "mlp1x20"), (3, "linear"), (3, "mlp1x20"))
LAYOUT = Layout(EXITS, topk=2, num_gates=3, num_samples=103, batch_size=8)
SHARDS = tuple(Shard(first, last, 1, 10, ("0" * 8,), "0" * 64) for first, last in ((0, 4), (5, 9), (10, 12)))
HEADER = {"checkpoint_sha256": "0"}


def test_batches_hold_every_sample_once() -> None:
    assert LAYOUT.num_batches == 13
    assert [sample for batch in range(13) for sample in range(*LAYOUT.sample_range(batch))] == list(range(103))
    assert LAYOUT.sample_range(10, 12) == (80, 103)


def test_bytes_of_a_record() -> None:
    # index, label, 5 rows of 2 classes and probabilities and 3 statistics, 3 gates
    assert LAYOUT.num_bytes(1) == 8 + 4 + 5 * (2 * 4 + 2 * 4 + 3 * 4) + 3 * 4
    assert LAYOUT.num_bytes(103) == 103 * LAYOUT.num_bytes(1)


def test_rows_are_position_major_with_the_backbone_last() -> None:
    assert LAYOUT.rows == (*EXITS, BACKBONE_ROW)
    assert LAYOUT.positions == (1, 3)
    assert LAYOUT.head_types == ("linear", "mlp1x20")
    assert Layout.from_json(json.loads(json.dumps(LAYOUT.to_json()))) == LAYOUT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk": 0}, "topk is 0, must be at least 1"),
        ({"num_samples": 0}, "num_samples is 0, must be at least 1"),
        ({"num_samples": 2**31}, "num_samples is 2147483648, must be at most 2147483647"),
        ({"exits": EXITS * 2501}, "the number of exits is 10004, must be at most 10000"),
        ({"batch_size": -1}, "batch_size is -1, must be at least 1"),
        ({"num_gates": -1}, "num_gates is -1, must be at least 0"),
        ({"exits": EXITS[:3]}, "not every head type at every position, positions increasing"),
        ({"exits": EXITS[2:] + EXITS[:2]}, "not every head type at every position, positions increasing"),
        ({"exits": (EXITS[0], EXITS[0])}, "not every head type at every position, positions increasing"),
        ({"statistics": ("margin",)}, "must be of"),
    ],
)
def test_an_impossible_layout_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**{**LAYOUT.__dict__, **changes})  # type: ignore[arg-type]


def write(directory: Path, name: str, shards: tuple[Shard, ...], header: dict[str, object] | None = None) -> Path:
    Manifest(LAYOUT, (header or HEADER,), shards, 1).write(directory / name)
    return directory / name


def test_manifests_of_ranks_are_read_as_one(tmp_path: Path) -> None:
    assert read_manifests(tmp_path) is None
    write(tmp_path, "manifest-rank0of2.json", SHARDS[::2])
    write(tmp_path, "manifest-rank1of3.json", SHARDS[1:])
    found = read_manifests(tmp_path)
    assert found == Manifest(LAYOUT, (HEADER,), (SHARDS[0], SHARDS[2], SHARDS[1]), 1)
    found.write(tmp_path / "manifest.json")
    write(tmp_path, "manifest-rank1of3.json", ())
    merged = read_manifests(tmp_path)
    assert merged is not None
    assert merged.shards == SHARDS  # in order, and of manifest.json alone
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert (content["format"], content["version"], content["num_samples"]) == ("dynexit record", 2, 3)
    assert content["arrays"]["prediction"] == {"dtype": "int32", "shape": [5, 2, 103]}
    assert content["headers"] == [HEADER]


def test_a_member_has_its_own_header_and_checksums() -> None:
    shards = (Shard(0, 12, 103, 10, ("a", "b", "c"), "0"),)
    headers = tuple({"checkpoint_sha256": name} for name in "xyz")
    member = Manifest(LAYOUT, headers, shards, 3).of_member(1, "../shards")
    assert (member.headers, member.shards[0].crc32) == (({"checkpoint_sha256": "y"},), ("b",))
    assert (member.num_members, member.first_member, member.shards_dir) == (3, 1, "../shards")
    assert member.shards_folder(Path("study/record")) == Path("study/shards").resolve()


@pytest.mark.parametrize(
    ("ranges", "sentence"),
    [
        ([(0, 4), (5, 9), (10, 12)], ""),
        ([(5, 12), (0, 4)], ""),
        ([(0, 4), (10, 12)], "batch 5 is in no shard (a gap)"),
        ([(1, 12)], "batch 0 is in no shard (a gap)"),
        ([(0, 11)], "batch 12 is in no shard (a gap)"),
        ([], "batch 0 is in no shard (a gap)"),
        ([(0, 4), (4, 12)], "shard-000004-000012.safetensors holds batches that other shards hold too"),
        ([(0, 13)], "there are shards past the last of 13 batches"),
    ],
)
def test_gaps_and_overlaps_are_named(ranges: list[tuple[int, int]], sentence: str) -> None:
    shards = tuple(Shard(first, last, 1, 10, ("0",), "0") for first, last in ranges)
    assert Manifest(LAYOUT, (HEADER,), shards, 1).gap() == sentence


def test_manifests_that_differ_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "manifest-rank0of2.json", SHARDS)
    other = write(tmp_path, "manifest-rank1of2.json", (Shard(0, 4, 1, 10, ("0" * 8,), "1" * 64),))
    remedy = f"move it aside with `mv {tmp_path} {tmp_path}.damaged` and run the same command again to remake it"
    with pytest.raises(Failure) as failure:
        read_manifests(tmp_path)
    assert str(failure.value) == (
        f"{other} lists shard-000000-000004.safetensors again with other contents (a duplicate); {remedy}"
    )
    write(tmp_path, "manifest-rank1of2.json", (), {"checkpoint_sha256": "1"})
    with pytest.raises(Failure) as failure:
        read_manifests(tmp_path)
    assert (
        str(failure.value)
        == f"{tmp_path} holds another record: its header has checkpoint_sha256 '1', expected '0'; {remedy}"
    )


def test_a_manifest_that_is_none_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "manifest.json", SHARDS)
    content = json.loads(path.read_text())
    for broken, what in (
        ({**content, "format": "else"}, "format is 'else'"),
        ({key: value for key, value in content.items() if key != "shards"}, "'shards'"),
        ([1], "list indices must be integers or slices, not str"),
        ({**content, "layout": {**content["layout"], "topk": 0}}, "topk is 0, must be at least 1"),
        ({**content, "first_member": 1}, "1 members from 1 are not in 1"),
        ({**content, "shards_dir": "/etc"}, "shards_dir is /etc, must be relative"),
        ({**content, "shards": [{**content["shards"][0], "first_batch": 9}]}, "a shard has batches 9 to 4"),
        ({**content, "shards": [{**content["shards"][0], "crc32": []}]}, "a shard needs one crc32 per member"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(Failure) as failure:
            Manifest.read(path)
        assert str(failure.value).startswith(f"{path} is damaged (not a record's manifest: {what}); move it aside with")
    path.write_text(json.dumps({**content, "version": 3}))
    with pytest.raises(UserError, match=f"^{path} has format version 3, this dynexit reads up to 2$"):
        Manifest.read(path)
