import re

import pytest

from dynexit.report import terminal
from dynexit.report.terminal import Console, short_table, show_status
from tests.report.synthetic_rows import synthetic_rows


def test_the_table_is_short_and_ends_with_the_backbone_and_the_span():
    lines = short_table(synthetic_rows(accuracy_weights=(0.5, 0.8, 0.95))).splitlines()
    assert lines[0].split() == ["relative", "MACs", "accuracy", "vs", "backbone", "source"]
    assert 5 <= len(lines) <= 14
    assert len({len(line.split(" %")[0]) for line in lines[1:-1]}) == 1, "columns are aligned"
    assert lines[-2].endswith("backbone")
    assert lines[-1] == "the gates span 0.25 to 0.66 relative MACs"


def test_nothing_yet_is_said():
    assert short_table([]) == "no operating points on both validation and test yet"
    assert "backbone" not in short_table([r for r in synthetic_rows() if r.source == "gates"]).splitlines()[-2]


POINTS = [
    {"point": "seed=0", "id": "a1", "state": "done", "figures": "last epoch 4", "log": ""},
    {"point": "seed=[1]", "id": "b2", "state": "failed", "figures": "the loss was [not] finite", "log": ""},
]


def test_states_are_text_outside_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show_status(POINTS, "to do", ["a note"], redraw=False)
    assert capsys.readouterr().out.splitlines() == [
        "dynexit: a note",
        "point     id  state   figures                    log",
        "seed=0    a1  done    last epoch 4",
        "seed=[1]  b2  failed  the loss was [not] finite",
        "report: to do",
        "1 done, 1 failed",
    ]


def test_states_have_colour_on_a_terminal_and_are_redrawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def console(**options: bool) -> Console:
        return Console(force_terminal=True, width=60, color_system="standard", **options)  # type: ignore[arg-type]

    monkeypatch.setattr(terminal, "Console", console)
    show_status(POINTS, "to do", [], redraw=True)
    shown = capsys.readouterr().out
    assert shown.startswith(("\x1b[H\x1b[2J", "\x1b[2J\x1b[H"))
    assert "\x1b[32mdone" in shown
    assert "\x1b[31mfailed" in shown
    assert "[not] finite" in shown  # no markup of ours
    assert "log" not in shown  # an empty column
    assert max(len(line) for line in re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", shown).splitlines()) <= 60
