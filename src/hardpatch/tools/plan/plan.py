"""``hardpatch plan``: a step of every encoder that comes into question is timed here, and the rules choose."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from hardpatch.config.config import Config
from hardpatch.config.plan import PlanConfig, duration, parse_budget
from hardpatch.config.recipes import recipe, without_scale
from hardpatch.config.values import to_yaml, with_fields
from hardpatch.cost.flops import training_flops
from hardpatch.data.tools.describe import say_scenes, say_what_is_left
from hardpatch.data.tools.parts import with_parts
from hardpatch.runs.folder import versions
from hardpatch.runs.schedule import resolve_schedule
from hardpatch.runtime.errors import InputError, suggest
from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.log import say
from hardpatch.tools.plan.candidates import (
    Candidate,
    Machine,
    StepSeconds,
    find_machine,
    loading_limit,
    make_candidate,
    reckoned,
    sizes_for,
    step_seconds,
    views_per_image,
    with_loading,
    with_size,
)
from hardpatch.tools.plan.images_found import ImagesFound, Loading, open_images_of, time_loading
from hardpatch.tools.plan.sizes import (
    MAX_EPOCHS,
    MIN_MICRO_BATCH,
    SIZES,
    batch_for_a_short_run,
    enough_views,
    epochs_within,
    preferred,
)

HOPELESS = 0.25
"""An encoder that gets less than this share of the views that it should is the last that is timed; the times of larger
ones follow from their FLOPs and parameters."""
LOOKS = 3
"""Looks at kNN accuracy in a run: before, after, and those in between that a tenth of its time leaves room for."""
LOOKED_AT = 1.5
"""Images of a look, of ``knn_images``: neighbours, and half as many that are classified."""
LOOK_SHARE = 0.05
"""Share of the budget that these looks may take; fewer images are looked at where they would take more."""
MIN_LOOKED_AT = 300
LOOK_COST = 0.5
"""Features of an image, of a training view: all patches, but neither decoder nor backward pass."""
SPARE = 0.05
"""Share of a run for figures and checkpoints."""
START_SECONDS = 30.0
"""Imports, first images, the report at the end."""
COMPILE_SECONDS = 60.0


def run(config: PlanConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Propose a run.

    Args:
        config: Budget, method, machine.
        given: Fields of the run's config that hold, ``data`` among them.

    Returns:
        What is proposed, and beside it what was seen and what every other encoder would do.

    Raises:
        InputError: A value that is wrong, images that cannot be read, or nothing that fits memory or budget.
    """
    out = _writable(config.out)
    proposal = propose(config, given)
    final, chosen, found = proposal.config, proposal.chosen, proposal.images
    if out is not None:
        about = {"proposed_by": f"hardpatch plan --data {shlex.quote(final.data.data)} --budget {config.budget}"}
        write_text_atomically(out, to_yaml(final, {**about, **versions(proposal.machine.device)}))
    return {
        **_commands(final, config.method, out, proposal.machine.processes),
        "method": config.method,
        "encoder": chosen.size.name,
        "epochs": final.optimisation.epochs,
        "steps": proposal.steps,
        "hours": proposal.seconds / 3600,
        "images_per_second": chosen.views_per_second,
        "memory_bytes": chosen.memory_bytes,
        "crops_per_second_per_core": proposal.loading.crops_per_second,
        "cache_bytes": proposal.loading.cache_bytes,
        "advice": _advice(proposal),
        "images": found._asdict(),
        "candidates": [_row(candidate) for candidate in proposal.candidates],
        "config": {key: value for part in asdict(final).values() for key, value in part.items()},
        "budget_seconds": proposal.budget,
        "processes": proposal.machine.processes,
        "versions": versions(proposal.machine.device),
    }


class Proposal(NamedTuple):
    """A run for these images, this machine and this time, and what it was chosen among."""

    config: Config
    steps: int
    seconds: float
    """That the whole run will take, about."""
    budget: float
    """Seconds that it may take."""
    enough: float
    """Views after which a larger encoder would be the better use of the time."""
    chosen: Candidate
    candidates: list[Candidate]
    images: ImagesFound
    loading: Loading
    machine: Machine


