"""The site profile: what jobs ask a cluster for, and what they need there. One YAML per cluster."""

import contextlib
import difflib
import hashlib
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import PrivateAttr, ValidationError, field_validator

from dynexit.errors import UserError
from dynexit.study.dist import DistSettings
from dynexit.study.keys import Section, key
from dynexit.study.schema import Config


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

    @field_validator("sbatch")
    @classmethod
    def _has_option_names(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Refuses names that are none, and keeps the others in sbatch's spelling."""
        names = {name: name.lstrip("-").replace("_", "-") for name in options}
        wrong = [name for name, option in names.items() if not re.fullmatch("[a-z-]+", option)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not an option of sbatch; write its long name, as mail-type")
        return {names[name]: value for name, value in options.items()}

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
    try:
        content = path.read_bytes()
        raw = yaml.safe_load(content.decode())
    except FileNotFoundError:
        raise UserError(f"there is no site profile {path}; slurm/sites/example.yaml is one to start from") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"the site profile {path} could not be read: {' '.join(str(error).split())}") from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UserError(f"the site profile {path} should hold keys, as `partition: gpu`, not {type(raw).__name__}")
    try:
        site = Site.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(dict.fromkeys(_sentence(path, item) for item in error.errors()))) from None
    wrong = [name for name, value in raw.items() if name != "setup" and not "".join(texts_of(value)).isprintable()]
    if wrong:
        raise UserError(f"{path}: {wrong[0]} holds a control character, as a line break; only setup may")
    site._source = {"path": str(path.absolute()), "sha256": hashlib.sha256(content).hexdigest()}
    return site


def load_last_site(source: Mapping[str, Any] | None, study_dir: Path) -> Site:
    """Returns the profile that a study was submitted with before: the file must be the user's own, and unchanged.

    A run folder may be a copy of somebody else's, and a profile holds shell lines. Raises UserError, naming --site.
    """
    if source is None:
        return Site()
    path, site = Path(str(source.get("path"))), None
    with contextlib.suppress(OSError, UserError):
        if path.stat().st_uid in (os.geteuid(), 0) and not path.resolve().is_relative_to(study_dir.resolve()):
            site = load_site(path)
    if site is None or site.source is None or site.source["sha256"] != source.get("sha256"):
        raise UserError(
            f"the site profile of the last submission, {path}, is missing, has changed or belongs to another user; "
            "name the profile with --site SITE.yaml"
        )
    return site


def texts_of(value: Any) -> list[str]:
    """All texts in a value of a profile, keys too."""
    if isinstance(value, dict):
        return [text for pair in value.items() for one in pair for text in texts_of(one)]
    return [text for one in value for text in texts_of(one)] if isinstance(value, list) else [str(value)]


def _sentence(path: Path, item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"] if part != "[key]")
    if item["type"] != "extra_forbidden":
        said = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
        return f"{path}: {name} = {item['input']!r}: {said[0].lower()}{said[1:]}"
    if name in SBATCH_NAMES:
        return f"{path}: {name} is not a key; did you mean {SBATCH_NAMES[name]}?"
    near = difflib.get_close_matches(name, Site.model_fields, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(Site.model_fields)}"
    return f"{path}: {name} is not a key; {hint}"


# how sbatch and other launchers call it
SBATCH_NAMES = {"time": "time_minutes", "timeout_min": "time_minutes", "mem": "mem_gb", "memory": "mem_gb"}
SBATCH_NAMES |= {"gres": "gpus_per_node", "gpus": "gpus_per_node", "nodes": "dist.nodes of the study"}
SBATCH_NAMES |= {"tasks_per_node": "dist.tasks_per_node of the study"}
# options that are keys of the profile or the study
_OF_OTHER_KEYS = {name: SBATCH_NAMES[name.removesuffix("-min")] for name in ("time", "time-min", "nodes")}
_OF_OTHER_KEYS |= dict.fromkeys(("ntasks", "ntasks-per-node"), SBATCH_NAMES["tasks_per_node"])
_OF_OTHER_KEYS |= {"cpus-per-task": "cpus_per_task"}
# options by which jobs are chained, found, stopped and requeued
_OWN_OPTIONS = re.compile(
    "array|comment|dependency|error|kill-on-invalid-dep|no-requeue|output|parsable|requeue|signal|wait"
)


def site_contradictions(site: Site, config: Config) -> list[str]:
    """What in a profile and a study does not fit together, as sentences."""
    found = []
    if config.dist.device == "cuda" and not site.gpus_per_node:
        found.append("dist.device = 'cuda': the site profile asks for no GPUs; set its gpus_per_node")
    if site.gpus_per_node and config.dist.tasks_per_node > site.gpus_per_node:
        found.append(
            f"dist.tasks_per_node = {config.dist.tasks_per_node}: should be at most the site profile's gpus_per_node, "
            f"{site.gpus_per_node}"
        )
    if config.dist.device != "cpu" and config.dist.tasks_per_node < site.gpus_per_node:
        found.append(
            f"dist.tasks_per_node = {config.dist.tasks_per_node}: would leave GPUs of each node unused, as the site "
            f"profile has gpus_per_node = {site.gpus_per_node} and a rank uses one; set "
            f"dist.tasks_per_node={site.gpus_per_node} in the study, or "
            f"gpus_per_node: {config.dist.tasks_per_node} in the profile"
        )
    own = sorted(filter(_OWN_OPTIONS.fullmatch, site.sbatch))
    if own:
        found.append(f"sbatch = {', '.join(own)}: dynexit sets that itself; take it out of the site profile")
    others = sorted(name for name in site.sbatch if name in _OF_OTHER_KEYS)
    return found + [f"sbatch = {name}: that is {_OF_OTHER_KEYS[name]}" for name in others]
