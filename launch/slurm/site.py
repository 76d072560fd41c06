"""The site profile: what jobs ask a cluster for, and what they need there. One YAML per cluster."""

import contextlib
import hashlib
import os
import re
import shlex
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import PrivateAttr, ValidationError

from dynexit.errors import UserError, shorten
from dynexit.study.dist import DistSettings
from dynexit.study.keys import Section, key
from dynexit.study.schema import Config
from dynexit.study.validation import sentences
from dynexit.study.yaml_text import read_mapping


class _Request(Section):
    """What any job may ask for."""

    partition: str | None = key(None, "partition")
    account: str | None = key(None, "account that is charged")
    qos: str | None = key(None, "quality of service")
    constraint: str | None = key(None, "node features asked for, as sbatch's --constraint")
    exclude: str | None = key(None, "nodes to avoid")
    time_minutes: int | None = key(None, "time limit of a job; null takes dist.timeout_minutes", "min", ge=1)
    mem_gb: float | None = key(None, "memory asked for on each node", "GB", gt=0)


class StageSite(_Request):
    """What jobs of one stage ask for instead of what the profile says; null keeps that, '' asks for none."""

    cpus: int | None = key(None, "CPUs; null takes cpus_per_task, or search.workers if that is null", ge=1)


class Site(_Request):
    """A site profile. A key that is null or empty is left to the cluster."""

    gpus_per_node: int = key(0, "GPUs asked for on each node", ge=0)
    cpus_per_task: int | None = key(
        None, "CPUs of each rank; null takes dist.num_threads (or 1) + dist.num_workers", ge=1
    )
    array_parallelism: int = key(256, "most tasks of an array that run at once", ge=1)
    max_array_size: int | None = key(None, "the cluster's MaxArraySize; null asks scontrol", ge=2)
    max_submit_jobs: int | None = key(None, "most jobs of a user in the queue; null asks sacctmgr", ge=4)
    signal_delay_seconds: int = key(
        120, "how long before its time is up a job gets the signal to save (at most a quarter of its time)", "s", ge=1
    )
    modules: list[str] = key(list, "modules that a job loads")
    setup: list[str] = key(list, "shell lines that a job runs before it starts")
    container: str = key("", "what goes before python, as `apptainer exec --nv image.sif`")
    srun_args: list[str] = key(list, "further arguments of srun, as --container-image=image.sqsh (pyxis)")
    scratch_dir: str | None = key(None, "folder for temporary files (TMPDIR); $VARIABLES are the job's")
    network_interface: str | None = key(None, "network that the ranks of different nodes use, as ib0")
    sbatch: dict[str, Any] = key(dict, "further options of sbatch by their long names, as {mail-type: END}")
    stages: dict[Literal["search", "report"], StageSite] = key(
        dict, "what the CPU jobs ask for, as {search: {partition: cpu, cpus: 8}}; a report asks as a search does"
    )
    _source: dict[str, str] | None = PrivateAttr(None)

    @property
    def source(self) -> dict[str, str] | None:
        """The path of the profile and its SHA-256; None if there is no file."""
        return self._source

    def for_stage(self, stage: str) -> "Site":
        """What jobs of a stage ask for: search and report hold no GPU, and may have their own partition."""
        if stage not in ("search", "report"):
            return self
        own = self.stages.get("search", StageSite())
        own = self.stages.get("report", own) if stage == "report" else own
        chosen = {name: value for name, value in own.model_dump().items() if value is not None and name != "cpus"}
        chosen["sbatch"] = {name: value for name, value in self.sbatch.items() if not name.startswith(("gpu", "gres"))}
        return self.model_copy(update={**chosen, "gpus_per_node": 0, "cpus_per_task": own.cpus or self.cpus_per_task})

    def minutes(self, dist: DistSettings) -> int:
        """The time limit of a job."""
        return self.time_minutes or dist.timeout_minutes

    def delay_seconds(self, dist: DistSettings) -> int:
        """How long before the time limit a job gets its signal. SLURM may send it up to a minute earlier."""
        return min(self.signal_delay_seconds, 15 * self.minutes(dist))

    def cpus(self, dist: DistSettings) -> int:
        """CPUs of a rank."""
        return self.cpus_per_task or (dist.num_threads or 1) + dist.num_workers

    def shell_lines(self, dist: DistSettings) -> list[str]:
        """What a job's script runs before the job itself."""
        lines = [f"module load {shlex.quote(name)}" for name in self.modules]
        lines += self.setup
        if self.scratch_dir:
            lines += [f'export TMPDIR="{self.scratch_dir}"', 'mkdir -p "$TMPDIR"']
        if self.network_interface:
            name = shlex.quote(self.network_interface)
            lines.append(f"export GLOO_SOCKET_IFNAME={name} NCCL_SOCKET_IFNAME={name}")
        threads = dist.num_threads or self.cpus(dist)
        return [*lines, f"export OMP_NUM_THREADS={threads}"]


