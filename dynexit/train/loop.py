"""The one training loop: epochs of batches, checkpoints by time, a clean stop on a signal.

What is trained is a Task; the loop knows of no model. The batches of an epoch follow from (seed, epoch) alone, so a
position in the run is two numbers, and a run that was killed and resumed goes through the same batches.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import index
from typing import Any, Protocol

import torch
from torch import Tensor

from dynexit.data import Batch, Split, epoch_batches, load_batches
from dynexit.dist import Ranks
from dynexit.errors import Failure, Interrupted, received_signals, request_stop
from dynexit.progress import Progress
from dynexit.run_dir import move_aside
from dynexit.train.checkpoint import Checkpoints


class Task(Protocol):
    """Something that is trained batch by batch."""

    def begin(self) -> None:
        """Whatever comes before the first batch of a run that does not resume."""

    def train_step(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """One update from this rank's part of a batch, `share` of the whole one; returns losses to show, () or (m,)."""

    def end_epoch(self, epoch: int) -> None:
        """Evaluation and whatever else belongs between epochs."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next step depends on: tensors, and facts that JSON can hold."""

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Puts back what `state` gave."""


class EpochLosses:
    """The losses of an epoch's batches, by member and term, kept on the device until the epoch ends."""

    def __init__(self, num_members: int, terms: Sequence[str], device: torch.device) -> None:
        self.terms = terms
        self.sums_2MT = torch.zeros((2, num_members, len(terms)), dtype=torch.float64, device=device)
        """Sums of the batches' mean losses, and numbers of batches."""

    def add(self, loss_m: Tensor, alive_m: Tensor, members: Tensor | None, term: int) -> None:
        """Counts a batch of one term for the chosen members (all of them if None) that are alive."""
        added_m = torch.where(alive_m, loss_m, 0)
        for sums_M, value_m in zip(self.sums_2MT[..., term], (added_m, alive_m), strict=True):
            if members is None:
                sums_M.add_(value_m)  # by an index it would be written twice
            else:
                sums_M[members] += value_m

    def take(self) -> list[dict[str, float]]:
        """Of every member the mean losses by term, as train_head_loss. Begins the next epoch."""
        sums_MT, counts_MT = self.sums_2MT.tolist()
        self.sums_2MT.zero_()
        names = ["train_" + term.replace(" ", "_").replace("-", "_") for term in self.terms]
        return [
            {name: total / count for name, total, count in zip(names, sums_T, counts_T, strict=True) if count}
            for sums_T, counts_T in zip(sums_MT, counts_MT, strict=True)
        ]


