"""Submitting a study to SLURM: everything at once, chained by dependencies. submitit writes the scripts."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import submitit

from dynexit.errors import Failure, UserError, counted
from dynexit.jobs.planning.missing import done_together
from dynexit.study.grid import Study
from dynexit.study.own_code import allowed_code, check_allowed
from launch.slurm import cluster
from launch.slurm.arrays import TRAINING, Array, plan_arrays, resolve
from launch.slurm.requeue import script_after, script_before
from launch.slurm.site import Site, site_contradictions
from launch.slurm.submissions import Submitted, all_submitted, cancel, live_jobs
from launch.tasks.decision import RequeueLimits
from launch.tasks.folder import add_array, new_folder

_EARLY_SECONDS = 65  # SLURM looks at time limits about once a minute


class _Executor(submitit.SlurmExecutor):
    """Submitit's, also where there is no SLURM, since a script can be made anywhere."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self, command: str, num_tasks: int) -> str:
        """Returns the text for sbatch: an array of tasks that run the command."""
        self.parameters["map_count"] = num_tasks
        text: str = self._make_submission_file_text(command, "")
        return text


def submit_study(study: Study, stages: Sequence[str], site: Site) -> list[str]:
    """Submits what is missing and returns at once: a line for every array. The caller holds the study.

    Raises UserError for a contradiction, Failure if sbatch refuses; what was submitted before that is cancelled.
    """
    if not cluster.is_here():
        raise UserError("there is no sbatch on this machine; submit from a node of the cluster, or run --on here")
    check_site(study, site)
    for module in {point.config.backbone.module for point in study.points} - {None}:
        check_allowed(str(module))
    arrays, queued = _plan(study, stages, site)
    if not arrays:
        return [f"{study.directory}: nothing to submit, all of it is done or in the queue"]
    folder = new_folder(study, "slurm", site.source)
    job_ids: list[str] = []
    lines = []
    for i, array in enumerate(arrays):
        after = resolve(array.after, job_ids)
        script = folder / f"{i}-{array.stage}.sh"
        script.write_text(_script(study, site, array, after, folder), encoding="utf-8")
        try:
            job_ids.append(cluster.ask(["sbatch", "--parsable", str(script)]).strip().partition(";")[0])
        except Failure as failure:
            cancel([job for job in all_submitted(study.directory) if job.folder == folder])
            before = "; what was submitted before it is cancelled" * bool(job_ids)
            raise Failure(f"sbatch refused {describe_array(array)}: {failure}{before}") from None
        add_array(folder, array.stage, {f"{job_ids[-1]}_{task}": work for task, work in enumerate(array.work())})
        lines.append(f"{describe_array(array)}: job {job_ids[-1]}" + (f" after {after}" if after else ""))
    reports = [job.job_id for job in queued if job.stage == "report"]
    if reports and arrays[-1].stage == "report":
        cluster.cancel_jobs(reports)  # the new one covers what they would have, and two must not write one page
    return [*lines, f"logs: {folder}"]


def _plan(study: Study, stages: Sequence[str], site: Site) -> tuple[list[Array], list[Submitted]]:
    """What is to be submitted, and what is queued; one query."""
    queue = cluster.queue()
    queued = [job for job, _ in live_jobs(study.directory, queue)]
    limits = cluster.limits(site, sum(entry.is_live for entry in queue.values()))
    live, ending = (
        {work: job.job_id for job in queued if job.is_cancelled == is_ending for work in job.work}
        for is_ending in (False, True)
    )
    return plan_arrays(study, stages, limits, live, ending), queued


def describe_submission(study: Study, stages: Sequence[str], site: Site) -> str:
    """What `submit_study` would submit: arrays, packs, what it may cost, and the text that sbatch would get."""
    check_site(study, site)
    blocks = []
    try:
        arrays, _ = _plan(study, stages, site)
    except Failure as failure:  # a plan can be looked at anywhere
        blocks = [f"no cluster answers here ({failure}): its limits and queue are left out"]
        limits = cluster.Limits(site.max_array_size or cluster.DEFAULT_ARRAY_SIZE, site.max_submit_jobs)
        arrays = plan_arrays(study, stages, limits, {}, {})
    num_jobs = sum(len(array.tasks) for array in arrays)
    blocks.append(f"queue: {counted(len(arrays), 'submission')}, {counted(num_jobs, 'job')}")
    blocks.append(_expected_hours(study, site, arrays))
    for i, array in enumerate(arrays):
        after = resolve(array.after, [f"<{n}>" for n in range(i)])
        script = _script(study, site, array, after, study.directory / "slurm" / "NNNN")
        blocks.append(f"<{i}> {describe_array(array)}\n{script}")
    return "\n".join(blocks)