def propose(config: PlanConfig, given: Mapping[str, Any], *, quick: bool = False) -> Proposal:
    """Look at the images, time the steps, choose.

    Args:
        config: Budget, method, machine.
        given: Fields of the run's config that hold, ``data`` among them.
        quick: Look at no encoder beyond the first that is far too slow, and propose a single pass over the images where
            the budget allows for none.

    Raises:
        InputError: A value that is wrong, images that cannot be read, or nothing that fits memory or budget.
    """
    budget = parse_budget(config.budget)
    given = with_parts(given)
    base = with_fields(_recipe(config.method), given)
    machine = find_machine(base, config)
    base, source, found = open_images_of(base, given)
    if not quick:  # a run says it itself
        say_what_is_left(source)
        say_scenes(source, base.data.data, base.data.size)
    sizes = sizes_for(given)
    training_flops(with_size(sizes[0], base, given, found.number, machine))  # rules that only a model knows
    labels = f", {found.classes} classes" if found.classes else ", no labels"
    say(f"{found.number:,} images, about {found.width}x{found.height} px{labels}; looking at how fast they load")
    loading = time_loading(base, source, seconds=config.seconds)
    if config.memory_gigabytes is None and machine.device.type == "cpu":
        machine = replace(machine, memory=machine.memory - loading.cache_bytes)
    made = (make_candidate(size, base, given, found.number, machine) for size in sizes)
    enough = given["epochs"] * found.number if given.get("epochs") else enough_views(found.number)
    candidates = _timed(made, config, budget, enough, loading, machine, found, quick=quick)
    if quick and not any(c.fits and c.epochs for c in candidates):
        candidates = [replace(c, epochs=1) for c in candidates]
    views = {c.size.name: float(c.epochs * found.number) for c in candidates if c.fits}
    name = preferred(views, sizes, found.number, enough=enough)
    if name is None:
        raise InputError(_nothing(candidates, config, machine, found))
    chosen = next(c for c in candidates if c.size.name == name)
    if "knn_images" not in given:
        most = int(LOOK_SHARE * budget * chosen.views_per_second / (LOOKS * LOOKED_AT * LOOK_COST))
        images = min(chosen.config.run.knn_images, max(MIN_LOOKED_AT, most))
        chosen = replace(chosen, config=with_fields(chosen.config, {"knn_images": images}))
    chosen = _with_steps_enough(chosen, given, found.number, machine)
    found_by_the_run = {field: () for field in ("value_range", "mean", "std") if field not in given}
    final = with_fields(chosen.config, {"epochs": given.get("epochs") or chosen.epochs, **found_by_the_run})
    steps = resolve_schedule(final.optimisation, found.number).total_steps
    training = steps * final.optimisation.batch_size / chosen.views_per_second
    seconds = training / (1 - SPARE) + seconds_beside(chosen, found, machine)
    return Proposal(final, steps, seconds, budget, enough, chosen, candidates, found, loading, machine)


def _with_steps_enough(chosen: Candidate, given: Mapping[str, Any], num_images: int, machine: Machine) -> Candidate:
    """Of a short run: a smaller batch, so that it has steps enough to learn in."""
    config = chosen.config
    if "batch_size" in given or config.run.micro_batch_size is not None:
        return chosen
    views = num_images * (given.get("epochs") or chosen.epochs) * config.data.crops_per_image
    unit = views_per_image(config) * machine.processes
    batch = batch_for_a_short_run(config.optimisation.batch_size, views, unit)
    if batch == config.optimisation.batch_size:
        return chosen
    fields: dict[str, Any] = {"batch_size": batch}
    if "base_learning_rate" not in given:
        fields["base_learning_rate"] = 2 * config.optimisation.base_learning_rate
    return replace(chosen, config=with_fields(config, fields))


def _recipe(method: str) -> Config:
    """The config of a method.

    Raises:
        InputError: There is none of that name, or it has a scale, which is what a plan chooses.
    """
    if method not in without_scale():
        raise InputError(
            f"method: must be METHOD[-TARGET] as hardpatch recipes lists them, without a scale, got {method!r}"
            f"{suggest(method, without_scale())}"
        )
    return recipe(method)


def _writable(out: str) -> Path | None:
    """Where the config goes.

    Raises:
        InputError: It cannot go there.
    """
    if not out:
        return None
    path = Path(out).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"out: must end in .yaml, got {out!r}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"out: must be in a folder that is there and can be written to, got {out!r}")
    return path


def _timed(
    candidates: Iterable[Candidate], config: PlanConfig, budget: float, enough: float, loading: Loading,
    machine: Machine, found: ImagesFound, *, quick: bool,
) -> list[Candidate]:  # fmt: skip
    """With images per second and epochs; smallest first. None is timed beyond one that is far too slow."""
    done: list[Candidate] = []
    known: tuple[Candidate, StepSeconds] | None = None
    hopeless = False
    for candidate in candidates:
        seconds = None
        if candidate.fits and not hopeless and candidate.config.run.sharding == "none":
            say(f"{candidate.size.name}: timing its step")
            seconds = step_seconds(candidate, machine, config.seconds)
            if seconds is None:
                say(f"{candidate.size.name}: does not fit into memory after all")
                candidate = replace(candidate, fits=False)
        measured = seconds is not None
        if seconds is None:
            seconds = reckoned(candidate, *(known or reference(candidate, config, machine)))
        known = candidate, seconds
        share = candidate.config.optimisation.batch_size // machine.processes
        rate = machine.processes * share / (share * seconds.learn + seconds.finish)
        rate = with_loading(rate, candidate.config, loading, machine)
        timed = replace(candidate, views_per_second=rate, measured=measured)
        left = (budget - seconds_beside(timed, found, machine)) * (1 - SPARE)
        most = max(MAX_EPOCHS, math.ceil(enough / found.number))
        timed = replace(timed, epochs=epochs_within(left, rate, found.number, most=most))
        hopeless = timed.epochs * found.number < HOPELESS * enough
        done.append(timed)
        if hopeless and quick:
            break
    return done


