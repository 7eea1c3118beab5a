"""Checkpoints that survive: atomic, verified, and the one before is used when the newest is damaged.

    checkpoints/step_00001234.pt           everything that an exact resume needs
    checkpoints/step_00001234.pt.sha256    its checksum, in the format of sha256sum
    checkpoints/last                       link to the newest
    checkpoints/weights.safetensors        the encoder alone, timm's names

A file appears under its own name only when it is complete: it is written under a temporary name, flushed to the disk
and renamed. A checkpoint whose checksum does not fit is never loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from hardpatch.runs.kinds import WrongKind, what_it_is
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import flush_to_disk, write_atomically, write_text_atomically


class CheckpointWarning(UserWarning):
    """A checkpoint is damaged and the one before it is used."""


class CheckpointFolder:
    """The ``checkpoints`` folder of a run, made with the first checkpoint.

    Args:
        path: The folder.
        keep_last: How many of the newest checkpoints stay.
        keep_steps: Checkpoints at multiples of this step stay for good.
        kept: A step whose checkpoint stays for good.
        holds: A part that every checkpoint of this kind has.
        if_damaged: What to do where every one is damaged.
    """

    def __init__(
        self,
        path: Path,
        *,
        keep_last: int = 3,
        keep_steps: int | None = None,
        kept: int | None = None,
        holds: str = "student",
        if_damaged: str = "use --resume restart to start over",
    ) -> None:
        self.if_damaged = if_damaged
        self.path = path
        self.keep_last = keep_last
        self.keep_steps = keep_steps
        self.kept = kept
        self.holds = holds

    def clear_temporary(self) -> None:
        """Remove what a killed process left half-written."""
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """Steps of all checkpoints, oldest first."""
        found = (re.fullmatch(r"step_(\d+)\.pt", file.name) for file in self.path.glob("step_*.pt"))
        return sorted(int(match[1]) for match in found if match)

    def file(self, step: int) -> Path:
        """Name of the checkpoint of a step."""
        return self.path / f"step_{step:08d}.pt"

    def save(self, state: dict[str, Any]) -> Path:
        """Save the state of ``state["step"]`` and drop checkpoints that need not be kept.

        Raises:
            OSError: Writing failed; the checkpoints from before are untouched.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        target = self.file(state["step"])

        def write(temporary: Path) -> None:
            save_pickle(temporary, state)
            flush_to_disk(temporary)
            # The checksum comes first: a checkpoint without one would be worthless, the reverse is harmless.
            write_text_atomically(_checksum_file(target), f"{_digest(temporary)}  {target.name}\n")

        write_atomically(target, write)
        link = self.path / ".last.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(self.path / "last")
        self._prune(state["step"])
        return target

    def _prune(self, saved: int) -> None:
        """Newer ones than ``saved`` are damaged, or the run would have gone on from there: they do not count."""
        steps = [step for step in self.steps() if step <= saved]
        kept = {*steps[-self.keep_last :], self.kept}
        if self.keep_steps:
            kept |= {step for step in steps if step % self.keep_steps == 0}
        for step in set(steps) - kept:
            self.file(step).unlink(missing_ok=True)
            _checksum_file(self.file(step)).unlink(missing_ok=True)

    def load_latest(self, *, until: int | None = None) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, or None if there is none at all.

        Args:
            until: Not one of a later step than this.

        Warns:
            CheckpointWarning: A newer one is damaged; it is passed over.

        Raises:
            InputError: There are checkpoints, but every one is damaged; or one is whole, and of another kind.
        """
        problems = []
        for step in reversed([step for step in self.steps() if until is None or step <= until]):
            try:
                return load_verified(self.file(step), holds=self.holds)
            except WrongKind:
                raise
            except InputError as error:
                problems.append(str(error))
                warnings.warn(f"{error}; trying the checkpoint before it", CheckpointWarning, stacklevel=2)
        if problems:
            raise InputError(
                f"checkpoint: every checkpoint in {self.path} is damaged; {self.if_damaged}\n" + "\n".join(problems)
            )
        return None


def save_pickle(path: Path, content: dict[str, Any]) -> None:
    """``torch.save`` for which a full disk is an OSError, as everywhere."""
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's complaint about the unfinished file hides the cause
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def verify(path: Path, *, require_checksum: bool) -> None:
    """Check a file against the checksum beside it.

    Raises:
        InputError: It does not fit, or there is none and one is required.
    """
    checksum = _checksum_file(path)
    if checksum.is_file():
        if checksum.read_bytes().split()[:1] != [_digest(path).encode()]:
            raise InputError(f"checkpoint {path} is damaged: its checksum does not fit")
    elif require_checksum:
        raise InputError(f"checkpoint {path} cannot be verified: {checksum.name} is missing")


def load_verified(path: Path, *, require_checksum: bool = True, holds: str = "student") -> dict[str, Any]:
    """Load a checkpoint after checking it against its checksum.

    Args:
        path: A ``.pt`` file written by :class:`CheckpointFolder`.
        require_checksum: Refuse a file without checksum; otherwise it is only checked where there is one.
        holds: A part that it must have.

    Raises:
        InputError: Missing, damaged, or no checkpoint of hardpatch.
    """
    try:
        verify(path, require_checksum=require_checksum)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever unpickling a damaged file may raise
        if (what := what_it_is(path)) and not what.startswith("a checkpoint"):
            raise WrongKind(f"checkpoint {path} is {what}") from error
        problem = f"{type(error).__name__}: {error}"
        raise InputError(f"checkpoint {path} is damaged, or no checkpoint at all: {problem}") from error
    if not isinstance(state, dict) or holds not in state:
        raise WrongKind(f"checkpoint {path} is {what_it_is(path) or 'none of hardpatch'} (no {holds!r} in it)")
    return state


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


METADATA_KEY = "hardpatch"
"""Entry of a safetensors file's metadata that says how timm builds the model; version 0.1 wrote ``hpm``."""


def about_weights(metadata: dict[str, str] | None) -> dict[str, Any]:
    """How timm builds the model of a file of :func:`save_weights` (``timm``), and how it wants its images (``input``).

    Raises:
        KeyError: The file was not written by hardpatch.
    """
    found = metadata or {}
    about: dict[str, Any] = json.loads(found.get(METADATA_KEY) or found["hpm"])
    return about


def save_weights(
    path: Path, state: dict[str, Tensor], timm_arguments: dict[str, Any], input_config: dict[str, Any]
) -> None:
    """Write an encoder as safetensors under timm's names.

    Args:
        path: The file.
        state: The encoder's tensors.
        timm_arguments: ``timm.create_model(**timm_arguments)`` builds the model that they fit.
        input_config: Mean, standard deviation and size of its images, in the terms of timm's ``pretrained_cfg``.
    """
    content = safetensors_bytes(
        {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()},
        # One entry: safetensors writes several in any order, and equal runs would not give equal files.
        metadata={METADATA_KEY: json.dumps({"timm": timm_arguments, "input": input_config})},
    )
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
