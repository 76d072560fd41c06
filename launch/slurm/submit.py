"""Submitting a study to SLURM through submitit: everything at once, chained by dependencies."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit

from dynexit.errors import Failure, UserError
from dynexit.study.grid import Study
from dynexit.study.own_code import allowed_code, check_allowed
from launch.plan import done_together
from launch.slurm import cluster
from launch.slurm.arrays import TRAINING, Array, plan_arrays, resolve
from launch.slurm.requeue import RequeueLimits, script_after, script_before
from launch.slurm.site import Site, site_contradictions
from launch.slurm.submissions import Submission, Submitted, live_jobs, unlisted
from launch.slurm.worker import ClusterTask

_EARLY_SECONDS = 65  # SLURM looks at time limits about once a minute


class _Executor(submitit.SlurmExecutor):
    """Submitit's, with a command of its own; also where there is no SLURM, since a script can be made anywhere."""

    command = ""

    @classmethod
    def affinity(cls) -> int:
        return 2

    @property
    def _submitit_command_str(self) -> str:
        return self.command

    def script(self, num_tasks: int) -> str:
        """The text that sbatch would get."""
        self.parameters |= {"map_count": num_tasks} if num_tasks > 1 else {}
        text: str = self._make_submission_file_text(self.command, "")
        return text


def submit_study(study: Study, stages: Sequence[str], site: Site) -> list[str]:
    """Submits what is missing and returns at once: a line for every array. The caller holds the study.

    Raises UserError if the cluster could never run it, Failure if sbatch refuses; what was submitted before that is
    cancelled.
    """
    if not cluster.is_here():
        raise UserError("there is no sbatch on this machine; submit from a node of the cluster, or run --on here")
    check_site(study, site)
    for module in {point.config.backbone.module for point in study.points} - {None}:
        check_allowed(str(module))
    arrays, queued = _plan(study, stages, site)
    if not arrays:
        return [f"{study.directory}: nothing to submit, all of it is done or in the queue"]
    lines = _rehearse(study, site, arrays)
    submission = Submission(study, site.source)
    job_ids: list[str] = []
    for array in arrays:
        after = resolve(array.after, job_ids)
        try:
            jobs = _submit(study, array, _executor(study, site, array, after, submission.folder))
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            words = " ".join(str(error).split())
            raise Failure(f"sbatch refused {describe_array(array)}: {words}{submission.take_back()}") from error
        submission.add(jobs, array.stage, array.work())
        job_ids.append(jobs[0].partition("_")[0])
        lines.append(f"{describe_array(array)}: job {job_ids[-1]}" + (f" after {after}" if after else ""))
    reports = [job.job_id for job in queued if job.stage == "report"]
    if reports and arrays[-1].stage == "report":
        cluster.cancel_jobs(reports)  # the new one covers what they would have, and two must not write one page
    return [*lines, f"logs: {submission.folder}"]


def _plan(study: Study, stages: Sequence[str], site: Site) -> tuple[list[Array], list[Submitted]]:
    """What is to be submitted, and what is queued; one query."""
    cluster.check_time(site, site.minutes(study.config.dist))
    queue = cluster.queue()
    if message := unlisted(study.directory, queue):
        raise UserError(message)
    queued = [job for job, _ in live_jobs(study.directory, queue)]
    limits = cluster.limits(site, sum(entry.is_live for entry in queue.values()))
    live, ending = (
        {work: job.job_id for job in queued if job.is_cancelled == is_ending for work in job.work}
        for is_ending in (False, True)
    )
    return plan_arrays(study, stages, limits, live, ending), queued


def _submit(study: Study, array: Array, executor: _Executor) -> list[str]:
    """Submits an array; returns the ids of its jobs. Their pickles are in its folder, for this user alone."""
    # hidden are the variables of the job that this process may run in, and options that override a script's
    kept = {name: os.environ[name] for name in os.environ if name in cluster.OF_USERS}
    tasks: list[Any] = [ClusterTask(packs, study.config.dist.max_retries) for packs in array.tasks]
    umask = os.umask(0o077)  # the script restores it for what the jobs write
    try:
        with submitit.helpers.clean_env():
            os.environ.update(kept)
            jobs = executor.submit_array(tasks)
    finally:
        os.umask(umask)
    for job in jobs:  # submitit takes %j and others in a folder's name for the job's id
        job.paths.submitted_pickle.replace(executor.folder / f"{job.job_id}_submitted.pkl")
    return [job.job_id for job in jobs]


def _rehearse(study: Study, site: Site, arrays: Sequence[Array]) -> list[str]:
    """Asks before the first submission what SLURM will say to the last; returns a line on each stage that will wait.

    Raises UserError with what it would refuse.
    """
    lines = []
    largest = {array.stage: array for array in reversed(arrays)}  # the first of each stage
    for array in reversed(largest.values()):
        script = _executor(study, site, array, "", study.directory / "slurm" / "NNNN").script(len(array.tasks))
        try:
            reason = cluster.rehearse(script, site.for_stage(array.stage))
        except UserError as refusal:
            raise UserError(f"the cluster would not take {describe_array(array)}: {refusal}") from None
        lines += [f"{array.stage}: will wait, since no node can run it at present ({reason})"] if reason else []
    return lines


