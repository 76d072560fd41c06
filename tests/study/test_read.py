# ruff: noqa: E501  the sentences that a user reads, whole
"""What a study means: points, ids, and every mistake in one go."""

from pathlib import Path

import pytest
import yaml

from dynexit.errors import UserError
from dynexit.study.data.names import DATA_SETS, TORCHVISION_SETS
from dynexit.study.grid import Study, canonical_json, fixed_values
from dynexit.study.keys import Section, key, parse_weights
from dynexit.study.read import load_study, resolved_yaml
from dynexit.study.schema import SECTIONS, Config
from dynexit.study.validation import ALIASES, all_keys
from tests.command_line import TINY

SMALL = "sweep: {seed: [0, 1], jei_dnn.ce_ic_tradeoff: [0.1, 1]}\n"


def study(tmp_path: Path, text: str = SMALL, *overrides: str) -> Study:
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return load_study(path, overrides)


def mistakes(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        study(tmp_path, text, *overrides)
    return str(caught.value).splitlines()


def test_points_stand_in_the_order_of_the_sweep(tmp_path: Path) -> None:
    points = study(tmp_path).points
    assert [point.label for point in points] == [
        "seed=0 ce_ic_tradeoff=0.1",
        "seed=0 ce_ic_tradeoff=1.0",
        "seed=1 ce_ic_tradeoff=0.1",
        "seed=1 ce_ic_tradeoff=1.0",
    ]
    assert len({point.id for point in points}) == 4
    assert len({point.ids["prepare"] for point in points}) == 1


def test_an_id_is_a_points_and_not_the_grids(tmp_path: Path) -> None:
    before = {point.label: point.ids for point in study(tmp_path).points}
    more = study(tmp_path, "sweep: {jei_dnn.ce_ic_tradeoff: [0.7, 1, 0.1], seed: [1, 0]}\n").points
    after = {f"seed={p.config.seed} ce_ic_tradeoff={p.config.jei_dnn.ce_ic_tradeoff}": p.ids for p in more}
    assert all(after[label] == ids for label, ids in before.items())


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("data.noise=0.2", {"prepare", "train", "record", "bench", "search"}),
        ("train.num_epochs=9", {"train", "record", "search"}),
        ("jei_dnn.head_loss=reference", {"train", "record", "search"}),
        ("record.topk=3", {"record", "search"}),
        ("search.accuracy_weights=0.5:1:0.1", {"search"}),
        ("exits.positions=[0, 1]", {"train", "record", "bench", "search"}),
        ("bench.batch_sizes=[2]", {"bench"}),
        ("search.latency=measured", {"search"}),
        ("search.latency=none", set()),
        ("report.title=x", set()),
        ("dist.num_threads=1", set()),
        ("data.dir=/somewhere", set()),
        ("name=other", set()),
    ],
)
def test_an_id_covers_what_its_job_depends_on(tmp_path: Path, override: str, changed: set[str]) -> None:
    old, new = study(tmp_path).points[1].ids, study(tmp_path, SMALL, override).points[1].ids
    assert {job for job in old if old[job] != new[job]} == changed


def test_the_same_value_written_otherwise_has_the_same_id(tmp_path: Path) -> None:
    a = study(tmp_path, "train: {learning_rate: 1e-2, weight_decay: 0.0005}\njei_dnn: {ce_ic_tradeoff: 1}\n")
    b = study(tmp_path, "jei_dnn: {ce_ic_tradeoff: 1.0}\ntrain: {weight_decay: 5.0e-4, learning_rate: 0.01}\n")
    assert a.points[0].ids == b.points[0].ids


def test_the_resolved_study_reads_as_the_same_study(tmp_path: Path) -> None:
    first = study(tmp_path, SMALL, "train.num_epochs=9", "backbone.arguments.depth=3")
    for with_meanings in (True, False):
        text = resolved_yaml(first, with_meanings=with_meanings)
        again = study(tmp_path, text)
        assert again.points == first.points
        assert again.sweep == first.sweep
    parsed = yaml.safe_load(resolved_yaml(study(tmp_path, "seed: 0")))
    assert set(parsed) == set(Config.model_fields) | {"sweep"}


@pytest.mark.parametrize("text", ["", "# data: {name: digits}\n", "{}"])
def test_an_empty_study_is_a_mistake(tmp_path: Path, text: str) -> None:
    with pytest.raises(
        UserError, match=r"the study .*\.yaml is empty; name at least its data, as `data: {name: digits}`"
    ):
        study(tmp_path, text)
    assert study(tmp_path, text, "data.name=digits").points  # all keys may be overrides


