"""The loop: resume, accumulation, several processes, divergence, damage, folders."""

import json
import math
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

import hardpatch
from hardpatch.config.config import Config
from hardpatch.config.recipes import METHODS, recipe
from hardpatch.config.values import load_config, with_fields
from hardpatch.data.loader.loading import Batch
from hardpatch.method.method import Method
from hardpatch.method.schedules import ema_decay, learning_rate
from hardpatch.method.student import Teacher
from hardpatch.method.targets.pixels import PixelTarget
from hardpatch.runs.checkpoint import CheckpointFolder
from hardpatch.runs.schedule import resolve_schedule
from hardpatch.runtime.distributed import any_process, gather_objects, mean_over_processes
from hardpatch.runtime.errors import InputError, Interrupted
from hardpatch.runtime.log import read_metrics
from hardpatch.training.meter import Meter
from hardpatch.training.reporting import Reporter
from tiny import TINY, assert_same_state, final_state, flags, in_child, pretrain, stop_after


def run(out, **changes):
    values = TINY | changes
    return pretrain(values.pop("data"), out, **values)


def weights(out):
    return final_state(out)["student"]


def saved_steps(out):
    return CheckpointFolder(out / "checkpoints").steps()


def signal_after(monkeypatch, step, number):
    """Signal this very process after a step."""
    after_step = Reporter.after_step

    def signalled(self, meter):
        after_step(self, meter)
        if self.run.state.step == step:
            signal.raise_signal(number)

    monkeypatch.setattr(Reporter, "after_step", signalled)


@pytest.mark.parametrize(
    ("precision", "hardware", "times"), [("bf16", False, 1), ("bf16", True, 0), ("auto", False, 0)]
)
def test_bf16_that_the_processor_emulates_is_told_once(tmp_path, capsys, monkeypatch, precision, hardware, times):
    monkeypatch.setattr("hardpatch.runtime.distributed.has_bf16", lambda _: hardware)
    run(tmp_path / "run", epochs=1, precision=precision)
    assert capsys.readouterr().err.count("this processor has no bf16 and emulates it") == times


def test_a_run_learns_and_leaves_what_the_interface_promises(tmp_path):
    result = run(tmp_path / "run", epochs=30, figures=True, num_figure_images=2, knn=True, checkpoint_steps=90)
    assert result["steps"] == 180
    assert result["samples_seen"] == 180 * 8
    records = read_metrics(tmp_path / "run")
    losses = [record["reconstruction_loss"] for record in records if "reconstruction_loss" in record]
    assert losses[-1] < 0.9 * losses[0]
    assert {"step", "samples_seen", "epoch", "lr", "ema_decay", "hard_share", "images_per_second",
            "data_wait", "gradient_norm", "predictor_rank_correlation"} <= records[-2].keys()  # fmt: skip
    assert {"step", "knn_top1"} <= records[0].keys(), "the untrained encoder is measured too"
    assert (result["knn_top1_untrained"], result["knn_top1"]) == (records[0]["knn_top1"], records[-1]["knn_top1"])
    for name in ("config.yaml", "checkpoints/last", "checkpoints/weights.safetensors", "report.html", "result.json"):
        assert (tmp_path / "run" / name).exists(), name
    assert list((tmp_path / "run" / "events").iterdir())
    assert [file.name for file in sorted((tmp_path / "run" / "figures").iterdir())] == [
        f"hardness_{step:08d}.png" for step in (0, 90, 180)
    ]
    schedule = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["about"]["schedule"]
    assert (schedule["total_steps"], schedule["steps_per_epoch"]) == (180, 6)
    assert (
        schedule["ema"] == resolve_schedule(with_fields(Config(), TINY | {"epochs": 30}).optimisation, 48).ema._asdict()
    )
    images = torch.randn(2, 3, 32, 32)
    encoder = hardpatch.load_encoder(tmp_path / "run")
    assert torch.equal(encoder.forward_features(images), hardpatch.load_encoder(tmp_path / "run/checkpoints/last")
                       .forward_features(images))  # fmt: skip
    assert hardpatch.load_teacher(tmp_path / "run").predict_loss(images).shape == (2, 16)


