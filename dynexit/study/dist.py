"""The section `dist`: where and how fast a study is computed; results do not depend on it."""

from typing import Literal

from dynexit.study.keys import Section, key


class DistSettings(Section):
    device: Literal["auto", "cpu", "cuda"] = key(
        "auto", "where tensors live; auto takes a GPU if there is one", changes_results=False
    )
    num_threads: int | None = key(
        None, "CPU threads of a process; null takes the machine's", changes_results=False, ge=1
    )
    num_workers: int = key(0, "processes of each rank that load images", changes_results=False, ge=0)
    persistent_workers: bool = key(
        True, "whether loading processes live on from one epoch to the next", changes_results=False
    )
    pin_memory: bool = key(
        True, "whether loading processes' images are pinned, for a faster way to a GPU", changes_results=False
    )
    prefetch_batches: int = key(2, "batches that each loading process prepares ahead", changes_results=False, ge=1)
    members_per_pack: int = key(64, "most points trained in one job", changes_results=False, ge=1)
    checkpoint_seconds: float = key(
        60.0,
        "time between checkpoints; up to half an hour where saving would take over 1 % of it",
        "s",
        changes_results=False,
        ge=0,
    )
    log_seconds: float = key(10.0, "time between lines in the log", "s", changes_results=False, ge=0)
    timeout_minutes: int = key(24 * 60, "time limit of one submitted job", "min", changes_results=False, ge=1)
    nodes: int = key(1, "machines that train or record one pack together (slurm)", changes_results=False, ge=1)
    prepare_on_all_ranks: bool = key(
        False,
        "whether all ranks fit the backbone together, a batch norm seeing one rank's images; else one process does",
        changes_results=False,
    )
    tasks_per_node: int = key(1, "ranks on each of them, one per GPU where there are GPUs", changes_results=False, ge=1)
    deepspeed_stage: Literal[1, 2, 3] | None = key(
        None,
        "what all ranks, fitting it together, divide by ZeRO: 1 optimizer states, 2 gradients too, 3 weights too",
        changes_results=False,
    )
    timeout_seconds: float = key(600.0, "longest wait of a rank for the others", "s", changes_results=False, gt=0)
    max_timeouts: int = key(100, "requeues of a job whose time was up", changes_results=False, ge=0)
    max_preemptions: int = key(1000, "requeues of a job that was preempted", changes_results=False, ge=0)
    max_retries: int = key(2, "requeues of a job that crashed", changes_results=False, ge=0)
