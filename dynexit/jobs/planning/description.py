"""A plan as text, for --dry-run."""

import os
from collections.abc import Sequence

from dynexit.errors import counted
from dynexit.jobs.finished import report_is_done
from dynexit.jobs.planning.missing import Job, missing_jobs
from dynexit.study.grid import Study


def describe_plan(study: Study, stages: Sequence[str], where: str) -> str:
    """Points, packs, ids and resources of what would be done, as text."""
    dist = study.config.dist
    lines = [f"study {study.config.name}: {counted(len(study.points), 'point')} in {study.directory}"]
    lines += [f"  point {point.id}  {point.label}" for point in study.points]
    lines += [f"  baseline {point.id}  {point.label}" for point in study.static]
    left = study
    for stage in stages:
        if stage == "report":
            lines.append("report: " + ("done" if report_is_done(study.points) else "1 job"))
            continue
        jobs = missing_jobs(left, stage)
        lines.append(f"{stage}: {counted(len(jobs), 'job')}" if jobs else f"{stage}: done")
        lines += [f"  {_job_line(job)}" for job in jobs]
    threads = dist.num_threads or os.cpu_count()
    lines.append(
        f"resources: --on {where}, device {dist.device}, {counted(threads or 1, 'thread')} a process, "
        f"{counted(dist.num_workers, 'loading process', 'loading processes')}, at most "
        f"{counted(dist.members_per_pack, 'point')} a pack"
    )
    return "\n".join(lines)


def _job_line(job: Job) -> str:
    ids = list(dict.fromkeys(point.ids[job.stage] for point in job.points))
    shown = " ".join(ids[:4]) + (f" ... {ids[-1]}" if len(ids) > 5 else "" if len(ids) < 5 else f" {ids[4]}")
    return f"{job.name}: {shown}"