@pytest.mark.parametrize(("mask", "unit"), [("hard", "epoch"), ("attention", "step")])
def test_a_run_from_hard_to_easy(tmp_path, mask, unit):
    run(
        tmp_path / "run", mask=mask, hard_share_start=1.0, hard_share_end=0.25, hard_share_unit=unit, mask_ratio=0.6,
        log_steps=1, checkpoint_steps=12, figures=True, num_figure_images=2,
    )  # fmt: skip
    shares = [record["hard_share"] for record in read_metrics(tmp_path / "run") if "hard_share" in record]
    assert shares == sorted(shares, reverse=True)
    assert 0.25 <= shares[-1] < 0.4 < 0.6 < shares[0] <= 1


@pytest.mark.parametrize("last", [1, 5, 6, 11])
@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_a_stopped_run_ends_bit_identical(tmp_path, monkeypatch, last, unit):
    run(tmp_path / "whole", hard_share_unit=unit, predictor_view="both")
    stop_after(monkeypatch, last)
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", hard_share_unit=unit, predictor_view="both")
    monkeypatch.undo()
    run(tmp_path / "stopped", hard_share_unit=unit, predictor_view="both", workers=2)
    assert_same_state(final_state(tmp_path / "whole"), final_state(tmp_path / "stopped"))


