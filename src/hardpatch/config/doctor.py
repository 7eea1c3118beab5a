"""What ``hardpatch doctor`` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hardpatch.config.fields import PositiveFloat, Settings


@dataclass(frozen=True)
class DoctorConfig(Settings):
    """Look whether hardpatch will run well here: packages, device, a training step, memory, data processes, disk.

    Takes half a minute. Under torchrun also whether the processes find each other and have the same versions. The exit
    code is 0 if nothing will keep hardpatch from running (there may be warnings), 2 otherwise.
    """

    data: str = ""
    """Also look at these images: any source of hardpatch pretrain --data."""
    out: str = "runs"
    """Folder that runs will be written to; looked at, and left as it is."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device; auto: CUDA, then MPS, then CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Also compile the blocks of a model, as --compile does; auto: on CUDA."""
    seconds: PositiveFloat = 120.0
    """Whatever may hang is ended after so long."""