def reference(candidate: Candidate, config: PlanConfig, machine: Machine) -> tuple[Candidate, StepSeconds]:
    """The smallest encoder with the images and the method of a candidate that cannot be timed here.

    Raises:
        InputError: Not even that fits.
    """
    fields = {**SIZES[0].fields, "sharding": "none", "activation_checkpointing": False, "encoder_width": None,
              "encoder_heads": None, "micro_batch_size": MIN_MICRO_BATCH}  # fmt: skip
    small = Candidate.of(SIZES[0], with_fields(candidate.config, fields), 0, fits=True)
    say(f"{candidate.size.name} cannot be timed by one process here: reckoned from {small.size.name}")
    seconds = step_seconds(small, machine, config.seconds)
    if seconds is None:
        raise InputError(f"memory_gigabytes: not even the step of {small.size.name} fits into what is free here")
    return small, seconds


def seconds_beside(candidate: Candidate, found: ImagesFound, machine: Machine) -> float:
    """Seconds of a run that do not grow with its length: start, compilation, looks at kNN accuracy."""
    run_config = candidate.config.run
    known = run_config.knn and found.classes
    looks = LOOKS * LOOKED_AT * min(found.number, run_config.knn_images) if known else 0
    compiled = machine.device.type == "cuda" and run_config.compile != "off"
    fixed = START_SECONDS + (COMPILE_SECONDS if compiled else 0)
    return fixed + LOOK_COST * looks / candidate.views_per_second


# What is said


def _advice(proposal: Proposal) -> list[str]:
    """What a user should know before starting."""
    final, found, machine = proposal.config, proposal.images, proposal.machine
    lines = []
    epochs = final.optimisation.epochs
    if proposal.seconds > proposal.budget:
        lines.append(f"{epochs} epochs take about {duration(proposal.seconds)}, more than the budget")
    elif epochs * found.number < proposal.enough:
        lines.append(
            f"{epochs} epochs are few, {math.ceil(proposal.enough / found.number)} would be better: features need "
            "views, and masks time to grow hard; a longer --budget or a smaller --image-size would help"
        )
    if (
        machine.device.type != "cpu"
        and loading_limit(final, proposal.loading, machine) <= proposal.chosen.views_per_second
    ):
        lines.append(
            "loading limits this run: hardpatch data pack makes images quick to read, "
            "hardpatch benchmark data says more"
        )
    return lines


def _row(candidate: Candidate) -> dict[str, Any]:
    """A candidate for the table and the JSON line."""
    optimisation, run_config = candidate.config.optimisation, candidate.config.run
    return {
        "name": candidate.size.name,
        "parameters": candidate.parameters,
        "memory_bytes": candidate.memory_bytes,
        "fits": candidate.fits,
        "batch_size": optimisation.batch_size,
        "micro_batch_size": run_config.micro_batch_size,
        "activation_checkpointing": run_config.activation_checkpointing,
        "sharding": run_config.sharding,
        "images_per_second": candidate.views_per_second,
        "measured": candidate.measured,
        "epochs": candidate.epochs,
        "min_images": candidate.size.min_images,
    }


def _nothing(candidates: list[Candidate], config: PlanConfig, machine: Machine, found: ImagesFound) -> str:
    """Why there is no plan."""
    fitting = [c for c in candidates if c.fits]
    if not fitting:
        least = min(c.memory_bytes for c in candidates) / 1e9
        return (
            f"memory_gigabytes: the smallest step needs about {least:.1f} GB of a device, and "
            f"{machine.memory / 1e9:.1f} may be taken; give a smaller --image-size or --encoder"
        )
    needed = min(found.number / c.views_per_second / (1 - SPARE) + seconds_beside(c, found, machine) for c in fitting)
    return (
        f"budget: must allow for one pass over the {found.number:,} images, which takes {duration(needed)} here, got "
        f"{config.budget}; or give fewer or smaller images"
    )


def _commands(config: Config, method: str, out: Path | None, processes: int) -> dict[str, str | None]:
    """The commands that start a run: by its recipe and every field that differs from it, and from the file."""
    start = ["hardpatch", "pretrain"]
    if processes > 1:
        start = ["torchrun", "--nproc-per-node", str(processes), "-m", "hardpatch", "pretrain"]
    base, words = recipe(method), ["--recipe", method]
    for section in fields(Config):
        ours, theirs = getattr(config, section.name), getattr(base, section.name)
        for item in fields(ours):
            if getattr(ours, item.name) != getattr(theirs, item.name):
                words += flag(item.name, getattr(ours, item.name))
    from_file = None if out is None else " ".join([*start, "--config", shlex.quote(str(out)), "--out", "RUN"])
    return {"command": " ".join([*start, *words, "--out", "RUN"]), "command_from_file": from_file}


def flag(name: str, value: Any) -> list[str]:
    """A field as the words that set it, quoted for a shell."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{dashed}" if value else f"--no-{dashed}"]
    if name == "image_size" and value[0] == value[-1]:
        value = value[0]
    parts = value if isinstance(value, tuple) else (value,)
    return [f"--{dashed}", *(shlex.quote(str(part)) for part in parts)]