def test_a_signal_saves_the_step_where_it_arrives(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    signal_after(monkeypatch, 5, signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM and saved at step 5 of 12"):
        run(tmp_path / "run", checkpoint_steps=12)
    assert saved_steps(tmp_path / "run") == [5]
    assert signal.getsignal(signal.SIGTERM) == before


def test_time_saves_and_is_counted_over_interruptions(tmp_path, monkeypatch):
    now, after_step = [0.0], Reporter.after_step
    monkeypatch.setattr("hardpatch.training.reporting.time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(self, meter):
        now[0] += 40
        after_step(self, meter)

    monkeypatch.setattr(Reporter, "after_step", slow)
    signal_after(monkeypatch, 5, signal.SIGUSR1)
    changes = {"checkpoint_steps": 12, "checkpoint_minutes": 1, "log_steps": 12, "keep_last": 12}
    with pytest.raises(Interrupted):
        run(tmp_path / "run", **changes)
    assert run(tmp_path / "run", **changes)["train_seconds"] == 12 * 40
    assert saved_steps(tmp_path / "run") == [2, 4, 5, 7, 9, 11, 12]


def test_checkpoints_are_kept_as_asked(tmp_path):
    run(tmp_path / "run", checkpoint_steps=3, keep_last=1, keep_steps=4)
    assert saved_steps(tmp_path / "run") == [4, 8, 12]


def test_every_step_follows_its_schedules_and_the_teacher_comes_last(tmp_path, monkeypatch):
    seen, mask, learn, update = [], Method.mask, torch.optim.AdamW.step, Teacher.update

    def spied_mask(self, *arguments, num_hard, **others):
        seen.append(("hard", num_hard))
        return mask(self, *arguments, num_hard=num_hard, **others)

    def spied_learn(self, *arguments):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(1e-3, rel=1e-2), "clipped"
        seen.append(("learning rate", {group["lr"] for group in self.param_groups}))
        return learn(self, *arguments)

    def spied_update(self, student, decay):
        seen.append(("decay", decay))
        update(self, student, decay)

    monkeypatch.setattr(Method, "mask", spied_mask)
    monkeypatch.setattr(torch.optim.AdamW, "step", spied_learn)
    monkeypatch.setattr(Teacher, "update", spied_update)
    changes = {"gradient_clip": 1e-3, "warmup_epochs": 0.5, "ema_start": 0.5, "ema_end": 0.9, "ema_ramp_epochs": 1}
    run(tmp_path / "run", **changes)
    config = with_fields(recipe("hpm"), TINY | changes).optimisation
    ema = resolve_schedule(config, 48).ema
    peak = config.base_learning_rate * 8 / 256
    assert seen == [
        event
        for step in range(12)
        for event in (
            ("hard", step // 2),
            ("learning rate", {learning_rate(step, peak=peak, warmup_steps=3, total_steps=12)}),
            ("decay", ema_decay(step, ema)),
        )
    ]


def test_looking_at_a_run_leaves_it_as_it_is(tmp_path):
    run(tmp_path / "alone")
    run(tmp_path / "watched", figures=True, num_figure_images=2, knn=True, val="shapes:24@1", checkpoint_steps=4)
    assert_same_state(final_state(tmp_path / "alone"), final_state(tmp_path / "watched"))


def test_two_processes_cannot_train_the_same_run(tmp_path):
    run(tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    code = (
        "import sys; from hardpatch.runs.folder import RunFolder as F; f = F(sys.argv[1]); f.claim(); print(1); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match="another process works in"):
            run(tmp_path / "run")
        other.kill()
    run(tmp_path / "run")


def test_a_folder_in_which_a_run_was_killed_at_birth_is_free(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.config.yaml.123.tmp").write_text("da")
    assert run(tmp_path / "run")["steps"] == 12


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys):
    first = run(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run(tmp_path / "run") == first
    assert "finished" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_seeds_decide(tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b")
    run(tmp_path / "c", seed=1)
    assert_same_state(final_state(tmp_path / "a"), final_state(tmp_path / "b"))
    assert not torch.equal(weights(tmp_path / "a")["mask_token"], weights(tmp_path / "c")["mask_token"])


def test_deterministic_mode_runs_and_is_switched_off_again(tmp_path):
    run(tmp_path / "run", deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()


def test_micro_batches_give_the_result_of_the_whole_batch(tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "parts", micro_batch_size=2)
    for name, expected in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "parts")[name], expected, rtol=1e-3, atol=1e-4)
    for whole, parts in zip(read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts"), strict=True):
        assert parts["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-3), "AdamW would hide a factor"


def talk(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    said = [any_process(rank == 1), any_process(False), gather_objects(rank), mean_over_processes({"a": rank, "b": 4})]
    (folder / f"{rank}.json").write_text(json.dumps(said))
    torch.distributed.destroy_process_group()


def test_processes_tell_each_other(tmp_path):
    processes = [in_child(talk, rank, tmp_path) for rank in range(2)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [True, False, [0, 1], {"a": 0.5, "b": 4}]


def test_two_processes_give_the_result_of_one(tmp_path):
    run(tmp_path / "one", knn=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hardpatch",
         "pretrain", "--recipe", "hpm", "--out", str(tmp_path / "two"),
         *flags(TINY | {"knn": True, "micro_batch_size": 2})],
        check=False, env=environment, capture_output=True, timeout=240, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for part in ("student", "teacher"):
        two = final_state(tmp_path / "two")[part]
        for name, expected in final_state(tmp_path / "one")[part].items():
            torch.testing.assert_close(two[name], expected, rtol=1e-3, atol=1e-4, msg=lambda t, n=name: f"{n}: {t}")
    pairs = zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True)
    for one, two in pairs:
        assert one.get("knn_top1") == two.get("knn_top1"), "kNN is exact over ranks"
        if "loss" in one:
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
            assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)


def poison(monkeypatch, step, *, only_gradient=False):
    """Make the loss of a step, or its gradient alone, NaN."""
    calls, patch_loss = [], PixelTarget.patch_loss

    def poisoned(self, prediction, target):
        calls.append(1)
        loss = patch_loss(self, prediction, target)
        if len(calls) == step and only_gradient:
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss * math.nan if len(calls) == step and not only_gradient else loss

    monkeypatch.setattr(PixelTarget, "patch_loss", poisoned)


@pytest.mark.parametrize("only_gradient", [False, True])
def test_divergence_names_the_step_and_the_last_good_checkpoint(tmp_path, monkeypatch, only_gradient):
    poison(monkeypatch, 8, only_gradient=only_gradient)
    with pytest.raises(InputError, match=r"not finite at step 8.*step_00000006\.pt.*learning-rate"):
        run(tmp_path / "run", checkpoint_steps=3)
    assert final_state(tmp_path / "run")["step"] == 6


@pytest.mark.parametrize(("minutes", "saved"), [(1e-9, [5, 6, 7]), (30, [])])
def test_a_diverged_state_is_not_saved_by_time_nor_signal(tmp_path, monkeypatch, minutes, saved):
    poison(monkeypatch, 8, only_gradient=True)
    signal_after(monkeypatch, 8, signal.SIGTERM)
    with pytest.raises(InputError, match="not finite at step 8"):
        run(tmp_path / "run", checkpoint_steps=12, log_steps=12, checkpoint_minutes=minutes)
    assert saved_steps(tmp_path / "run") == saved


def test_the_meter_tells_rate_and_waiting(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hardpatch.training.meter.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def batches():
        while True:
            now[0] += 3
            yield Batch(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), [])

    meter, endless = Meter(torch.device("cpu")), batches()
    for _ in range(2):
        for step in range(2):
            meter.next_batch(endless)
            now[0] += 1
            meter.end_step(step, torch.zeros(()), torch.tensor(1.0 + step))
        figures = meter.read(batch_size=4)
        assert (figures["data_wait"], figures["images_per_second"], figures["gradient_norm"]) == (0.75, 1.0, 1.5)


def test_damaged_images_are_named_and_too_many_stop_the_run(tmp_path, capsys):
    from PIL import Image

    for number in range(20):
        Image.new("RGB", (40, 40), (number * 9, 99, 20)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"max_damaged.*1\.0%.*3\.png"):
        run(tmp_path / "run", data=str(tmp_path), batch_size=4)
    # Of all images, not of those read so far: the first batches alone would be over a tenth.
    run(tmp_path / "patient", data=str(tmp_path), batch_size=4, max_damaged=0.06, checkpoint_steps=1, seed=3)
    assert capsys.readouterr().err.count("3.png") == 2, "once in each run"


def test_a_teacher_that_cannot_follow_warns(tmp_path, capsys):
    run(tmp_path / "run", ema_start=0.9999, ema_end=0.9999)
    assert "random start" in capsys.readouterr().err
    run(tmp_path / "adapted")
    assert "random start" not in capsys.readouterr().err


@pytest.mark.parametrize("changes", [
    {"image_size": (32, 48)},
    {"encoder": "vit_wee_patch16_reg1_gap_256"},
    {"mask": "random", "predicted_loss": "none"},
    {"mask": "random", "predicted_loss": "absolute"},
    {"predictor_view": "full", "target": "norm_pix"},
])  # fmt: skip
def test_other_shapes_of_run(tmp_path, changes):
    result = run(tmp_path / "run", figures=True, num_figure_images=2, **changes)
    assert result["reconstruction_loss"] > 0
    assert (result["predictor_rank_correlation"] is None) == (changes.get("mask") == "random")  # no teacher is asked


def test_thirteen_channels_are_normalised_by_their_own_statistics(tmp_path):
    import numpy as np

    chance = np.random.default_rng(0)
    for number in range(16):
        np.save(tmp_path / f"{number}.npy", chance.integers(0, 60, (13, 40, 40), dtype=np.uint8))
    run(tmp_path / "run", data=str(tmp_path), channels=13, figures=True, num_figure_images=2)
    mean = final_state(tmp_path / "run")["config"]["data"]["mean"]
    assert len(mean) == 13
    assert mean[0] == pytest.approx(29.5 / 255, rel=0.02)
    assert hardpatch.load_encoder(tmp_path / "run").forward_features(torch.zeros(1, 13, 32, 32)).shape[0] == 1


@pytest.mark.parametrize("name", [*METHODS, "hpm-ema", "shapes-demo", "hpm-imagenet-200"])
def test_every_recipe_trains(tmp_path, name):
    small = {key: value for key, value in TINY.items() if key != "crop_scale"} | {"epochs": 1, "data": "shapes:16"}
    if recipe(name).method.target == "tokens":
        small["num_tokens"] = 8
    schedule = {"ema_ramp_epochs": 0, "warmup_epochs": 0} if name == "hpm-imagenet-200" else {}
    result = pretrain(small.pop("data"), tmp_path / "run", recipe=name, **{**small, **schedule})
    assert result["steps"] == 2
    assert math.isfinite(result["reconstruction_loss"])


def test_metrics_of_a_killed_run_are_neither_repeated_nor_lost(tmp_path, monkeypatch):
    after_step = Reporter.after_step

    def killed(self, meter):
        after_step(self, meter)
        if self.run.state.step == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(Reporter, "after_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", checkpoint_steps=4, knn=True)
    assert max(record["step"] for record in read_metrics(tmp_path / "run")) == 9
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    monkeypatch.undo()
    for name in ("run", "whole"):
        run(tmp_path / name, checkpoint_steps=4, knn=True)
    killed, whole = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "whole")
    )
    same = ("step", "loss", "gradient_norm", "samples_seen", "lr", "ema_decay", "hard_share", "knn_top1")
    assert [[record.get(key) for key in same] for record in killed] == [[r.get(key) for key in same] for r in whole]
    assert [record["step"] for record in whole] == [0, 3, 4, 4, 6, 8, 8, 9, 12, 12]


def test_other_images_than_the_run_began_with_are_refused(tmp_path, monkeypatch):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(16):
        Image.new("RGB", (40, 40), (number * 9, 99, 20)).save(folder / f"{number}.png")
    after_step = Reporter.after_step

    def stopping(self, meter):
        after_step(self, meter)
        self.run.save()
        raise Interrupted("test")

    monkeypatch.setattr(Reporter, "after_step", stopping)
    with pytest.raises(Interrupted):
        run(tmp_path / "run", data=str(folder))
    monkeypatch.undo()
    Image.new("RGB", (40, 40)).save(folder / "one_more.png")
    with pytest.raises(InputError, match=r"16 images.*17 images"):
        run(tmp_path / "run", data=str(folder))
    (folder / "one_more.png").unlink()
    assert run(tmp_path / "run", data=str(folder))["steps"] == 4


def test_a_run_goes_on_with_its_images_wherever_they_are_but_not_with_others(tmp_path, monkeypatch):
    from PIL import Image

    for name, shift in (("images", 0), ("others", 1)):
        (tmp_path / name).mkdir()
        for number in range(16):
            Image.new("RGB", (40, 40), (number * 9, 99, shift)).save(tmp_path / name / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    run("run", data="images", epochs=1)
    for same in ("images/", "./images", str(tmp_path / "images")):
        assert run("run", data=same, epochs=1)["steps"] == 2
    (tmp_path / "images").rename(tmp_path / "moved")
    assert run("run", data="moved", epochs=1)["steps"] == 2
    with pytest.raises(InputError, match="data: 'others' does not hold the images this run began with"):
        run("run", data="others", epochs=1)
    for file in (tmp_path / "run" / "checkpoints").glob("step_*"):
        file.unlink()
    with pytest.raises(InputError, match="data: 'images' -> 'others'"):  # no fingerprint: only the same place will do
        run("run", data="others", epochs=1)


def test_the_encoder_says_how_it_wants_its_images(tmp_path):
    run(tmp_path / "run")
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "last"):
        wanted = hardpatch.load_encoder(source).pretrained_cfg
        assert tuple(wanted["mean"]) == (0.485, 0.456, 0.406)
        assert list(wanted["input_size"]) == [3, 32, 32]


def test_a_folder_without_a_checkpoint_is_no_obstacle(tmp_path, monkeypatch):
    """A run that was stopped before its first checkpoint, by other settings, is begun anew."""

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hardpatch.training.pretrain.train_steps", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", mask_ratio=0.5)
    assert load_config(tmp_path / "run" / "config.yaml").method.mask_ratio == 0.5
    monkeypatch.undo()
    assert run(tmp_path / "run", mask_ratio=0.75)["steps"] == 12
    assert load_config(tmp_path / "run" / "config.yaml").method.mask_ratio == 0.75


def test_looks_take_a_tenth_of_the_time_at_most(tmp_path, monkeypatch):
    """But the first and the last, and those that take no time to speak of."""
    now, looks = [0.0], []
    monkeypatch.setattr("hardpatch.training.reporting.time", SimpleNamespace(monotonic=lambda: now[0]))

    def after_step(self, meter, before=Reporter.after_step):
        now[0] += 10
        before(self, meter)

    def watch(self, step):
        looks.append(step)
        now[0] += 6
        return {"knn_top1": 0.0}

    monkeypatch.setattr(Reporter, "after_step", after_step)
    monkeypatch.setattr("hardpatch.training.monitor.Watcher.watch", watch)
    result = run(tmp_path / "run", checkpoint_steps=1, epochs=4)
    assert looks == [0, 11, 17, 22, 24]
    assert result["looks_seconds"] == 5 * 6