def test_every_key_has_a_meaning() -> None:
    for model in (Config, *SECTIONS.values()):
        for name, field in model.model_fields.items():
            assert name in SECTIONS or field.description, name
    assert {"backbone.name", "backbone.arguments", "train.num_epochs", "jei_dnn.ce_ic_tradeoff"} <= set(all_keys())


def test_overrides_narrow_or_set_the_sweep(tmp_path: Path) -> None:
    assert len(study(tmp_path, SMALL, "seed=5").points) == 2
    assert [p.config.seed for p in study(tmp_path, SMALL, "seed=[3, 4, 5]").points[::2]] == [3, 4, 5]
    assert len(study(tmp_path, SMALL, "sweep.jei_dnn.ce_ic_tradeoff=[1, 2, 3]").points) == 6
    assert study(tmp_path, SMALL, "exits.positions=[1, 2]").config.exits.positions == [1, 2]
    assert study(tmp_path, SMALL, "search.accuracy_weights=[0.5, 1]").config.search.accuracy_weights == [0.5, 1]


def test_all_mistakes_are_told_together(tmp_path: Path) -> None:
    text = """
train: {num_epoch: 5, learning_rate: fast, keep: first}
data: {name: digit, noise: -1}
recrod: {topk: 1}
jei_dnn: {ce_ic_tradeoff: .nan}
sweep: {seed: [], train.batch_size: [1], jei_dnn.head_loss: [paper, papers], seeds: [1]}
"""
    assert mistakes(tmp_path, text) == [
        "jei_dnn.ce_ic_tradeoff = nan: should be a finite number",
        "data.name = 'digit': no data set of this name; did you mean digits? known are "
        f"{', '.join([*DATA_SETS, *TORCHVISION_SETS])}, and of timm torch/NAME, hfds/NAME, hfids/NAME, tfds/NAME, wds/NAME",
        "data.noise = -1: should be greater than or equal to 0",
        "train.learning_rate = 'fast': should be a valid number",
        "train.keep = 'first': should be 'last' or 'best'",
        "train.num_epoch is not a key; did you mean train.num_epochs?",
        "recrod is not a key; did you mean record?",
        "sweep.seed = []: the grid is empty; give at least one value or remove the key",
        "sweep.train.batch_size is not a key; did you mean train.global_batch_size?",
        "sweep.jei_dnn.head_loss = 'papers': should be 'reference', 'paper' or 'single'",
        "sweep.seeds is not a key; did you mean seed?",
    ]


