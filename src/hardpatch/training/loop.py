"""The loop of pre-training.

Everything random is a function of the seed and the step (:mod:`hardpatch.runtime.seeding`), every schedule a function
of the step (:mod:`hardpatch.method.schedules`). So no random state is saved: a checkpoint holds what
:class:`hardpatch.training.state.State` lists, and a run that was killed ends bit-identical to one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from hardpatch.data.loader.loading import Batch, Normalise
from hardpatch.method.method import Losses, MaskedBatch
from hardpatch.method.schedules import ema_decay, untouched_share
from hardpatch.method.student import StudentOutput
from hardpatch.method.vit import whole_patches
from hardpatch.runs.build import build_normalise, clipped_parameters
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import Interrupted
from hardpatch.runtime.log import say, warn
from hardpatch.runtime.parallel import exchanging, parallel
from hardpatch.runtime.seeding import Stream, derive_seed, mask_noise
from hardpatch.runtime.signals import StopSignal
from hardpatch.training.batches import open_batches
from hardpatch.training.meter import Meter
from hardpatch.training.reporting import reporting
from hardpatch.training.sharding import gathered
from hardpatch.training.state import Run


def train_steps(run: Run, stop: StopSignal) -> None:
    """The loop: from the run's step to the last one.

    Raises:
        Interrupted: A signal arrived; the run is saved.
        InputError: The loss is not finite any more, too many images are damaged, or the disk is full.
    """
    config, state, schedule, device = run.config, run.state, run.schedule, run.device
    _announce(run)
    seed = config.optimisation.seed
    student = parallel(state.model.student, device)
    parameters = clipped_parameters(state.model.student)
    geometry, normalise = state.model.geometry, build_normalise(config).to(device)
    meter = Meter(device)
    slices = run.position.slices(config.optimisation.batch_size)
    batches, naming = open_batches(run)
    with (
        reporting(run, stop) as report,
        closing(batches),  # workers leave before the process does
        naming,
    ):
        report.start()
        meter.restart()
        for step in range(state.step, schedule.total_steps):
            for group in state.optimizer.param_groups:
                if not group.get("constant"):
                    group["lr"] = schedule.learning_rate(step)
            torch.manual_seed(derive_seed(seed, Stream.STEP, step, run.position.rank))
            noise = mask_noise(
                seed, step, batch_size=config.optimisation.batch_size, num_patches=geometry.num_patches, device=device
            )
            fetched = []
            for _ in slices:
                read, news = meter.next_batch(batches)
                report.damaged(news)
                fetched.append(read)
            distributed.arrived()  # where gradients are exchanged
            step_loss, correlation = torch.zeros(2, device=device)
            for number, (batch, weights) in enumerate(masked_batches(run, normalise, fetched, noise, slices)):
                with exchanging(student, last=number == len(slices) - 1):
                    losses = _learn(run, student, batch, weights)
                    losses.total.backward()
                meter.add(losses, of=len(slices))
                step_loss += losses.total.detach()
                correlation += losses.rank_correlation / len(slices)
            state.gate.update(correlation)
            norm = gathered(torch.nn.utils.clip_grad_norm_(parameters, config.optimisation.gradient_clip or math.inf))
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            state.model.update_teacher(decay=ema_decay(step, schedule.ema))
            meter.end_step(step, step_loss, norm)
            state.step = step + 1
            report.after_step(meter)
            if distributed.any_process(stop.name is not None):
                report.before_stop(meter)
                run.save()
                distributed.barrier()  # torchrun ends all processes with the first: not before the save is done
                raise Interrupted(
                    f"stopped by {stop.name or 'a signal to another process'} and saved at step {state.step} of "
                    f"{schedule.total_steps}; the same command goes on from there"
                )


def masked_batches(
    run: Run, normalise: Normalise, fetched: Sequence[Batch], noise: Tensor, slices: Sequence[slice]
) -> Iterator[tuple[MaskedBatch, Tensor]]:
    """The micro-batches of a step with their masks, and the weights of their losses in the loss of the whole step.

    Where all pixels are data every micro-batch weighs the same, and they are masked one after another. Where
    some are not, in any process, the means of the losses run over different numbers of patches: all micro-batches are
    masked first, and each weighs what it has of the patches that count in all processes together.
    """
    equal = noise.new_full((3,), 1 / len(slices))
    masked = (_mask(run, normalise, batch, noise[part]) for batch, part in zip(fetched, slices, strict=True))
    if not distributed.any_process(any(batch.valid is not None for batch in fetched)):
        yield from ((batch, equal) for batch in masked)
        return
    known = list(masked)
    counts = [run.method.num_counted(batch) for batch in known]
    mean = distributed.mean_of_tensor(torch.stack(counts).sum(dim=0))  # DDP averages over processes, too
    mean = mean.clamp(min=1 / distributed.world_size())
    yield from ((batch, count / mean) for batch, count in zip(known, counts, strict=True))


def _mask(run: Run, normalise: Normalise, batch: Batch, noise: Tensor) -> MaskedBatch:
    """Look at the full images and choose what is hidden, under the run's precision."""
    method, model, geometry = run.method, run.state.model, run.state.model.geometry
    valid = None if batch.valid is None else whole_patches(batch.valid, geometry.image_size, geometry.patch)
    images = normalise(batch.images)
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
        return method.mask(
            model.student, model.teacher if method.needs_teacher else None, images, noise,
            num_hard=run.state.gate.admit(int(method.num_hidden * run.hard_share(run.state.step))), valid=valid,
        )  # fmt: skip


def _learn(run: Run, student: Callable[..., StudentOutput], batch: MaskedBatch, weights: Tensor) -> Losses:
    """Reconstruct, and predict the loss, under the run's precision."""
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
        return run.method.learn(student, batch, weights)


def _announce(run: Run) -> None:
    """Say what is about to happen, and warn of what would go wrong silently."""
    schedule, config = run.schedule, run.config
    if not distributed.is_main():
        return
    rows, columns = run.state.model.student.encoder.patch_embed.grid_size
    say(
        f"{len(run.source):,} images, {config.optimisation.epochs} epochs of {schedule.steps_per_epoch} steps of "
        f"{config.optimisation.batch_size}; {config.model.encoder} on {rows}x{columns} patches, "
        f"{run.method.num_hidden} hidden; {run.device.type}, {'bf16' if run.bf16 else 'float32'}, "
        f"{run.position.world_size} process(es), {run.position.num_micro_batches} micro-batch(es)"
    )
    distributed.warn_of_emulated_bf16(config.run.precision, run.device)
    if schedule.ramp_steps > schedule.total_steps:
        warn(
            f"this run ends before its schedules do (schedule_epochs {config.optimisation.schedule_epochs}): with a "
            f"hard share of {run.hard_share(schedule.total_steps - 1):.2f}; more epochs would reach their ends"
        )
    stale = untouched_share(schedule.ema, schedule.total_steps)
    if run.method.needs_teacher and stale > 0.05 and not config.model.init_from:
        warn(
            f"after this run the teacher will still be {stale:.0%} its own random start (EMA decay "
            f"{schedule.ema.start:g} to {schedule.ema.end:g} over {schedule.total_steps} steps): what it says will be "
            "close to noise. "
            + (
                "Train for more epochs or with a smaller batch."
                if config.optimisation.ema_start is None
                and config.optimisation.ema_end is None
                and config.optimisation.ema_ramp_epochs is None
                else "Leave ema_start, ema_end and ema_ramp_epochs unset to adapt them to the length of the run."
            )
        )