def fit(
    task: Task,
    split: Split,
    *,
    num_epochs: int,
    global_batch_size: int,
    seed: int,
    ranks: Ranks,
    checkpoints: Checkpoints,
    progress: Progress,
) -> None:
    """Trains `task` on `split` for `num_epochs`, going on from the newest whole checkpoint where there is one.

    Raises Interrupted, after saving, where SIGINT, SIGTERM or SIGUSR2 came; KeyboardInterrupt at a second SIGINT.
    """
    with session_of(task, ranks, checkpoints, progress) as session:
        epoch, position = session.epoch, session.position
        if session.resumed:
            progress.say(f"resuming after epoch {epoch}, batch {position}")
        else:
            task.begin()
        per_epoch = -(-len(split) // global_batch_size)
        progress.start(num_epochs * per_epoch, epoch * per_epoch + position)
        while epoch < num_epochs:
            batches = epoch_batches(len(split), global_batch_size, seed, epoch)[position:]
            shares = [ranks.share(batch) for batch in batches]
            loaded = progress.awaited(load_batches(split, shares, epoch, ranks))
            for whole, (index, images, labels) in zip(batches, loaded, strict=True):
                figures = task.train_step((index, images, ranks.to_device(labels)), len(index) / len(whole))
                position += 1
                progress.advance(len(whole), figures)
                if position < per_epoch:
                    where = f"in epoch {epoch} after batch {position}"
                    session.save_if_asked(where, epoch, position, one_step_late=True)
            task.end_epoch(epoch)
            epoch, position = epoch + 1, 0
            session.save_if_asked(f"after epoch {epoch - 1}", epoch, position)


def pass_over(split: Split, whole: Sequence[Sequence[int]], ranks: Ranks, progress: Progress) -> Iterator[Batch]:
    """Yields this rank's batches of `whole`.

    They are steps of `progress`, which counts the images of all ranks and is finished at the end.
    """
    batches = ranks.share(whole)
    progress.start(len(batches))
    loaded = progress.awaited(load_batches(split, batches, ranks=ranks))
    for batch, start in zip(loaded, range(0, len(whole), ranks.world_size), strict=False):
        yield batch
        progress.advance(sum(map(len, whole[start : start + ranks.world_size])), {})
    progress.finish()


class Session:
    """One run of a task: where it resumes, and how its state is saved."""

    def __init__(self, task: Task, ranks: Ranks, checkpoints: Checkpoints, progress: Progress) -> None:
        self.task, self.ranks, self.checkpoints, self.progress = task, ranks, checkpoints, progress
        self.epoch = self.position = 0
        self.stop_signals: list[int] = []
        self._asked: Callable[[], list[bool]] | None = None
        with ranks.failing_together():
            if ranks.is_main:
                checkpoints.begin()
        self.resumed = self._restore()

    def _restore(self) -> bool:
        """Restores the newest checkpoint that the task takes; returns whether there is one.

        Raises Failure if there are whole checkpoints, and the task takes none: it may have taken parts of them.
        """
        # a network folder may show the ranks different files for a while
        found = self.checkpoints.whole(self.progress.say) if self.ranks.is_main else iter(())
        fault = ""
        while True:
            tensors, facts = next(found, ({}, None))
            facts = self.ranks.broadcast(facts)
            if facts is None:
                break
            tensors = self.ranks.broadcast_tensors(tensors)
            try:
                self.task.restore(tensors, facts["task"])
                self.epoch, self.position = index(facts["epoch"]), index(facts["position"])
                return True
            except torch.OutOfMemoryError:
                raise
            except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # of another content
                fault = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                self.progress.say(f"a whole checkpoint does not fit ({fault}); falling back to the one before")
        if fault:
            directory = self.checkpoints.directory
            raise Failure(f"no checkpoint in {directory} fits the job ({fault}); {move_aside(directory)}")
        return False

    def save_if_asked(self, where: str, epoch: int, position: int, *, one_step_late: bool = False) -> None:
        """Saves if a checkpoint is due or a signal came; then raises Interrupted for the signal.

        With `one_step_late` several ranks act on what was so at the call before: none waits for the others then.
        """
        is_late = one_step_late and self.ranks.world_size > 1
        stop, due = self._asked() if self._asked else (False, False)
        if not is_late:
            stop, due = self._ask()()  # what was so before still is
        if stop or due:
            tensors, facts = self.task.state()
            place = {"epoch": epoch, "position": position, "task": facts}
            with self.ranks.failing_together():  # a rank that ends may end the job, and with it the main rank's writing
                if self.ranks.is_main:
                    self.checkpoints.save(self.progress.step, tensors, place)
        if stop:
            raise Interrupted(f"stopped by a signal {where}; the state is saved")
        self._asked = self._ask() if is_late else None

    def _ask(self) -> Callable[[], list[bool]]:
        due = self.ranks.is_main and self.checkpoints.due()  # it saves, and so it alone knows when
        return self.ranks.start_any([bool(self.stop_signals), due])


@contextlib.contextmanager
def session_of(task: Task, ranks: Ranks, checkpoints: Checkpoints, progress: Progress) -> Iterator[Session]:
    """A run of `task`, from the newest whole checkpoint if there is one; at its end the folder must still be there."""
    session = Session(task, ranks, checkpoints, progress)
    with _stop_signals() as session.stop_signals:
        yield session
    with ranks.failing_together():
        if ranks.is_main:
            checkpoints.check()
    progress.finish()


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The list of SIGINT, SIGTERM and SIGUSR2 that came; a second SIGINT interrupts at once.

    Where the process handles them already, as a SLURM job's, one that came before the training counts too.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    is_handled = signal.getsignal(signal.SIGUSR2) is request_stop
    if is_handled or threading.current_thread() is not threading.main_thread():  # others cannot catch signals
        yield received_signals if is_handled else []
        return

    def request(number: int, frame: object) -> None:
        if received_signals and number == signal.SIGINT:
            raise KeyboardInterrupt
        request_stop(number, frame)

    before = {number: signal.signal(number, request) for number in numbers}
    try:
        yield received_signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        received_signals.clear()