def describe_array(array: Array) -> str:
    """An array in words: stage, tasks, packs."""
    counts = {"task": len(array.tasks)} | ({"pack": _num_packs(array)} if array.stage in TRAINING else {})
    return f"{array.stage}: " + ", ".join(counted(count, word) for word, count in counts.items())


def _num_packs(array: Array) -> int:
    return sum(map(len, array.tasks))


def _expected_hours(study: Study, site: Site, arrays: Sequence[Array]) -> str:
    """What preparing and training cost if every pack takes its whole time, also where a task does several in turn."""
    dist, minutes = study.config.dist, site.minutes(study.config.dist)
    unit, of_rank = ("GPU", 1) if site.gpus_per_node else ("CPU", site.cpus(dist))
    of_node = site.gpus_per_node or dist.tasks_per_node * of_rank
    hours = 0.0
    for array in arrays:
        if array.stage not in ("search", "report"):
            each = dist.nodes * of_node if done_together(array.stage, dist) else of_rank
            hours += _num_packs(array) * each * minutes / 60
    return (
        f"expected: {hours:,.1f} {unit}-hours if every pack takes the whole {minutes} minutes of the time limit; less "
        "if it ends sooner, more if one times out and resumes"
    )


def _script(study: Study, site: Site, array: Array, after: str, folder: Path) -> str:
    """The text for sbatch."""
    site, dist, folder = site.for_stage(array.stage), study.config.dist, folder.absolute()
    together = done_together(array.stage, dist)
    gpus = site.gpus_per_node if together else min(site.gpus_per_node, 1)
    cpus = site.cpus(dist)
    if array.stage == "search" and site.cpus_per_task is None:
        cpus = max(cpus, study.config.search.workers)
    limits = RequeueLimits(
        max_timeouts=dist.max_timeouts,
        max_preemptions=dist.max_preemptions,
        max_retries=dist.max_retries,
        seconds_in_time=60 * site.minutes(dist) - site.delay_seconds(dist) - _EARLY_SECONDS,
        num_ranks=dist.nodes * dist.tasks_per_node if together else 1,
        exclude=site.exclude or "",
    )
    python = f"{site.container} {shlex.quote(sys.executable)}".strip()
    logs = str(folder).replace("%", "%%") + "/%A_%a"  # sbatch and srun replace %j and others, also in a folder's name
    srun = ["srun", "--unbuffered", f"--output={logs}_%t_log.out", f"--error={logs}_%t_log.err"]
    srun += ["--kill-on-bad-exit=1", "--wait=0", f"--cpus-per-task={cpus}", *site.srun_args]
    options = {"output": f"{logs}_0_log.out", "error": f"{logs}_0_log.err", "requeue": True}
    keys = ("partition", "account", "qos", "constraint", "exclude")
    executor = _Executor(folder)
    executor.update_parameters(
        wckey=None,  # submitit's own, which not every cluster knows
        job_name=f"{study.config.name}-{array.stage}"[:60],
        time=site.minutes(dist),
        nodes=dist.nodes if together else 1,
        ntasks_per_node=dist.tasks_per_node if together else 1,
        cpus_per_task=cpus,
        signal_delay_s=site.delay_seconds(dist),
        array_parallelism=site.array_parallelism,
        setup=[*site.shell_lines(dist), *script_before(folder)],
        teardown=script_after(python, limits),
        use_srun=False,  # it is in the command
        comment=str(study.directory.absolute()),
        additional_parameters={**site.sbatch, **options},
        **{name: value for name in keys if (value := getattr(site, name))},
        **({"mem": f"{site.mem_gb * 1024:.0f}M"} if site.mem_gb else {}),
        **({"gpus_per_node": gpus} if gpus else {}),
        **({"dependency": after} if after else {}),
    )
    worker = f'launch.tasks.worker "$job" "$restart" {shlex.join(allowed_code())}'.strip()
    return executor.script(f"{shlex.join(srun)} {python} -u -m {worker}", len(array.tasks))


def check_site(study: Study, site: Site) -> None:
    """Raises UserError if profile and study do not fit together, or a name would end a line of the script."""
    mistakes = site_contradictions(site, study.config)
    texts = {"name": study.config.name, "runs_dir": str(study.directory.absolute()), "the interpreter": sys.executable}
    wrong = {name: text for name, text in texts.items() if not text.isprintable()}
    mistakes += [f"{name} = {text!r}: holds a control character" for name, text in wrong.items()]
    if mistakes:
        raise UserError("\n".join(mistakes))
