"""Submitting a study to SLURM through submitit: everything at once, chained by dependencies."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import submitit

from dynexit.errors import Failure, UserError
from dynexit.study.grid import Study
from launch.plan import Job, done_together
from launch.slurm import cluster
from launch.slurm.arrays import Array, Live, plan_arrays, resolve
from launch.slurm.job_script import script_after, script_before
from launch.slurm.site import Site, site_contradictions
from launch.slurm.submissions import Submission, check_strays, live_jobs, settled_jobs
from launch.slurm.worker import ClusterTask


class _Executor(submitit.SlurmExecutor):
    """Submitit's, also where there is no SLURM: the text of a script can be made anywhere."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self, num_tasks: int) -> str:
        """The text that sbatch would get."""
        if num_tasks > 1:
            self.parameters["map_count"] = num_tasks
        text: str = self._make_submission_file_text(self._submitit_command_str, "")
        return text


def submit_study(study: Study, stages: Sequence[str], site: Site) -> list[str]:
    """Submits what is missing and returns at once: a line for every array. The caller holds the study.

    Raises UserError where the cluster could never run it, Failure where sbatch refuses; what was submitted before that
    is cancelled.
    """
    if not cluster.is_here():
        raise UserError("there is no sbatch on this machine; submit from a node of the cluster, or run --on here")
    check_site(study, site)
    dist = study.config.dist
    cluster.check_request(site, dist.nodes, site.minutes(dist))
    check_strays(study.directory)
    queued = settled_jobs(study.directory)
    arrays = plan_arrays(study, stages, _limits(site), _live(queued))
    if not arrays:
        return [f"{study.directory}: nothing to submit, all of it is done or in the queue"]
    lines = _rehearse(study, site, arrays)
    submission = Submission(study, site.model_dump(mode="json"))
    job_ids: list[str] = []
    for array in arrays:
        after = resolve(array.after, job_ids, lambda i: len(arrays[i].tasks) > 1)
        executor = _executor(study, site, array, after, submission.folder)
        try:
            with _outside_of_jobs():
                jobs = executor.submit_array([_task(study, site, jobs) for jobs in array.tasks])
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            words = " ".join(str(error).split())
            raise Failure(f"sbatch refused {describe_array(array)}: {words}{submission.take_back()}") from error
        submission.add([job.job_id for job in jobs], array.stage, array.work())
        job_ids.append(jobs[0].job_id.partition("_")[0])
        lines.append(f"{describe_array(array)}: job {job_ids[-1]}" + (f" after {after}" if after else ""))
    reports = [job.job_id for job, _ in queued if job.stage == "report"]
    if reports and arrays[-1].stage == "report":
        cluster.cancel_jobs(reports)  # the new one covers what they would have, and two must not write one page
    return [*lines, f"logs: {submission.folder}"]


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hides what SLURM told the job that this process runs in, and options of sbatch that go before a script's."""
    kept = {name: os.environ[name] for name in os.environ if name in cluster.OF_USERS}
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        yield


def _rehearse(study: Study, site: Site, arrays: Sequence[Array]) -> list[str]:
    """Asks before the first submission what SLURM will say to the last: sentences on the stages that are to wait.

    Raises UserError with what it would refuse.
    """
    waiting: dict[str, list[str]] = {}
    largest: dict[str, Array] = {}
    for array in arrays:
        largest.setdefault(array.stage, array)
    for array in largest.values():
        script = _executor(study, site, array, "", study.directory / "slurm" / "NNNN").script(len(array.tasks))
        try:
            reason = cluster.rehearse(script, site.partition)
        except UserError as refusal:
            raise UserError(f"the cluster would not take {describe_array(array)}: {refusal}") from None
        if reason:
            waiting.setdefault(reason, []).append(array.stage)
    return [
        f"{', '.join(stages)}: will wait, since as the cluster is now no node can run it ({reason})"
        for reason, stages in waiting.items()
    ]


def _limits(site: Site) -> cluster.Limits:
    return cluster.limits(site, sum(entry.is_live for entry in cluster.queue().values()))


def _live(queued: Sequence[tuple[Any, Any]]) -> Live:
    return {(job.stage, identity): job.job_id for job, _ in queued for identity in job.work}


