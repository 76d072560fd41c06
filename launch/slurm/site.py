"""A cluster's own facts: what its users ask for, what its jobs need to be told. One YAML per cluster."""

import difflib
import shlex
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dynexit.errors import UserError
from dynexit.study.keys import Section, key
from dynexit.study.schema import Config, DistSettings


class Site(Section):
    """A site profile. A key that is null or empty is left to the cluster."""

    partition: str | None = key(None, "partition")
    account: str | None = key(None, "account that is charged")
    qos: str | None = key(None, "quality of service")
    constraint: str | None = key(None, "node features asked for, as sbatch's --constraint")
    exclude: str | None = key(None, "nodes to avoid")
    time_minutes: int | None = key(None, "time limit of a job; null takes dist.timeout_minutes", "min", ge=1)
    gpus_per_node: int = key(0, "GPUs asked for on each node", ge=0)
    cpus_per_task: int | None = key(
        None, "CPUs of each rank; null takes dist.num_threads (or 1) + dist.num_workers", ge=1
    )
    mem_gb: float | None = key(None, "memory asked for on each node", "GB", gt=0)
    array_parallelism: int = key(256, "most tasks of an array that run at once", ge=1)
    max_array_size: int | None = key(None, "the cluster's MaxArraySize; null asks scontrol", ge=2)
    max_submit_jobs: int | None = key(None, "most jobs of a user in the queue; null asks sacctmgr and scontrol", ge=4)
    signal_delay_seconds: int = key(
        120, "how long before its time is up a job is told to save (at most a quarter of its time)", "s", ge=1
    )
    modules: list[str] = key(list, "modules that a job loads")
    setup: list[str] = key(list, "shell lines that a job runs before it starts")
    container: str = key("", "what goes before python, as `apptainer exec --nv image.sif`")
    srun_args: list[str] = key(list, "further arguments of srun, as --container-image=image.sqsh (pyxis)")
    scratch_dir: str | None = key(None, "folder for temporary files (TMPDIR); $VARIABLES are the job's")
    network_interface: str | None = key(None, "network that the ranks of different nodes use, as ib0")
    sbatch: dict[str, Any] = key(dict, "further options of sbatch by their long names, as {mail-type: END}")

    def minutes(self, dist: DistSettings) -> int:
        """The time limit of a job."""
        return self.time_minutes or dist.timeout_minutes

    def delay_seconds(self, dist: DistSettings) -> int:
        """How long before the time limit a job is told. SLURM looks now and then, and may tell it a minute earlier."""
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
    """The profile in a YAML file, or one that leaves everything to the cluster.

    Raises UserError with one line for every mistake.
    """
    if path is None:
        return Site()
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no site profile {path}; slurm/sites/example.yaml is one to start from") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"the site profile {path} could not be read: {' '.join(str(error).split())}") from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UserError(f"the site profile {path} should hold keys, as `partition: gpu`, not {type(raw).__name__}")
    try:
        return Site.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(dict.fromkeys(_sentence(path, item) for item in error.errors()))) from None


def _sentence(path: Path, item: Any) -> str:
    name = str(item["loc"][0])
    if item["type"] != "extra_forbidden":
        return f"{path}: {name} = {item['input']!r}: {item['msg'].removeprefix('Input ').lower()}"
    if name in SBATCH_NAMES:
        return f"{path}: {name} is not a key; did you mean {SBATCH_NAMES[name]}?"
    near = difflib.get_close_matches(name, Site.model_fields, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(Site.model_fields)}"
    return f"{path}: {name} is not a key; {hint}"


# how sbatch, submitit and other launchers call it
SBATCH_NAMES = {
    "time": "time_minutes",
    "timeout_min": "time_minutes",
    "mem": "mem_gb",
    "memory": "mem_gb",
    "gres": "gpus_per_node",
    "gpus": "gpus_per_node",
    "image": "container",
    "tmpdir": "scratch_dir",
    "nodes": "dist.nodes of the study",
    "tasks_per_node": "dist.tasks_per_node of the study",
    "slurm_array_parallelism": "array_parallelism",
}


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
    own = sorted(name for name in map(_long_name, site.sbatch) if name in OWN_OPTIONS)
    if own:
        found.append(f"sbatch = {', '.join(own)}: dynexit sets that itself; take it out of the site profile")
    for name in sorted(site.sbatch):
        if _long_name(name) in _OF_OTHER_KEYS:
            found.append(f"sbatch = {name}: that is {_OF_OTHER_KEYS[_long_name(name)]}")
    return found


def _long_name(option: str) -> str:
    return option.lstrip("-").replace("_", "-")


# what dynexit reckons with, and would not know of
_OF_OTHER_KEYS = {
    "time": SBATCH_NAMES["time"],
    "time-min": SBATCH_NAMES["time"],
    "nodes": SBATCH_NAMES["nodes"],
    "ntasks": SBATCH_NAMES["tasks_per_node"],
    "ntasks-per-node": SBATCH_NAMES["tasks_per_node"],
    "cpus-per-task": "cpus_per_task",
}

# what jobs are chained, found, told and requeued by
OWN_OPTIONS = (
    "array",
    "comment",
    "dependency",
    "error",
    "kill-on-invalid-dep",
    "no-requeue",
    "output",
    "parsable",
    "requeue",
    "signal",
    "wait",
)
