"""What a study found, in one sentence and a few figures."""

from collections.abc import Sequence

from dynexit.errors import counted
from dynexit.report.judged.front import FrontEntry
from dynexit.report.table import Summary, percent

_AGAINST = {
    "better": "better than the backbone’s",
    "worse": "worse than the backbone’s",
    "no difference found": "no difference found to the backbone’s",
    "too few samples to tell": "too few samples to tell it from the backbone’s",
}


def within_half(entries: Sequence[FrontEntry], budget: float = 0.5) -> list[FrontEntry]:
    """The front's points within a budget of relative MACs on validation; the last is the headline's."""
    return [one for one in entries if one.validation.on_front and one.validation.relative_macs <= budget]


def headline(entries: Sequence[FrontEntry], budget: float = 0.5) -> str:
    """One sentence: what the best point within a budget of relative MACs (on validation) keeps of the backbone."""
    affordable = within_half(entries, budget)
    whole = next((one for one in entries if one.validation.source == "backbone"), None)
    if not affordable or whole is None:
        return f"{counted(sum(one.validation.on_front for one in entries), 'operating point')} on the front."
    best = affordable[-1]
    text = (
        f"With {percent(best.test.relative_macs, 0)} of the backbone’s MACs this study reaches {best.accuracy} test "
        "accuracy"
    )
    times = "".join(
        f" A batch of {time.batch_size} takes {time.relative_time:.2f} of its time ({time.latency_ms:.3g} ms)."
        for time in best.test.times[:1]
    )
    if best.on_test is None or not best.verdict:
        return f"{text}; the backbone’s is {whole.accuracy}.{times}"
    return f"{text}: {_AGAINST[best.verdict]} {whole.accuracy}; the difference is {best.difference} points.{times}"


def tiles(
    read: Summary, entries: Sequence[FrontEntry], validation_base: float | None, most_lost: float = 0.01
) -> list[dict[str, str]]:
    """The page's first figures, as value and label."""
    found = []
    for whole in [one for one in entries if one.validation.source == "backbone"][:1]:
        limits = whole.accuracy.partition(" (")[2]
        label = "test accuracy of the whole backbone" + (f" ({limits}" if limits else "")
        found.append({"value": percent(read.backbone_accuracy or 0.0), "label": label})
    if read.front:
        found.append({"value": f"{read.front[0].test.relative_macs:.2f}×", "label": "MACs where the front starts"})
    close = [
        one
        for one in entries
        if one.validation.on_front
        and validation_base is not None
        and one.validation.accuracy >= validation_base - most_lost
    ]
    if close:
        change = f" (on test {close[0].difference})" if close[0].difference else ""
        label = f"MACs for a loss within 1 point on validation{change}"
        found.append({"value": f"{close[0].test.relative_macs:.2f}×", "label": label})
    if read.gates_span:
        low, high = read.gates_span
        found.append({"value": f"{low:.2f}–{high:.2f}×", "label": "MACs spanned by the gates"})
    return found