def test_a_swept_value_is_checked_like_any_other(tmp_path: Path) -> None:
    text = "sweep: {jei_dnn.ce_ic_tradeoff: [1, -2], seed: [0, one]}"
    assert mistakes(tmp_path, text) == [
        "sweep.jei_dnn.ce_ic_tradeoff = -2: should be greater than or equal to 0",
        "sweep.seed = 'one': should be a valid integer",
    ]


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("train: {method: dyce, num_epochs: 3}", (), "dyce.num_warm_up_epochs = 5: should be less than train.num_epochs, 3"),
        ("train: {kept_views: 2}", (), "train.kept_views = 2: should be 0 where train.features is fresh; set it to kept"),
        ("train: {kept_precision: bf16}", (), "train.kept_precision = 'bf16': needs train.features=kept"),
        ("train: {method: dyce, features: kept}", ("dyce.mixup=0",), "train.features = 'kept': should be fresh where dyce.mixup = 0 and dyce.cutmix = 1 mix images; or set both to 0"),
        ("train: {method: dyce}", ("dyce.min_learning_rate=0.1",), "dyce.min_learning_rate = 0.1: should be at most dyce.learning_rate, 0.000625"),
        ("train: {method: boosted}", ("exits.head_types=[linear, mlp2x9]",), "exits.head_types = ['linear', 'mlp2x9']: should be one head type where train.method is boosted; dyce, independent and probe take several"),
        ("sweep: {train.method: [jei_dnn, dyce]}", ("search.confidence=gate",), "sweep.train.method = 'dyce': search.confidence = 'gate': should be another where train.method is dyce, which trains no gates"),
        ("seed: 1\nsweep: {seed: [0]}", (), "seed is both set and swept; keep one of the two"),
        ("sweep: {seed: 3}", (), "sweep.seed = 3: should be a list of values"),
        ("sweep: {seed: [1, 1]}", (), "sweep.seed = [1, 1]: has a duplicate value"),
        ("sweep: {data.dir: [a, b]}", (), "sweep.data.dir: results do not depend on this key; give one value, or make a study for each"),
        ("sweep: {exits.positions: [[1], [2], [1]]}", (), "sweep.exits.positions = [[1], [2], [1]]: has a duplicate value"),
        ("", (f"sweep.seed={list(range(1001))}", f"sweep.data.seed={list(range(1000))}"), "sweep: 1,001,000 points; at most 1,000,000 are allowed; shorten a list, or make two studies"),
        ("", (f"name={'n' * 201}",), f"name = '{'n' * 119}... (203 characters): string should have at most 200 characters"),
        ("sweep: {dist.device: [cpu]}", (), "sweep.dist.device: the sections that can be swept are data, backbone, prepare, seed, exits, train, jei_dnn, boosted, weighted, probe, dyce, record, search, bench"),
        ("", ("train.num_epochs",), "'train.num_epochs' should be key.path=value, as train.num_epochs=30"),
        ("", ("train.num_epochs=2.5",), "train.num_epochs = 2.5: should be a valid integer"),
        ("", ("exits.positions=some",), "exits.positions = 'some': should be 'all' or 'last', or should be a valid list"),
        ("", ("exits.positions=[-1]",), "exits.positions.0 = -1: should be greater than or equal to 0"),
        ("", ("exits.head_types=[mlp]",), "exits.head_types.0 = 'mlp': should be linear, or mlpNxW of N layers and width W, as mlp3x500"),
        ("", ("sweep=[1]",), "sweep = [1]: name the key that varies, as sweep.seed=[0, 1]"),
        ("", ("search.accuracy_weights=0.5-1",), "search.accuracy_weights = '0.5-1': should be LO:HI:STEP, as 0.4:1:0.01, or a list of numbers"),
    ],
)  # fmt: skip
def test_what_a_mistake_is_called(tmp_path: Path, text: str, overrides: tuple[str, ...], expected: str) -> None:
    assert mistakes(tmp_path, text, *overrides) == [expected]


