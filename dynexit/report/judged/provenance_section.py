"""The page's part on where the results come from."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dynexit.contents import Provenance
from dynexit.provenance import read_provenance
from dynexit.report.page import PageSection
from dynexit.run_dir import RunDir
from dynexit.study.grid import Point

_WHAT = (
    "What did each stage, where and how long; provenance.json in each job's folder has more. Points of one job share "
    "its time, which is that of the attempt that finished it, and of the report until it wrote this page. Images/s are "
    "of a rank, in the median of the jobs; waiting for data and memory (of the GPU where there is one) are the largest "
    "of them. Another instruction set or package version gives other last bits."
)
_FOLDED = "Code, packages and commands of each stage"


def provenances(points: Sequence[Point]) -> dict[str, list[Provenance]]:
    """What the points' jobs left, by stage; a job's once."""
    found: dict[str, dict[tuple[Any, ...], Provenance]] = {}
    for point in points:
        for stage in point.stages:
            one = read_provenance(RunDir(point, stage).path)
            if one is not None:
                found.setdefault(stage, {}).setdefault((one["host"], one["started"], one["seconds"]), one)
    return {stage: list(jobs.values()) for stage, jobs in found.items()}


def provenance_section(points: Sequence[Point], report: Provenance) -> PageSection:
    """The section, a row per stage, that of the page's own job last."""
    jobs = {**provenances(points), "report": [report]}
    table = [_cells(stage, own) for stage, own in jobs.items()]
    folded = [(_FOLDED, [_origin_cells(stage, own) for stage, own in jobs.items()])]
    return PageSection("Provenance", _WHAT, table, folded=folded)


def _cells(stage: str, jobs: Sequence[Provenance]) -> Mapping[str, Any]:
    gpu_hours = sum(job["gpu_hours"] for job in jobs)
    return {
        "stage": stage,
        "jobs": len(jobs),
        "hours": f"{sum(job['seconds'] for job in jobs) / 3600:.4f}",
        **({"GPU-hours": f"{gpu_hours:.4f}"} if gpu_hours else {}),
        **_speed(jobs),
        "from (UTC)": min(job["started"] for job in jobs)[:16].replace("T", " "),
        "machine": _each(f"{job['cpu']} ({job['instruction_set']}) {_gpu(job)}".strip() for job in jobs),
    }


def _origin_cells(stage: str, jobs: Sequence[Provenance]) -> Mapping[str, Any]:
    versions = [{"python": job["python"], "dynexit": job["dynexit"], **job["packages"]} for job in jobs]
    return {
        "stage": stage,
        "commit": _each(job["commit"][:12] + job["commit"][40:] for job in jobs),
        "packages": _each(", ".join(f"{name} {version}" for name, version in of.items()) for of in versions),
        "command": _each(job["command"] for job in jobs),
    }


def _speed(jobs: Sequence[Provenance]) -> dict[str, str]:
    cells = {}
    if rates := [job["images_per_second_per_rank"] for job in jobs if "images_per_second_per_rank" in job]:
        cells["images/s"] = f"{statistics.median(rates):.0f}"
        cells["waiting for data"] = f"{100 * max(job.get('share_waiting_for_data', 0.0) for job in jobs):.0f} %"
    if peak := max(job.get("peak_memory_bytes", 0) for job in jobs):
        cells["peak memory"] = f"{peak / 2**20:.0f} MiB"
    return cells


def _gpu(job: Provenance) -> str:
    return f"{job['gpu']}, driver {job['driver']}" if job.get("driver") else job["gpu"]


def _each(texts: Any) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))
