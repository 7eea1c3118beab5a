"""What happens between two steps: records, checkpoints, figures, and the reasons to stop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from hardpatch.data.loader.loading import Damage
from hardpatch.method.schedules import ema_decay
from hardpatch.runs.folder import about_this_run
from hardpatch.runs.trackers import Trackers, start_trackers
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import DivergedError, InputError, Interrupted
from hardpatch.runtime.log import RunLog, read_metrics, say, warn
from hardpatch.runtime.signals import StopSignal
from hardpatch.training.meter import Meter
from hardpatch.training.monitor import Watcher, labelled_validation
from hardpatch.training.sharding import is_sharded
from hardpatch.training.state import Run

LOOKS_SHARE = 0.1
"""Share of a run's time that looks at the model may take, but the first and the last."""
SHORT_LOOK = 1.0
"""Seconds of a look that is always made."""


class Reporter:
    """Between two steps: records, checkpoints, figures, kNN, damage, divergence.

    Args:
        run: The run.
        stop: Whether a signal came. A look at the model does not begin after one, and one ends it.
        log: Bar and files; None on all but the main process.
        watcher: What is looked at with every checkpoint.
        trackers: Get every record and figure, too; None on all but the main process.
    """

    def __init__(
        self, run: Run, stop: StopSignal, log: RunLog | None, watcher: Watcher, trackers: Trackers | None = None
    ) -> None:
        self.run = run
        self.stop = stop
        self.log = log
        self.watcher = watcher
        self.trackers = trackers
        self._last_save = time.monotonic()
        self._since = self._began = time.monotonic()
        self._last_look = 0.0
        """Seconds that the last look at the model took."""
        self._cold = run.compiled
        self._mining = run.state.gate.is_open()
        self._told = run.folder.read_damaged()
        """Damaged images that were named already, also before a resume, and why they are."""

    def start(self) -> None:
        """Look at the model where that was not done yet."""
        step = self.run.state.step
        watched = any(
            record["step"] == step and "reconstruction_loss" not in record
            for record in read_metrics(self.run.folder.path)
        )
        if self._is_due(step) and not watched:  # the untrained model, or a run that was killed while it was looked at
            self._watch(step)
        self._since = self._last_save = time.monotonic()

    def _watch(self, step: int) -> None:
        """Look at the model from outside, if there is time for it."""
        if not self._may_look(step):
            return
        began, total = time.monotonic(), self.run.schedule.total_steps
        kept = f"and saved at step {step} of {total}" if step else "before a step was made"
        with self.stop.at_once(f"{kept}; the same command goes on from there"):
            self._record(self.watcher.watch(step))
        if self.trackers:
            self.trackers.log_figure("hardness", self.run.folder.hardness_figure(step), step)
        self._last_look = time.monotonic() - began
        self.run.spent["looks"] += self._last_look

    def _may_look(self, step: int) -> bool:
        """Does another look leave nine tenths of the time for training? The first and the last are always made.

        Looks that take no time to speak of are made, too, and none after a signal. The main process decides for all.
        """
        if distributed.any_process(self.stop.name is not None):
            return False
        if step in (0, self.run.schedule.total_steps):
            return True

        def leaves_enough() -> bool:
            looks, whole = self.run.spent["looks"] + self._last_look, time.monotonic() - self._began + self._last_look
            return self._last_look < SHORT_LOOK or looks <= LOOKS_SHARE * whole

        return distributed.from_main(leaves_enough)

    def damaged(self, news: list[Damage]) -> None:
        """Name every damaged image once: now, or of several processes by the main one at the next record."""
        if distributed.world_size() == 1:
            self._tell_damage(dict(news))

    def _tell_damage(self, damaged: dict[str, str]) -> None:
        """Name those that were not named yet, and keep all of them in the run folder."""
        news = {name: reason for name, reason in damaged.items() if name not in self._told}
        if not news or self.log is None:
            return
        for name, reason in news.items():
            warn(f"damaged image left out: {name}: {reason}")
        self._told |= news
        self.run.folder.save_damaged(self._told)

    def after_step(self, meter: Meter) -> None:
        """Record and save when it is time to.

        Raises:
            InputError: DivergedError, too much damage, or a full disk.
        """
        run, step = self.run, self.run.state.step
        if self._cold:
            self._after_compiling(meter)
        if self.log:
            self.log.advance(step)
        due = self._is_due(step)
        if step % run.config.run.log_steps == 0 or due:
            self.stop_check(meter)
            self._clock()
            self._tell_mining()
            self._record({**meter.read(batch_size=run.config.optimisation.batch_size), **self._progress()})
        if due:
            self._save()
            self._watch(step)
        elif self._is_overdue():
            # Sharded models are saved by all processes together; otherwise the others know nothing of this.
            together = distributed.world_size() == 1 or is_sharded(run.state.model.student)
            if (bad := meter.first_bad_step() if together else meter.first_bad_step_here()) is not None:
                if not together:  # all processes stop together, at the next record
                    return
                self._diverged(bad)
            self._clock()
            self._save()
        else:
            return
        meter.restart()
        self._last_save = self._since = time.monotonic()

    def _save(self) -> None:
        began = time.monotonic()
        self.run.save()
        self.run.spent["checkpoints"] += time.monotonic() - began

    def _after_compiling(self, meter: Meter) -> None:
        """Say how long a process's first step took, which compiles: that is not training time, and no speed."""
        distributed.synchronise(self.run.device)
        now = time.monotonic()
        if self.log and now - self._since > 2:
            say(f"the first step, which compiles, took {now - self._since:.0f} s")
        self._cold, self._since = False, now
        meter.leave_out_time()

    def _tell_mining(self) -> None:
        """Say when the gate of mining has opened or closed."""
        gate = self.run.state.gate
        if gate.is_open() != self._mining and self.log:
            self._mining = not self._mining
            what = "begins" if self._mining else "pauses"
            say(f"step {self.run.state.step}: mining {what}, running rank correlation {float(gate.correlation):+.2f}")

    def _is_due(self, step: int) -> bool:
        """Is a checkpoint with figures due after this step?"""
        run, keep = self.run, self.run.config.run.keep_steps
        at = (run.schedule.total_steps, run.schedule.branching_step)
        return step % run.checkpoint_steps == 0 or step in at or bool(keep and step % keep == 0)

    def _is_overdue(self) -> bool:
        """Has the last checkpoint become too old for this process to go on without another?"""
        overdue = time.monotonic() - self._last_save > 60 * self.run.config.run.checkpoint_minutes
        overdue = overdue and distributed.is_main()
        return distributed.any_process(overdue) if is_sharded(self.run.state.model.student) else overdue

    def _clock(self) -> None:
        """Add the time since the last call to the run's training time."""
        now = time.monotonic()
        self.run.state.seconds += now - self._since
        self._since = now

    def before_stop(self, meter: Meter) -> None:
        """What a run that was told to stop needs before it is saved."""
        self.stop_check(meter)
        self._clock()

    def stop_check(self, meter: Meter) -> None:
        """Stop a run that has diverged or whose images are damaged, before a bad state is saved."""
        if (bad := meter.first_bad_step()) is not None:
            self._diverged(bad)
        limit = self.run.config.run.max_damaged
        everywhere = distributed.gather_objects(self._told | meter.damaged)
        damaged = {name: reason for found in everywhere for name, reason in found.items()}
        self._tell_damage(damaged)
        images = len(self.run.source)
        if len(damaged) > limit * images:
            name, reason = next(iter(damaged.items()))
            raise InputError(
                f"max_damaged: at most {limit:.1%} of the {images} images may be damaged, and {len(damaged)} are, of "
                f"those read so far; the first: {name}: {reason}. All are in {self.run.folder.damaged_file}; remove "
                "them (hardpatch data check --out lists the good ones), or allow more with --max-damaged"
            )
        if damaged and self.log and self.run.state.step == self.run.schedule.total_steps:
            say(f"{len(damaged)} of {images} images ({len(damaged) / images:.2%}) were damaged and left out: "
                f"{self.run.folder.damaged_file}")  # fmt: skip

    def _diverged(self, step: int) -> None:
        saved = self.run.checkpoints.steps()
        last = self.run.checkpoints.file(saved[-1]) if saved else "none yet"
        raise DivergedError(
            f"the loss or its gradient was not finite at step {step + 1}; last good checkpoint: {last}. Try a lower "
            "--base-learning-rate, a longer --warmup-epochs, a smaller --gradient-clip or --precision float32 "
            "in a new run, and look for constant or broken images"
        )

    def _progress(self) -> dict[str, float]:
        run, step = self.run, self.run.state.step
        seconds_per_step = run.state.seconds / step
        return {
            "epoch": step / run.schedule.steps_per_epoch,
            "samples_seen": step * run.config.optimisation.batch_size,
            "lr": run.schedule.learning_rate(step - 1),
            "ema_decay": ema_decay(step - 1, run.schedule.ema),
            "hard_share": run.hard_share(step - 1) if run.state.gate.is_open() else 0.0,
            "seconds": run.state.seconds,
            "seconds_left": seconds_per_step * (run.schedule.total_steps - step),
        }

    def _record(self, metrics: dict[str, float]) -> None:
        if self.log and metrics:
            self.log.record({"step": self.run.state.step, **metrics})
        if self.trackers and metrics:
            self.trackers.log(metrics, self.run.state.step)


@contextmanager
def reporting(run: Run, stop: StopSignal) -> Iterator[Reporter]:
    """A reporter whose files are closed at the end, and whose trackers are told how it went."""
    watcher = Watcher(run, labelled_validation(run.config))
    trackers = _start_trackers(run)
    finished = False
    try:
        if distributed.is_main():
            with RunLog(run.folder.path, total_steps=run.schedule.total_steps, first_step=run.state.step) as log:
                yield Reporter(run, stop, log, watcher, trackers)
        else:
            yield Reporter(run, stop, None, watcher)
        finished = True
    except Interrupted:
        trackers.close(finished=False)
        distributed.barrier()  # their last word takes its time, and torchrun ends all when one process has left
        raise
    finally:
        trackers.close(finished=finished)


def _start_trackers(run: Run) -> Trackers:
    """The trackers of the main process; of the others none.

    Raises:
        InputError: One cannot be started; on every process.
    """
    settings = run.config.run
    fields = {name: value for part in asdict(run.config).values() for name, value in part.items()}
    about = fields | about_this_run(run.device)
    started = [Trackers({})]

    def start() -> None:
        started[0] = start_trackers(settings.trackers, settings.tracker_project, run.folder.path, about)

    distributed.from_main(start)
    return started[0]