def describe_submission(study: Study, stages: Sequence[str], site: Site) -> str:
    """What `submit_study` would submit: arrays, packs, what it may cost, and the text that sbatch would get."""
    check_site(study, site)
    notes = []
    try:
        cluster.check_request(site, study.config.dist.nodes, site.minutes(study.config.dist))
        limits, live = _limits(site), _live(live_jobs(study.directory))
    except Failure as failure:  # a plan can be looked at anywhere
        notes.append(f"no cluster answers here ({failure}): its limits and queue are left out")
        limits, live = cluster.Limits(site.max_array_size or cluster.DEFAULT_ARRAY_SIZE, site.max_submit_jobs), {}
    arrays = plan_arrays(study, stages, limits, live)
    notes += [] if notes else _rehearse(study, site, arrays)
    blocks = [*notes, f"queue: {len(arrays)} submissions, {sum(len(array.tasks) for array in arrays)} jobs"]
    blocks.append(_expected_hours(study, site, arrays))
    for i, array in enumerate(arrays):
        after = resolve(array.after, [f"<{n}>" for n in range(i)], lambda n: len(arrays[n].tasks) > 1)
        executor = _executor(study, site, array, after, study.directory / "slurm" / "NNNN")
        blocks.append(f"<{i}> {describe_array(array)}\n{executor.script(len(array.tasks))}")
    return "\n".join(blocks)


def describe_array(array: Array) -> str:
    """An array in words: stage, tasks, packs."""
    counts = [(len(array.tasks), "task"), *([(_num_packs(array), "pack")] * (array.stage in ("train", "record")))]
    return f"{array.stage}: " + ", ".join(f"{count} {word}{'s' * (count > 1)}" for count, word in counts)


def _num_packs(array: Array) -> int:
    return sum(job.stage == array.stage for jobs in array.tasks for job in jobs)


def _expected_hours(study: Study, site: Site, arrays: Sequence[Array]) -> str:
    """What it costs if every pack takes its whole time, also where a task does several in turn."""
    dist = study.config.dist
    minutes = site.minutes(dist)
    together = alone = 0
    for array in arrays:
        together += _num_packs(array) * done_together(array.stage, dist)
        alone += _num_packs(array) * (array.stage == "prepare" and not done_together("prepare", dist))
    if site.gpus_per_node:
        hours, unit = minutes / 60 * (together * dist.nodes * site.gpus_per_node + alone), "GPU-hours"
    else:
        ranks = together * dist.nodes * dist.tasks_per_node + alone
        hours, unit = minutes / 60 * ranks * site.cpus(dist), "CPU-hours"
    return (
        f"expected: {hours:,.1f} {unit} if every pack takes the whole {minutes} minutes of the time limit; less as it "
        "is through sooner, more where one times out and goes on"
    )


def _task(study: Study, site: Site, jobs: tuple[Job, ...]) -> ClusterTask:
    dist = study.config.dist
    return ClusterTask(jobs, 60.0 * site.minutes(dist), site.delay_seconds(dist))


def _executor(study: Study, site: Site, array: Array, after: str, folder: Path) -> _Executor:
    """submitit's executor for one array."""
    dist = study.config.dist
    together = done_together(array.stage, dist)
    executor = _Executor(folder)
    executor.python = f"{site.container} {executor.python}".strip()
    gpus = site.gpus_per_node if together else min(site.gpus_per_node, int(array.stage == "prepare"))
    options = {name.replace("_", "-"): value for name, value in site.sbatch.items()}
    executor.update_parameters(
        wckey=None,  # submitit's own, which not every cluster knows
        job_name=f"{study.config.name}-{array.stage}"[:60],
        time=site.minutes(dist),
        nodes=dist.nodes if together else 1,
        ntasks_per_node=dist.tasks_per_node if together else 1,
        cpus_per_task=site.cpus(dist),
        signal_delay_s=site.delay_seconds(dist),
        array_parallelism=site.array_parallelism,
        setup=[*site.shell_lines(dist), *script_before(folder.absolute())],
        teardown=script_after(_task(study, site, array.tasks[0]), dist, site.exclude or ""),
        srun_args=["--kill-on-bad-exit=1", "--wait=0", f"--cpus-per-task={site.cpus(dist)}", *site.srun_args],
        comment=str(study.directory.absolute()),
        additional_parameters={"requeue": True, "kill-on-invalid-dep": "yes", **options},
        **{name: getattr(site, name) for name in ("partition", "account", "qos", "constraint", "exclude")},
        **({"mem": f"{site.mem_gb * 1024:.0f}M"} if site.mem_gb else {}),
        **({"gpus_per_node": gpus} if gpus else {}),
        **({"dependency": after} if after else {}),
    )
    return executor


def check_site(study: Study, site: Site) -> None:
    """Raises UserError where profile and study do not fit together."""
    mistakes = site_contradictions(site, study.config)
    if mistakes:
        raise UserError("\n".join(mistakes))
