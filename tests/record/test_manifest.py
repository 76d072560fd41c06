import json
from pathlib import Path

import pytest

from dynexit.errors import Failure, UserError
from dynexit.record.manifest import BACKBONE_ROW, Layout, Manifest, Shard, merge_manifests, read_manifests

EXITS = ((1, "linear"), (1, "mlp1x20"), (3, "linear"), (3, "mlp1x20"))
LAYOUT = Layout(EXITS, topk=2, num_gates=3, num_samples=103, batch_size=8, batches_per_shard=5)
SHARDS = tuple(Shard(first, last, 1, 10, "0" * 8, "0" * 64) for first, last in LAYOUT.shard_batches())


def test_batches_and_shards_hold_every_sample_once() -> None:
    assert LAYOUT.num_batches == 13
    assert LAYOUT.shard_batches() == [(0, 4), (5, 9), (10, 12)]
    by_batch = [sample for batch in range(13) for sample in range(*LAYOUT.sample_range(batch))]
    by_shard = [sample for shard in LAYOUT.shard_batches() for sample in range(*LAYOUT.sample_range(*shard))]
    assert by_batch == by_shard == list(range(103))


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
    Manifest(LAYOUT, header or {"checkpoint_sha256": "0"}, shards).write(directory / name)
    return directory / name


def test_manifests_are_merged_when_all_shards_are_listed(tmp_path: Path) -> None:
    assert read_manifests(tmp_path) is None
    assert not merge_manifests(tmp_path)
    write(tmp_path, "manifest-rank0of2.json", SHARDS[::2])
    assert not merge_manifests(tmp_path)
    write(tmp_path, "manifest-rank1of3.json", SHARDS[1:])
    assert merge_manifests(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    merged = Manifest.read(tmp_path / "manifest.json")
    assert merged.shards == SHARDS
    assert merge_manifests(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert (content["format"], content["version"], content["num_samples"]) == ("dynexit record", 1, 3)
    assert content["arrays"]["prediction"] == {"dtype": "int32", "shape": [5, 2, 103]}
    assert content["header"] == {"checkpoint_sha256": "0"}


def test_a_merge_cut_short_by_a_kill_is_finished(tmp_path: Path) -> None:
    write(tmp_path, "manifest.json", SHARDS)
    write(tmp_path, "manifest-rank0of1.json", SHARDS)
    assert merge_manifests(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_manifests_that_differ_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "manifest-rank0of2.json", SHARDS)
    other = write(tmp_path, "manifest-rank1of2.json", (Shard(0, 4, 1, 10, "0" * 8, "1" * 64),))
    remedy = f"move it aside with `mv {tmp_path} {tmp_path}.damaged` and run the same command again to remake it"
    with pytest.raises(Failure) as failure:
        read_manifests(tmp_path)
    assert str(failure.value) == (
        f"{other} lists shard-000000-000004.safetensors once more with other contents (a duplicate); {remedy}"
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
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(Failure) as failure:
            Manifest.read(path)
        assert str(failure.value).startswith(f"{path} is damaged (not a record's manifest: {what}); move it aside with")
    path.write_text(json.dumps({**content, "version": 2}))
    with pytest.raises(UserError, match=f"^{path} has format version 2, this dynexit reads up to 1$"):
        Manifest.read(path)