def load_site(path: Path | None) -> Site:
    """Returns the profile in a YAML file, or one that leaves everything to the cluster.

    Raises UserError with one line for every mistake.
    """
    if path is None:
        return Site()
    mistakes: list[str] = []
    hint = "slurm/sites/example.yaml is one to start from"
    raw = read_mapping(path, "site profile", hint, "partition: gpu", mistakes)
    try:
        site = Site.model_validate(raw)
    except ValidationError as error:
        mistakes += sentences(error, unknown_key=_unknown_key)
    if mistakes:
        raise UserError("\n".join(f"{path}: {text}" for text in mistakes))
    site._source = {"path": str(path.absolute()), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return site


def load_last_site(source: Mapping[str, Any] | None, study_dir: Path) -> Site:
    """Returns the profile that a study was submitted with before: the file must be the user's own, and unchanged.

    A run folder may be a copy of somebody else's, and a profile holds shell lines. Raises UserError, naming --site.
    """
    if source is None:
        return Site()
    path = Path(str(source.get("path")))
    with contextlib.suppress(OSError, UserError):
        site = load_site(path)
        is_own = path.stat().st_uid in (os.geteuid(), 0) and not path.resolve().is_relative_to(study_dir.resolve())
        if is_own and site.source == source:
            return site
    raise UserError(
        f"the site profile of the last submission, {path}, is missing, has changed or belongs to another user; "
        "name the profile with --site SITE.yaml"
    )


def _unknown_key(name: str) -> str:
    """Returns that there is no such key, and which one may be meant."""
    near = [SBATCH_NAMES[name]] if name in SBATCH_NAMES else get_close_matches(name, Site.model_fields, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(Site.model_fields)}"
    return f"{shorten(name)} is not a key; {hint}"


# how sbatch and other launchers call it
SBATCH_NAMES = {"time": "time_minutes", "timeout_min": "time_minutes", "mem": "mem_gb", "memory": "mem_gb"}
SBATCH_NAMES |= {"gres": "gpus_per_node", "gpus": "gpus_per_node", "nodes": "dist.nodes of the study"}
SBATCH_NAMES |= {"tasks_per_node": "dist.tasks_per_node of the study"}
# options by which jobs are chained, found, stopped and requeued, and those that follow from other keys
_OWN_OPTIONS = re.compile(
    "array|comment|dependency|error|kill-on-invalid-dep|no-requeue|output|parsable|requeue|signal|wait|"
    "time|time-min|nodes|ntasks|ntasks-per-node|cpus-per-task"
)


def site_contradictions(site: Site, config: Config) -> list[str]:
    """What in a profile and a study does not fit together, as sentences."""
    found, ranks, gpus = [], config.dist.tasks_per_node, site.gpus_per_node
    if config.dist.device == "cuda" and not gpus:
        found.append("dist.device = 'cuda': the site profile asks for no GPUs; set its gpus_per_node")
    if config.dist.device != "cpu" and gpus and ranks != gpus:
        found.append(
            f"dist.tasks_per_node = {ranks}: should be the site profile's gpus_per_node, {gpus}, as a rank uses one; "
            f"set dist.tasks_per_node={gpus} in the study, or gpus_per_node: {ranks} in the profile"
        )
    options = sorted(name.lstrip("-").replace("_", "-") for name in site.sbatch)
    own = ", ".join(filter(_OWN_OPTIONS.fullmatch, options))
    if own:
        found.append(f"sbatch = {own}: follows from other keys of profile and study; take it out of the site profile")
    return found
