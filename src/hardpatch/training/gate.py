"""When to trust the loss predictor: masks stay random until it is right about what is hard."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hardpatch.config.config import Config
from hardpatch.runtime import distributed

MEMORY = 50
"""Steps over which the running mean forgets."""
DEFAULT_THRESHOLD = 0.3
"""Of a run that starts from weights or has a scout: one that has to begin anew is at 0, one that sees is there within
some dozens of steps."""


class MiningGate:
    """Lets the hard share through while predicted and true loss agree in rank, and holds it back while they do not.

    Watches the rank correlation that every step measures anyway, averaged over about the last :data:`MEMORY` steps and
    starting at 0. Everything stays on the device: the host never waits to know whether the gate is open.

    Not in the paper: there mining begins with the first step, from a predictor that knows nothing. On the published
    schedule that is harmless (the share grows from 0 over 125,000 steps); after loading an encoder without its
    predictor, or on data without anything to predict, it is not.

    Args:
        threshold: Correlation from which on the gate is open; 0: always open, as published.
        device: Where the running mean is kept.
    """

    def __init__(self, threshold: float, device: torch.device) -> None:
        self.threshold = threshold
        self.correlation = torch.zeros((), device=device)

    def admit(self, num_hard: int) -> int | Int[Tensor, ""]:
        """``num_hard`` while the gate is open, else 0."""
        if not self.threshold:
            return num_hard
        return torch.where(self.correlation >= self.threshold, num_hard, 0)

    def update(self, correlation: Float[Tensor, ""]) -> None:
        """Take in the rank correlation of one step; what is not finite counts as 0."""
        if not self.threshold:
            return
        measured = distributed.mean_of_tensor(torch.nan_to_num(correlation.detach(), 0.0, 0.0, 0.0))
        self.correlation += (measured - self.correlation) / MEMORY

    def is_open(self) -> bool:
        """Is mining on? Waits for the device."""
        return not self.threshold or bool(self.correlation >= self.threshold)


def mining_threshold(config: Config) -> float:
    """The threshold of a run: what was given, or what its start asks for."""
    method = config.method
    if method.mining_threshold is not None:
        return method.mining_threshold
    learnt_anew = method.guided_by == "predicted_loss" and config.model.init_from
    return DEFAULT_THRESHOLD if learnt_anew or method.guided_by == "scout" else 0.0
