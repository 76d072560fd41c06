"""The one training loop: epochs of batches, checkpoints by time, a clean stop on a signal.

What is trained is a Task; the loop knows of no model. The batches of an epoch follow from (seed, epoch) alone, so a
position in the run is two numbers, and a run that was killed and resumed goes through the same batches.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

from dynexit.data import Batch, Split, epoch_batches, load_batches
from dynexit.dist import Ranks
from dynexit.errors import Interrupted, received_signals, request_stop
from dynexit.progress import Progress
from dynexit.train.checkpoint import Checkpoints


class Task(Protocol):
    """Something that is trained batch by batch."""

    def train_step(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """One update from this rank's part of a batch, `share` of the whole one; returns losses to show."""

    def end_epoch(self, epoch: int) -> None:
        """Evaluation and whatever else belongs between epochs."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next step depends on: tensors, and facts that JSON can hold."""

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Puts back what `state` gave."""


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
    epoch = position = 0
    with ranks.failing_together():
        if ranks.is_main:
            checkpoints.begin()
    # a network folder may show the ranks different files for a while
    saved = ranks.broadcast(checkpoints.latest(progress.say) if ranks.is_main else None)
    if saved is not None:
        tensors, facts = saved
        task.restore(tensors, facts["task"])
        epoch, position = facts["epoch"], facts["position"]
        progress.say(f"resuming after epoch {epoch}, batch {position}")
    per_epoch = -(-len(split) // global_batch_size)
    progress.start(num_epochs * per_epoch, epoch * per_epoch + position)

    def save() -> None:
        tensors, facts = task.state()
        with ranks.failing_together():  # and a rank that ends may end the job, and with it the main rank's writing
            if ranks.is_main:
                checkpoints.save(progress.step, tensors, {"epoch": epoch, "position": position, "task": facts})

    def save_if_asked(where: str) -> None:
        due = ranks.is_main and checkpoints.due()  # it saves, and so it alone knows when
        stop, due = ranks.any([bool(stop_signals), due])
        if stop or due:
            save()
        if stop:
            raise Interrupted(f"stopped by a signal {where}; the state is saved")

    with _stop_signals() as stop_signals:
        while epoch < num_epochs:
            batches = epoch_batches(len(split), global_batch_size, seed, epoch)[position:]
            shares = [ranks.share(batch) for batch in batches]
            for whole, batch in zip(batches, load_batches(split, shares, epoch), strict=True):
                figures = task.train_step(_to_device(batch, ranks), len(batch[0]) / len(whole))
                position += 1
                progress.advance(len(whole), figures)
                if position < per_epoch:
                    save_if_asked(f"in epoch {epoch} after batch {position}")
            task.end_epoch(epoch)
            epoch, position = epoch + 1, 0
            save_if_asked(f"after epoch {epoch - 1}")
    with ranks.failing_together():
        if ranks.is_main:
            checkpoints.check()
    progress.finish()


def _to_device(batch: Batch, ranks: Ranks) -> Batch:
    index, images, labels = batch
    return index, images.to(ranks.device, non_blocking=True), labels.to(ranks.device, non_blocking=True)


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
