"""YAML as a study holds it: numbers, comments, types, and text of any character."""

from pathlib import Path

import pytest

from dynexit.errors import UserError
from dynexit.study.read import load_study
from dynexit.study.yaml_text import parse_yaml, to_yaml
from launch.__main__ import main


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    path = tmp_path / "s.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_study(path, overrides)
    return str(caught.value).replace(str(path), "s.yaml")


UNSUPPORTED = "is not supported; write text, a number, true, false, null, a list or a mapping"
NUMBERS = [
    ("10", 10), ("-3", -3), ("+5", 5), ("0", 0), ("-0", 0), ("1e-3", 0.001), ("0.5", 0.5), (".5", 0.5), ("1.", 1.0),
    ("1e05", 1e5), ("0x10", "0x10"), ("0o17", "0o17"), ("1_000", "1_000"), ("0:1:0.25", "0:1:0.25"), ("٣", "٣"),
    ("'010'", "010"), ("1.0.0", "1.0.0"), ("true", True), ("null", None), ("=", "="),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_scalars(text: str, value: object) -> None:
    for comments in (True, False):
        found = parse_yaml(text, comments=comments)
        assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "instead"), [("010", "10"), ("08", "8"), ("-007", "-7"), ("00", "0"), ("00.5", "0.5"), ("01e3", "1e3")]
)
def test_leading_zeros_are_refused(tmp_path: Path, text: str, instead: str) -> None:
    expected = f"seed = {text}: starts with a zero; write {instead}, or put it in quotes if it is text"
    assert refusal(tmp_path, f"seed: {text}") == expected
    assert refusal(tmp_path, "", f"seed={text}") == expected
    assert refusal(tmp_path, f"sweep: {{seed: [1, {text}]}}") == "sweep.seed.1" + expected.removeprefix("seed")


def test_an_override_has_no_comments(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("seed: 3 # three\n", encoding="utf-8")
    assert load_study(path).config.seed == 3
    for text, title in (
        ("run #2", "run #2"),
        ("#2", "#2"),
        ("'a # b'", "a # b"),
        ('"\\u0023 a"', "# a"),
        ("\ue000 #", "\ue000 #"),
    ):
        assert load_study(path, [f"report.title={text}"]).config.report.title == title
    assert load_study(path, ["backbone.arguments={a: '#1', '#': 2}"]).config.backbone.arguments == {"a": "#1", "#": 2}
    assert refusal(tmp_path, "", "name=a #2").startswith("name = 'a #2': string should match pattern")
    assert refusal(tmp_path, "", "seed=3 # three") == "seed = '3 # three': should be a valid integer"
    assert refusal(tmp_path, "", "seed=[0, 1] # two").endswith("(line 1, column 8); an override has no comments")


def test_merge_keys_are_refused_by_name(tmp_path: Path) -> None:
    merge = "merge keys (<<) are not supported; write the keys out"
    text = "data: &a {seed: 1}\ntrain: {<<: *a}\n"
    assert refusal(tmp_path, text) == f"the study s.yaml cannot be read as YAML: {merge} (line 2, column 9)"
    override = "train={<<: {num_epochs: 9}}"
    message = f"train: '{{<<: {{num_epochs: 9}}}}' is not a YAML value: {merge} (line 1, column 2)"
    assert refusal(tmp_path, "", override) == message


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2024-01-01", "x = 2024-01-01: is a date in YAML; put it in quotes if it is text"),
        ("2024-13-99", "x = 2024-13-99: is a date in YAML; put it in quotes if it is text"),
        ("!!binary aGk=", "x = !!binary: " + UNSUPPORTED),
        ("!!set {a, b}", "x = !!set: " + UNSUPPORTED),
        ("!mine 3", "x = !mine: " + UNSUPPORTED),
        (".inf", "x = inf: should be a finite number"),
        ("1e999", "x = inf: should be a finite number"),
        ("{1: 2}", "x.1: a key should be text; put 1 in quotes"),
        ("{on: 2}", "x.True: a key should be text; put True in quotes"),
        ("[a, [.nan]]", "x.1.0 = nan: should be a finite number"),
        ("9" * 5000, f"x = {'9' * 120}... (5,000 characters): is not a number, or has too many digits"),
        ("!!int many", "x = many: is not a number, or has too many digits"),
        ('"\\ud83d"', "x = '\\ud83d': holds half of a character (a surrogate); write \\U and eight digits"),
    ],
)  # fmt: skip
def test_values_that_json_lacks_are_refused_with_the_key(tmp_path: Path, value: str, expected: str) -> None:
    assert refusal(tmp_path, f"backbone: {{arguments: {{x: {value}}}}}") == f"backbone.arguments.{expected}"
    assert refusal(tmp_path, "", f"backbone.arguments.x={value}") == f"backbone.arguments.{expected}"


def test_all_refused_values_are_reported_together(tmp_path: Path) -> None:
    text = "report: {title: 2024-01-01}\nsweep: {seed: [010]}\ntrain: {num_epoch: 3}\n"
    assert refusal(tmp_path, text).splitlines() == [
        "report.title = 2024-01-01: is a date in YAML; put it in quotes if it is text",
        "sweep.seed.0 = 010: starts with a zero; write 10, or put it in quotes if it is text",
        "train.num_epoch is not a key; did you mean train.num_epochs?",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("backbone: &x {arguments: {y: *x}}", "an alias (*) is inside its own anchor (&)"),
        ("[" * 5000, "it is nested deeper than 50 levels (line 1, column 51)"),
        ("a: [" + "1, " * 100_000 + "]", "it holds more than 100,000 values once its aliases (*) are written out"),
        (
            "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else '1'] * 9)}]" for i in range(9)),
            "it holds more than 100,000 values once its aliases (*) are written out",
        ),
        ("? [1, 2]\n: 3", "a key should be text (line 1, column 3)"),
        ("seed: !!bool maybe", "a value does not fit its tag: 'maybe'"),
        ("'seed': 1\nseed: 2", "duplicate key 'seed' (line 2, column 1)"),
    ],
)
def test_text_that_is_refused_whole(tmp_path: Path, text: str, fault: str) -> None:
    assert refusal(tmp_path, text) == f"the study s.yaml cannot be read as YAML: {fault}"


TEXTS = [
    "\U0001f600 caf\u00e9",
    "\U0010ffff\uffff\ufeff",
    "\x00\x1f\x7f\x85\u2028\t\n",
    r"\ud83d\ude00",
    "\\\U0001f600",
    "# a: 'b'",
]


def test_any_text_survives_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    for title in TEXTS:
        first.write_text(f"report: {{title: {to_yaml(title)}}}\n", encoding="utf-8")
        assert main(["config", str(first)]) == 0
        second.write_text(capsys.readouterr().out, encoding="ascii")
        assert load_study(second).config.report.title == title
    first.write_text("report: {title: \U0001f600}\n", encoding="utf-8")
    assert main(["config", str(first)]) == 0
    assert '  title: "\\U0001F600"\n' in capsys.readouterr().out