def test_files_that_are_no_study(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no study .*missing\.yaml; give the path of a YAML file"):
        load_study(tmp_path / "missing.yaml")
    assert mistakes(tmp_path, "train: [")[0].startswith(f"the study {tmp_path / 'small.yaml'} cannot be read as YAML: ")
    assert mistakes(tmp_path, "- a")[0].endswith("should hold keys, as `train:`, not list")
    assert mistakes(tmp_path, "seed: 1\nseed: 2")[0].endswith("as YAML: duplicate key 'seed' (line 2, column 1)")


METHODS = (
    "train: {num_epochs: 9}\nsweep: {train.method: [jei_dnn, dyce, independent], jei_dnn.ce_ic_tradeoff: [0.1, 1]}\n"
)


def test_a_methods_section_counts_only_for_its_own_points(tmp_path: Path) -> None:
    before = study(tmp_path, METHODS)
    assert [point.label for point in before.points] == [
        "method=jei_dnn ce_ic_tradeoff=0.1",
        "method=jei_dnn ce_ic_tradeoff=1.0",
        "method=dyce",
        "method=independent",
    ]
    after = study(tmp_path, METHODS, "dyce.mixup=0.0", "boosted.shrinkage=0.1").points
    changed = [old.id != new.id for old, new in zip(before.points, after, strict=True)]
    assert changed == [False, False, True, False]
    again = study(tmp_path, resolved_yaml(before))
    assert (again.points, again.sweep) == (before.points, before.sweep)


def test_zipped_keys_take_their_values_together(tmp_path: Path) -> None:
    text = "sweep: {exits.head_types: [[linear], [mlp2x7]], zip: {seed: [0, 1, 1], data.seed: [4, 5, 6]}}"
    first = study(tmp_path, text)
    assert [(p.config.exits.head_types[0], p.config.seed, p.config.data.seed) for p in first.points] == [
        (head, *seeds) for head in ("linear", "mlp2x7") for seeds in ((0, 4), (1, 5), (1, 6))
    ]
    assert first.points[0].label == "head_types=['linear'] seed=0 data.seed=4"
    again = study(tmp_path, resolved_yaml(first))
    assert (again.points, again.sweep, again.zipped) == (first.points, first.sweep, first.zipped)
    assert [p.config.seed for p in study(tmp_path, text, "data.seed=9").points] == [0, 1, 0, 1]
    uneven = "sweep: {zip: {seed: [0, 1], data.seed: [4]}}"
    message = "sweep.zip: its lists go together and should be equally long, but seed has 2, data.seed has 1"
    assert mistakes(tmp_path, uneven) == [message]
    assert mistakes(tmp_path, "sweep: {zip: {sed: [1]}}") == ["sweep.sed is not a key; did you mean seed?"]
    two = study(
        tmp_path,
        "sweep: {zip: [{seed: [0, 1], data.seed: [4, 5]}, {train.num_epochs: [8, 9], train.keep: [last, best]}]}",
    )
    values = [(p.config.seed, p.config.data.seed, p.config.train.num_epochs, p.config.train.keep) for p in two.points]
    assert values == [(0, 4, 8, "last"), (0, 4, 9, "best"), (1, 5, 8, "last"), (1, 5, 9, "best")]
    again = study(tmp_path, resolved_yaml(two))
    assert (again.points, again.sweep, again.zipped) == (two.points, two.sweep, two.zipped)
    assert mistakes(tmp_path, "sweep: {zip: [{seed: [0]}, {seed: [1]}]}")[0].endswith(
        "or be a list of several such groups"
    )
    assert mistakes(tmp_path, "sweep: {zip: 3}")[0].startswith("sweep.zip = 3: should map keys that are swept nowhere")


def test_an_entry_of_a_zip_is_checked_as_a_whole(tmp_path: Path) -> None:
    text = "sweep: {jei_dnn.ce_ic_tradeoff: [0.1, 1], zip: {train.method: [jei_dnn, %s], exits.head_types: [[linear], [linear, mlp2x7]]}}"
    points = study(tmp_path, text % "probe").points
    assert [(p.method, len(p.config.exits.head_types)) for p in points] == [
        ("jei_dnn", 1),
        ("probe", 2),
        ("jei_dnn", 1),
    ]
    assert mistakes(tmp_path, text % "boosted") == [
        "sweep.zip, entry 2: exits.head_types = ['linear', 'mlp2x7']: should be one head type where train.method is "
        "boosted; dyce, independent and probe take several"
    ]
    assert mistakes(tmp_path, text % "boostd")[0].startswith("sweep.train.method = 'boostd': should be one of")


def test_a_methods_name_says_what_of_it_is_swept(tmp_path: Path) -> None:
    plain = study(tmp_path, SMALL, "train.distillation=0.02", "search.confidence=gate")
    assert {point.method for point in plain.points} == {"jei_dnn"}
    text = "sweep: {train.distillation: [0, 0.02], search.confidence: [max_probability, gate]}\n"
    names = [point.method for point in study(tmp_path, text).points]
    assert names == ["jei_dnn", "jei_dnn (gate)", "jei_dnn (distilled 0.02)", "jei_dnn (distilled 0.02, gate)"]
    text = "sweep: {zip: {train.method: [jei_dnn, probe, probe], exits.reader: [null, null, grid2], exits.stem: [false, false, true], exits.whiten: [false, true, true]}}"
    names = [point.method for point in study(tmp_path, text).points]
    assert names == ["jei_dnn", "probe (reader default)", "probe (reader grid2)"]
    assert [point.method for point in study(tmp_path, "sweep: {exits.head_types: [[linear], [mlp2x7]]}").points] == [
        "jei_dnn (linear)",
        "jei_dnn (mlp2x7)",
    ]


def test_weights_do_not_drift() -> None:
    weights = parse_weights("0.4:1:0.01")
    assert len(weights) == 61
    assert weights[30] == 0.7
    assert weights[-1] == 1.0
    assert parse_weights("0.5:0.9:0.2") == [0.5, 0.7, 0.9]
    assert parse_weights("1:1:0.3") == [1.0]
    assert len(parse_weights("0:1:1e-6")) == 1_000_001


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("0:1:0.3", "its steps end at 0.9, not at 1; give a STEP of 0.25 or 0.5, or 0.9 as HI"),
        ("0.5:0.95:0.2", "its steps end at 0.9, not at 0.95; give a STEP of 0.15 or 0.225, or 0.9 as HI"),
        ("0.4:1:0.7", "its steps end at 0.4, not at 1; give a STEP of 0.6, or 0.4 as HI"),
        ("0:1:0.333333333", "its steps end at 0.999999999, not at 1; give a STEP of 0.25 or 0.5, or 0.999999999 as HI"),
        ("0:1:1e-9", "has more than 1,000,000 steps; give a larger STEP"),
        ("0:1:1e-99999999", "has more than 1,000,000 steps; give a larger STEP"),
        ("0.5:1:0", "should be LO:HI:STEP with 0 <= LO <= HI <= 1 and STEP > 0"),
    ],
)
def test_ranges_that_are_refused(tmp_path: Path, spec: str, expected: str) -> None:
    assert mistakes(tmp_path, "", f"search.accuracy_weights={spec}") == [
        f"search.accuracy_weights = {spec!r}: {expected}"
    ]


