"""What is known of a point from the files it left: no model, no tensors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynexit.errors import UserError
from dynexit.run_dir import DONE, FAILED, job_dir, read_json
from dynexit.sweep import Point, digest

BACKBONE, HEADS, COSTS, METRICS, CONFIG = (  # what jobs leave in their folders
    "backbone.safetensors",
    "heads.safetensors",
    "costs.json",
    "metrics.jsonl",
    "config.json",
)
BUDGETS = "budgets.json"
MEMBERS, BEGUN = "members.json", ".begun"  # of a pack: its points; and there from its beginning until it is through
JOBS_OF_A_POINT = ("prepare", "train", "record", "search")


def finished_jobs(point: Point, study_dir: Path) -> list[str]:
    """The jobs of the point that left DONE, in order."""
    return [job for job in JOBS_OF_A_POINT if (job_dir(study_dir, job, point.ids[job]) / DONE).is_file()]


def failure_reason(point: Point, study_dir: Path) -> str | None:
    """Why the point's training failed, or None."""
    try:
        reason: str = read_json(job_dir(study_dir, "train", point.id) / FAILED)["reason"]
    except FileNotFoundError:
        return None
    return reason


def missing_reason(point: Point, study_dir: Path) -> str:
    """Why a point is not in the report, as a sentence."""
    finished = finished_jobs(point, study_dir)
    missing = next((job for job in JOBS_OF_A_POINT if job not in finished), "report")
    return failure_reason(point, study_dir) or f"{point.label}: {missing} is not done"


def check_budgets(points: Sequence[Point], study_dir: Path) -> None:
    """Raises UserError for a budget that none of a study's searched points attains, with the nearest that one does.

    A budget that some attain is met by the best of them.
    """
    attained: set[tuple[str, float]] = set()
    refused: dict[tuple[str, float], dict[float, str]] = {}
    for point in points:
        settings = point.config.search
        if not (
            settings.relative_macs or settings.relative_latency or settings.min_accuracy or settings.max_accuracy_drop
        ):
            continue
        for entry in read_json(job_dir(study_dir, "search", point.ids["search"]) / BUDGETS):
            ((kind, value), *_) = entry["budget"].items()
            if "unattainable" in entry:
                told = f"{entry['unattainable']} ({point.label})"
                refused.setdefault((kind, value), {}).setdefault(entry["nearest"], told)
            else:
                attained.add((kind, value))
    texts = [
        told[max(told) if kind == "min_accuracy" else min(told)]
        for (kind, value), told in refused.items()
        if (kind, value) not in attained
    ]
    if texts:
        raise UserError("; ".join(texts))


def _searched(point: Point, study_dir: Path) -> Any:
    try:
        return read_json(job_dir(study_dir, "search", point.ids["search"]) / DONE)
    except FileNotFoundError:
        return None


def report_identity(points: Sequence[Point], study_dir: Path) -> str:
    """The id of a report: every point in it and what its search found, those that failed, and the report's settings."""
    found = [[point.ids["search"], _searched(point, study_dir)] for point in points]
    return digest([found, points[0].config.report.model_dump(mode="json")])