def describe_submission(study: Study, stages: Sequence[str], site: Site) -> str:
    """What `submit_study` would submit: arrays, packs, what it may cost, and the text that sbatch would get."""
    check_site(study, site)
    try:
        arrays, _ = _plan(study, stages, site)
        notes = _rehearse(study, site, arrays)
    except Failure as failure:  # a plan can be looked at anywhere
        notes = [f"no cluster answers here ({failure}): its limits and queue are left out"]
        limits = cluster.Limits(site.max_array_size or cluster.DEFAULT_ARRAY_SIZE, site.max_submit_jobs)
        arrays = plan_arrays(study, stages, limits, {}, {})
    blocks = [*notes, f"queue: {len(arrays)} submissions, {sum(len(array.tasks) for array in arrays)} jobs"]
    blocks.append(_expected_hours(study, site, arrays))
    for i, array in enumerate(arrays):
        after = resolve(array.after, [f"<{n}>" for n in range(i)])
        script = _executor(study, site, array, after, study.directory / "slurm" / "NNNN").script(len(array.tasks))
        blocks.append(f"<{i}> {describe_array(array)}\n{script}")
    return "\n".join(blocks)


def describe_array(array: Array) -> str:
    """An array in words: stage, tasks, packs."""
    counts = {"task": len(array.tasks)} | ({"pack": _num_packs(array)} if array.stage in TRAINING else {})
    return f"{array.stage}: " + ", ".join(f"{count} {word}{'s' * (count > 1)}" for word, count in counts.items())


def _num_packs(array: Array) -> int:
    return sum(map(len, array.tasks))


def _expected_hours(study: Study, site: Site, arrays: Sequence[Array]) -> str:
    """What training costs if every pack takes its whole time, also where a task does several in turn."""
    dist, minutes = study.config.dist, site.minutes(study.config.dist)
    together = sum(_num_packs(array) for array in arrays if done_together(array.stage, dist))
    alone = sum(_num_packs(array) for array in arrays if array.stage == "prepare") * (
        not done_together("prepare", dist)
    )
    unit, each, one = "GPU", site.gpus_per_node, 1
    if not each:
        unit, each, one = "CPU", dist.tasks_per_node * site.cpus(dist), site.cpus(dist)
    hours = minutes / 60 * (together * dist.nodes * each + alone * one)
    return (
        f"expected: {hours:,.1f} {unit}-hours if every pack takes the whole {minutes} minutes of the time limit; less "
        "if it ends sooner, more if one times out and resumes"
    )


def _executor(study: Study, site: Site, array: Array, after: str, folder: Path) -> _Executor:
    """submitit's executor for one array."""
    site, dist, folder = site.for_stage(array.stage), study.config.dist, folder.absolute()
    together = done_together(array.stage, dist)
    gpus = site.gpus_per_node if together else min(site.gpus_per_node, 1)
    cpus = site.cpus(dist)
    if array.stage == "search" and site.cpus_per_task is None:
        cpus = max(cpus, study.config.search.workers)
    limits = RequeueLimits(
        num_packs=max(map(len, array.tasks)),
        max_timeouts=dist.max_timeouts,
        max_preemptions=dist.max_preemptions,
        max_retries=dist.max_retries,
        seconds_in_time=60 * site.minutes(dist) - site.delay_seconds(dist) - _EARLY_SECONDS,
        num_ranks=dist.nodes * dist.tasks_per_node if together else 1,
        exclude=site.exclude or "",
    )
    python = f"{site.container} {shlex.quote(sys.executable)}".strip()
    # sbatch and srun replace %j and others, also in the name of a folder
    logs = str(folder).replace("%", "%%") + ("/%A_%a" if len(array.tasks) > 1 else "/%j")
    srun = ["srun", "--unbuffered", f"--output={logs}_%t_log.out", f"--error={logs}_%t_log.err"]
    srun += ["--kill-on-bad-exit=1", "--wait=0", f"--cpus-per-task={cpus}", *site.srun_args]
    executor = _Executor(folder)
    worker = shlex.join(["launch.slurm.worker", str(folder), *allowed_code()])
    executor.command = f"{shlex.join(srun)} {python} -u -m {worker}"
    options: dict[str, Any] = {"output": f"{logs}_0_log.out", "error": f"{logs}_0_log.err", "requeue": True}
    keys = ("partition", "account", "qos", "constraint", "exclude")
    umask = os.umask(0o077)
    os.umask(umask)
    executor.update_parameters(
        wckey=None,  # submitit's own, which not every cluster knows
        job_name=f"{study.config.name}-{array.stage}"[:60],
        time=site.minutes(dist),
        nodes=dist.nodes if together else 1,
        ntasks_per_node=dist.tasks_per_node if together else 1,
        cpus_per_task=cpus,
        signal_delay_s=site.delay_seconds(dist),
        array_parallelism=site.array_parallelism,
        setup=[*site.shell_lines(dist), *script_before(folder, umask)],
        teardown=script_after(python, limits),
        use_srun=False,  # it is in the command
        comment=str(study.directory.absolute()),
        additional_parameters={**site.sbatch, **options},
        **{name: value for name in keys if (value := getattr(site, name))},
        **({"mem": f"{site.mem_gb * 1024:.0f}M"} if site.mem_gb else {}),
        **({"gpus_per_node": gpus} if gpus else {}),
        **({"dependency": after} if after else {}),
    )
    return executor


def check_site(study: Study, site: Site) -> None:
    """Raises UserError if profile and study do not fit together, or a name would end a line of the script."""
    mistakes = site_contradictions(site, study.config)
    texts = {"name": study.config.name, "runs_dir": str(study.directory.absolute()), "the interpreter": sys.executable}
    wrong = {name: text for name, text in texts.items() if not text.isprintable()}
    mistakes += [f"{name} = {text!r}: holds a control character" for name, text in wrong.items()]
    if mistakes:
        raise UserError("\n".join(mistakes))