def test_fixed_values_are_those_of_the_prepared_backbone(tmp_path: Path) -> None:
    values = fixed_values(study(tmp_path, "sweep: {data.seed: [0, 1], seed: [0, 1]}"))
    assert values["prepare.num_epochs"] == 20
    assert {name.partition(".")[0] for name in values} == {"data", "backbone", "prepare"}
    assert not {"data.seed", "data.dir", "prepare.compile"} & set(values)


def test_labels_have_the_keys_that_tell_points_apart(tmp_path: Path) -> None:
    zipped = "zip: {seed: [0, 1, 2], data.seed: [7, 8, 9]}"
    text = (
        f"sweep: {{train.method: [weighted, dyce], dyce.learning_rate: [0.1], weighted.learning_rate: [1], {zipped}}}"
    )
    points = study(tmp_path, text).points
    assert [point.label for point in points[2:4]] == [
        "method=weighted seed=2",
        "method=dyce seed=0",
    ]
    assert points[2].values == {
        "method": "weighted",
        "dyce.learning_rate": "-",
        "weighted.learning_rate": 1.0,
        "seed": 2,
        "data.seed": 9,
    }
    assert study(tmp_path, "sweep: {seed: [4], search.confidence: [margin]}").points[0].label == "the only point"
    finer = "zip: {train.num_epochs: [7, 7, 8], train.keep: [last, best, best]}"
    points = study(tmp_path, f"sweep: {{exits.stem: [false, true], {finer}}}").points
    assert len({point.label for point in points}) == 6
    assert study(tmp_path, "seed: 0").points[0].label == "the only point"


def test_ten_thousand_points_are_planned_quickly(tmp_path: Path) -> None:
    tradeoffs = [i / 10 for i in range(100)]
    text = f"sweep: {{seed: {list(range(100))}, jei_dnn.ce_ic_tradeoff: {tradeoffs}}}"
    assert len({point.id for point in study(tmp_path, text).points}) == 10_000


def test_a_range_of_weights_is_no_number_of_minutes(tmp_path: Path) -> None:
    for text in ("search: {accuracy_weights: 0:1:0.25}", ""):
        found = study(tmp_path, text, "search.accuracy_weights=0:1:0.25")
        assert found.config.search.accuracy_weights == "0:1:0.25"


def test_names_of_other_programs_lead_to_the_key(tmp_path: Path) -> None:
    for name, meant in (
        ("arch", "backbone.name"),
        ("dataset", "data.name"),
        ("lr", "train.learning_rate"),
        ("prepare.lr", "prepare.learning_rate"),
        ("b", "train.global_batch_size"),
        ("batch_size", "train.global_batch_size"),
        ("num_epoch", "train.num_epochs"),
        ("prepare.epochs", "prepare.num_epochs"),
        ("weights-path", "backbone.weights"),
        ("backbone.arch", "backbone.name"),
        ("ce_ic_tradeoff", "jei_dnn.ce_ic_tradeoff"),
    ):
        assert mistakes(tmp_path, "", f"{name}=1") == [f"{name} is not a key; did you mean {meant}?"]
    assert set(ALIASES.values()) <= set(all_keys())


def test_an_omitted_default_is_no_part_of_an_id() -> None:
    class Old(Section):
        width: int = key(3, "width")

    class New(Section):
        width: int = key(3, "width")
        names: list[str] = key(list, "names", omit_default=True)
        depth: int | None = key(None, "depth", omit_default=True)

    assert canonical_json(New()) == canonical_json(Old()) == '{"width":3}'
    assert canonical_json(New(depth=2, names=["a"])) == '{"depth":2,"names":["a"],"width":3}'


def test_ids_of_finished_studies_stay() -> None:
    """Ids as they were when digits' splits became stratified: keys at defaults that keep old results are not in them."""
    ids = load_study(TINY, []).points[0].ids
    assert ids == {
        "prepare": "de507b465065",
        "train": "3c62322ff2cf",
        "record": "a88ff7fff6ca",
        "bench": "5c08e479a019",
        "search": "c4ffe2b6e95b",
    }
