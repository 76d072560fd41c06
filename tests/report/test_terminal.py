from dynexit.report.terminal import short_table
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
