"""A run without a recipe: what is not given is chosen from the images and the machine, by the rules of the plan."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hardpatch.config.config import Config
from hardpatch.config.plan import PlanConfig, check_starts, duration
from hardpatch.config.recipes import recipe as named_recipe
from hardpatch.config.values import load_config, with_fields
from hardpatch.data.sources.opening import as_spec
from hardpatch.data.tools.parts import with_parts
from hardpatch.runs.checkpoint import CheckpointFolder
from hardpatch.runs.folder import RunFolder
from hardpatch.runtime.distributed import choose_device
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import say, warn
from hardpatch.tools.plan.plan import Proposal, propose
from hardpatch.training.branching import beginning_of_branch
from hardpatch.training.pretrain import train
from hardpatch.training.state import Resume

FIRST_LOOK = {"cpu": "8m", "cuda": "2h", "mps": "30m"}
"""Budgets where none is given: long enough that a small encoder learns something, short enough to wait for."""
SECONDS_OF_TIMING = 1.5
"""Time each encoder's step, and loading, for about as long: half a per cent of the shortest budget."""
FAR_BEYOND = 3
"""A run that takes so many times its budget is warned of before it begins."""


def pretrain(
    data: Any,
    out: str | Path,
    *,
    recipe: str | None = None,
    config: str | Path | Config | None = None,
    branch_from: str | Path | None = None,
    budget: str | None = None,
    resume: Resume = "auto",
    **fields: Any,
) -> dict[str, Any]:
    """Pre-train a ViT with Hard Patches Mining; what ``hardpatch pretrain`` runs.

    Without recipe, config and branch_from the method, the sizes and the length of the run are chosen from the images
    and the machine; a field that is given holds.

    Args:
        data: Images to learn from: a folder, a list, a table, tar shards, or ``shapes:N``; or images in memory: arrays,
            PIL images, a PyTorch or Hugging Face data set, a pair of images and labels
            (:mod:`hardpatch.data.sources.in_memory`). So may be ``val``.
        out: The run folder.
        recipe: Named starting point, see :mod:`hardpatch.config.recipes`.
        config: A config or a YAML file instead of a recipe.
        branch_from: A run instead of a recipe, with a constant learning rate: goes on in ``out`` from the last
            checkpoint before it fell, with other ``epochs``.
        budget: How long the run may take, as ``"90m"`` or ``"8h"``: sizes and length are chosen for it. With a recipe
            it must be one without a scale.
        resume: ``auto`` goes on with an unfinished run in ``out``; ``never`` refuses to; ``restart`` starts over.
        **fields: Any field of :class:`hardpatch.config.config.Config` by its name, e.g. ``epochs=100``.

    Returns:
        The figures of the run, as in ``result.json``.

    Raises:
        InputError: A field, the data or the folder breaks a rule.
        Interrupted: A signal stopped the run after it was saved.
    """
    starts = {"recipe": recipe, "config": config, "branch_from": branch_from}
    check_starts(starts, budget)
    if fields.get("val"):
        fields["val"] = as_spec(fields["val"], field="val")
    given = with_parts({"data": as_spec(data), **fields})
    if branch_from is not None:
        base, parent = beginning_of_branch(branch_from, out, resume=resume)
        return train(with_fields(base, given), Path(out), resume=resume, parent=parent)
    if isinstance(config, Config):
        return train(with_fields(config, given), Path(out), resume=resume)
    if config is not None:
        return train(with_fields(load_config(Path(config)), given), Path(out), resume=resume)
    return train(choose_config(given, out, recipe=recipe, budget=budget, resume=resume), Path(out), resume=resume)


def choose_config(
    given: Mapping[str, Any], out: str | Path, *, recipe: str | None, budget: str | None, resume: Resume = "auto"
) -> Config:
    """The config of a run that begins with a recipe or with nothing.

    A run that is in ``out`` already goes on with what was chosen when it began.

    Args:
        given: Fields that hold, ``data`` among them.
        out: The run folder.
        recipe: Its constants hold, unless there is a budget, too.
        budget: How long the run may take.
        resume: As in :func:`pretrain`.

    Raises:
        InputError: A value that is wrong, images that cannot be read, or nothing that fits into memory.
    """
    if recipe is not None and budget is None:
        return with_fields(named_recipe(recipe), given)
    folder = RunFolder(Path(out))
    if resume != "restart" and folder.config_file.is_file() and CheckpointFolder(folder.checkpoints).steps():
        return with_fields(load_config(folder.config_file), given)
    if not given.get("data"):
        raise InputError("data: name the images to learn from, as in --data photos/")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "recipe: several processes need one, or --config: hardpatch plan --data ... --out FILE.yaml chooses by one"
        )
    with_fields(Config(), given)  # a wrong value is refused before images are looked at
    time = budget or FIRST_LOOK[choose_device(given.get("device", "auto")).type]
    settings = PlanConfig(budget=time, method=recipe or PlanConfig.method, seconds=SECONDS_OF_TIMING)
    proposal = propose(settings, given, quick=True)
    _say_what_was_chosen(proposal, settings.method, time, is_given=budget is not None)
    return proposal.config


def _say_what_was_chosen(proposal: Proposal, method: str, budget: str, *, is_given: bool) -> None:
    """What, why, and how long it takes: three lines."""
    config, found = proposal.config, proposal.images
    height, width = config.data.size
    patches = "the encoder's patches" if config.model.patch_size is None else f"patches of {config.model.patch_size}"
    say(
        f"chosen: {method}; {proposal.chosen.size.name} on {width}x{height} px in {patches}; "
        f"{config.optimisation.epochs:,} epochs of {max(1, found.number // config.optimisation.batch_size):,} steps of "
        f"{config.optimisation.batch_size}"
    )
    labels = f"{found.classes} classes" if found.classes else "no labels"
    say(
        f"because: {found.number:,} images of about {found.width}x{found.height} px, {labels}; "
        f"{proposal.chosen.views_per_second:.3g} images a second on this machine ({proposal.machine.device.type}). "
        "Every flag that you give holds; hardpatch plan shows the alternatives"
    )
    longer = "" if is_given else "; longer runs learn more: --budget 2h, or --epochs"
    say(f"time: about {duration(proposal.seconds)} within a budget of {budget}{longer}")
    if proposal.seconds > FAR_BEYOND * proposal.budget:
        warn(
            f"this run takes about {duration(proposal.seconds)}, far more than {budget}: fewer --epochs, a smaller "
            "--encoder or --image-size, or a part of the images would be shorter"
        )
