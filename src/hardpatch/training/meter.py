"""Averages over a logging interval, kept on the device so that the host never waits for a step to finish."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from hardpatch.data.loader.loading import Batch, Damage
from hardpatch.method.method import Losses
from hardpatch.runtime.distributed import gather_objects, mean_over_processes


class Meter:
    """Losses, gradient norm, time, waiting time and damage between two records.

    Args:
        device: Where the sums are kept.
    """

    def __init__(self, device: torch.device) -> None:
        self._first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._device = device
        self.damaged: dict[str, str] = {}
        """Every damaged image of this process so far, and why."""
        self.restart()

    def restart(self) -> None:
        """Begin a new interval: after a record, and after other work that must not count as training time."""
        self._sums = torch.zeros(4, device=self._device)
        self._norms = torch.zeros((), device=self._device)
        self._steps, self._untimed = 0, 0
        self._waited, self._since = 0.0, time.perf_counter()

    def leave_out_time(self) -> None:
        """Leave the time of this interval up to here out: its steps count in the averages, but not in the speed."""
        self._untimed = self._steps
        self._waited, self._since = 0.0, time.perf_counter()

    def next_batch(self, batches: Iterator[Batch]) -> tuple[Batch, list[Damage]]:
        """The next micro-batch, with the time waited for it and the damage that was not seen before."""
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        news = [item for item in batch.damaged if item.name not in self.damaged]
        self.damaged.update(news)
        return batch, news

    def add(self, losses: Losses, *, of: int) -> None:
        """One micro-batch ``of`` so many in a step, each with losses that are its share of the step's."""
        values = (losses.total, losses.reconstruction, losses.prediction, losses.rank_correlation / of)
        self._sums += torch.stack([value.detach().float() for value in values])

    def end_step(self, step: int, total_loss: Tensor, gradient_norm: Tensor) -> None:
        """One optimizer step; notes the first whose loss or gradient is not finite."""
        self._norms += gradient_norm.detach()
        self._steps += 1
        fine = torch.isfinite(total_loss.detach()) & torch.isfinite(gradient_norm.detach())
        self._first_bad_step = torch.where(fine | (self._first_bad_step >= 0), self._first_bad_step, step)

    def first_bad_step_here(self) -> int | None:
        """The first step of this process that was not finite. Waits for the device."""
        step = int(self._first_bad_step)
        return step if step >= 0 else None

    def first_bad_step(self) -> int | None:
        """The first step, of any process, that was not finite. Waits for the device."""
        return min((step for step in gather_objects(self.first_bad_step_here()) if step is not None), default=None)

    def read(self, *, batch_size: int) -> dict[str, float]:
        """The averages since the last call, over all processes. Waits for the device."""
        total, reconstruction, prediction, correlation = (self._sums / max(1, self._steps)).tolist()
        norm = float(self._norms) / max(1, self._steps)
        elapsed = time.perf_counter() - self._since
        values = {
            "loss": total,
            "reconstruction_loss": reconstruction,
            "prediction_loss": prediction,
            "predictor_rank_correlation": correlation,
            "gradient_norm": norm,
            "images_per_second": (self._steps - self._untimed) * batch_size / elapsed if elapsed else math.nan,
            "data_wait": self._waited / elapsed if elapsed else 0.0,
        }
        self.restart()
        return mean_over_processes(values)
