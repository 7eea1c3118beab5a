"""One resumable training loop: killed at any moment, a training goes on to the same bits (on a CPU).

    every step    learning rate, batches, seed    functions of the step: nothing random is ever saved
                  forward and backward            by micro-batches; processes exchange gradients with the last one
                  clip, learn                     and what a subclass adds: averages, sums, records
    now and then  end of an epoch, checkpoint, stop

A subclass of :class:`Training` says what the loss of a micro-batch is, and what else a checkpoint holds.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hardpatch.data.loader.loading import Position, TrainingOrder, batches_in_order
from hardpatch.data.sources import Source
from hardpatch.runs.checkpoint import CheckpointFolder
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import Interrupted
from hardpatch.runtime.log import say, tracked
from hardpatch.runtime.parallel import exchanging, parallel
from hardpatch.runtime.seeding import Stream, derive_seed
from hardpatch.runtime.signals import StopSignal

CHECK_STEPS = 50
"""Steps between two looks at the loss; each makes the host wait for the device."""


class Plan(NamedTuple):
    """How long a training is, and how it is cut into steps."""

    batch_size: int
    """Images per step, all processes and micro-batches together."""
    total_steps: int
    steps_per_epoch: int
    seed: int
    checkpoint_minutes: float
    """Time between two checkpoints at most; 0: after every step."""
    workers: int
    """Data processes."""
    num_micro_batches: int = 1
    """Per process and step."""
    gradient_clip: float | None = None
    """Largest norm of the gradient; None: any."""


class Examples(NamedTuple):
    """What is learnt from."""

    images: Dataset[Any]
    """Asked for by (pass, index); what it returns must follow from these."""
    number: int
    collate: Callable[[list[Any]], Any]
    """Makes a micro-batch."""
    source: Source | None = None
    """Set where it has blocks that are to be fetched ahead."""


class Training(ABC):
    """A training, and all of it that changes.

    Args:
        model: Learns in place, on ``device``.
        optimizer: With ``lr_scale`` in the groups that learn at a share of the rate.
        examples: What is learnt from.
        plan: How.
        checkpoints: For going on after a kill.
        device: Where the model is.
        identity: Of :func:`identity_of`; checkpoints of another one are thrown away. Empty: the caller has seen to it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        examples: Examples,
        plan: Plan,
        *,
        checkpoints: CheckpointFolder,
        device: torch.device,
        identity: str = "",
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.examples, self.plan = examples, plan
        self.checkpoints, self.device, self.identity = checkpoints, device, identity
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.step = 0
        self.seconds = 0.0
        """Time spent training, over interruptions; the ends of epochs do not count."""
        self._since = 0.0

    # What a subclass says

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any, place: tuple[int, int, int]) -> Tensor:
        """The mean loss of a micro-batch.

        Args:
            model: As it is to be called, maybe under DDP.
            batch: Collated, on whatever device it came.
            place: Step, process and number of the micro-batch: what random draws may depend on.
        """

    @abstractmethod
    def learning_rate(self, step: int) -> float:
        """The rate of the groups without an ``lr_scale``."""

    @abstractmethod
    def check_loss(self) -> None:
        """Refuse to go on, on every process alike, where the loss is not finite; called before anything is saved."""

    def after_step(self, loss: Tensor, norm: Tensor) -> None:  # noqa: B027  (may be left as it is)
        """Told this process's loss and the norm of the gradient of :attr:`step`, on the device."""

    def end_epoch(self) -> None:  # noqa: B027  (may be left as it is)
        """Called when :attr:`step` is the last of an epoch."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside step, model and optimizer: tensors and plain values."""
        return {}

    def load_state(self, saved: dict[str, Any]) -> None:  # noqa: B027  (may be left as it is)
        """Take over what :meth:`state` gave."""

    def progress(self, steps: Iterable[int]) -> Generator[int, None, None]:
        """The steps to come, with a bar."""
        yield from tracked(steps, "training", images_per_item=self.plan.batch_size)

    # What all have in common

    def resume(self) -> None:
        """Go on from the newest checkpoint, where an earlier process left one.

        Raises:
            InputError: Every checkpoint is damaged.
        """
        if distributed.is_main():
            self.checkpoints.clear_temporary()
        distributed.barrier()
        saved = self.checkpoints.load_latest() if self.checkpoints.steps() else None
        distributed.barrier()  # all have read before the main process clears or writes
        if saved is None:
            return
        path = self.checkpoints.path
        if saved.get("identity", "") != self.identity or "model" not in saved:
            say(f"{path} holds another training (other settings, images or weights); this one starts over")
            if distributed.is_main():
                for file in path.glob("step_*.pt*"):
                    file.unlink()
            return
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.load_state(saved)
        if self.step < self.plan.total_steps:
            say(f"going on with {path} at step {self.step} of {self.plan.total_steps}")
        else:
            say(f"{path} holds this training finished after {self.step} steps; the model is only measured again")

    def run(self) -> None:
        """Train to the last step; the model is in evaluation mode afterwards.

        Raises:
            Interrupted: A signal arrived; the state is saved.
            InputError: The loss is not finite any more.
        """
        if self.step < self.plan.total_steps:
            steps = self.progress(range(self.step, self.plan.total_steps))
            # Workers leave before the process does.
            with StopSignal() as stop, closing(self._batches()) as batches, closing(steps):
                self._run(steps, batches, stop)
        self._share_buffers()
        self.model.eval()

    def _share_buffers(self) -> None:
        """Running means are of a process's own share: all processes take the main process's."""
        for buffer in self.model.buffers():
            distributed.broadcast_from_main(buffer)

    def _run(self, steps: Iterable[int], batches: Iterator[Any], stop: StopSignal) -> None:
        plan, model = self.plan, parallel(self.model, self.device)
        saved_at = self._since = time.monotonic()
        for step in steps:
            self.model.train()
            loss, norm = self._learn(model, batches)
            self.step = step + 1
            self.after_step(loss, norm)
            if self.step % plan.steps_per_epoch == 0:
                self._count_time()
                self._share_buffers()
                self.end_epoch()
                self._since = time.monotonic()
            last = self.step == plan.total_steps
            stopped = distributed.any_process(stop.name is not None) and not last
            due = distributed.any_process(time.monotonic() - saved_at >= 60 * plan.checkpoint_minutes)
            if stopped or due or last or self.step % CHECK_STEPS == 0:
                self.check_loss()
            if stopped or due or last:
                self._count_time()
                self.save()
                saved_at = self._since = time.monotonic()
            if stopped:
                distributed.barrier()  # torchrun ends all processes with the first: not before the save is done
                raise Interrupted(
                    f"stopped by {stop.name or 'a signal to another process'} and saved at step {self.step} of "
                    f"{plan.total_steps}; the same command goes on from there"
                )

    def _learn(self, model: nn.Module, batches: Iterator[Any]) -> tuple[Tensor, Tensor]:
        """One step of the optimizer over all micro-batches: this process's loss, and the norm of the gradient."""
        plan, step, rank = self.plan, self.step, distributed.rank()
        rate, total = self.learning_rate(step), torch.zeros((), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        for number in range(plan.num_micro_batches):
            batch = next(batches)
            if number == 0:  # after the first batch, for which a loader that starts draws a seed of its own
                torch.manual_seed(derive_seed(plan.seed, Stream.STEP, step, rank))
            with exchanging(model, last=number == plan.num_micro_batches - 1):
                loss = self.loss(model, batch, (step, rank, number)) / plan.num_micro_batches
                loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, plan.gradient_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm.detach()

    def save(self) -> None:
        """Write a checkpoint; the main process alone does."""
        if distributed.is_main():
            self.checkpoints.save({
                "step": self.step, "seconds": self.seconds, "identity": self.identity,
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **self.state(),
            })  # fmt: skip

    def _count_time(self) -> None:
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now

    def _batches(self) -> Generator[Any, None, None]:
        """Micro-batches of this process's share, from :attr:`step` on."""
        plan, source = self.plan, self.examples.source
        order = TrainingOrder(
            self.examples.number, batch_size=plan.batch_size, first_step=self.step, total_steps=plan.total_steps,
            seed=plan.seed, position=Position(distributed.rank(), distributed.world_size(), plan.num_micro_batches),
            blocks=None if source is None else source.blocks(),
        )  # fmt: skip
        return batches_in_order(
            self.examples.images, order, collate=self.examples.collate, workers=plan.workers,
            pin_memory=self.device.type == "cuda", **({} if source is None else {"prepare": source.prepare}),
        )  # fmt: skip
