"""The loop: resume, accumulation, several processes, divergence, damage, folders."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

import hpm
from hpm.errors import InputError, Interrupted
from hpm.log import read_metrics
from hpm.pretrain import pretrain
from hpm.recipes import METHODS, recipe
from hpm.reporter import Reporter
from hpm.targets import PixelTarget
from tiny import TINY, assert_same_state, final_state, flags


def run(out, **changes):
    values = TINY | changes
    return pretrain(values.pop("data"), out, **values)


def weights(out):
    return final_state(out)["student"]


def test_a_run_learns_and_leaves_what_the_interface_promises(tmp_path):
    result = run(tmp_path / "run", epochs=30, figures=True, num_figure_images=2, knn=True, checkpoint_steps=90)
    assert result["steps"] == 180
    assert result["samples_seen"] == 180 * 8
    records = read_metrics(tmp_path / "run")
    losses = [record["reconstruction_loss"] for record in records if "reconstruction_loss" in record]
    assert losses[-1] < 0.9 * losses[0]
    assert {"step", "samples_seen", "epoch", "learning_rate", "ema_decay", "hard_share", "images_per_second",
            "data_wait", "gradient_norm", "predictor_rank_correlation"} <= records[-2].keys()  # fmt: skip
    assert {"step", "knn_top1"} <= records[0].keys(), "the untrained encoder is measured too"
    for name in ("config.yaml", "checkpoints/last", "checkpoints/weights.safetensors", "report.html", "result.json"):
        assert (tmp_path / "run" / name).exists(), name
    assert list((tmp_path / "run" / "events").iterdir())
    assert [file.name for file in sorted((tmp_path / "run" / "figures").iterdir())] == [
        f"hardness_{step:08d}.png" for step in (0, 90, 180)
    ]
    images = torch.randn(2, 3, 32, 32)
    encoder = hpm.load_encoder(tmp_path / "run")
    assert torch.equal(encoder.forward_features(images), hpm.load_encoder(tmp_path / "run/checkpoints/last")
                       .forward_features(images))  # fmt: skip
    assert hpm.load_teacher(tmp_path / "run").predict_loss(images).shape == (2, 16)


@pytest.mark.parametrize(("mask", "unit"), [("hard", "epoch"), ("attention", "step")])
def test_a_run_from_hard_to_easy(tmp_path, mask, unit):
    run(
        tmp_path / "run", mask=mask, hard_share_start=1.0, hard_share_end=0.25, hard_share_unit=unit, mask_ratio=0.6,
        log_steps=1, checkpoint_steps=12, figures=True, num_figure_images=2,
    )  # fmt: skip
    shares = [record["hard_share"] for record in read_metrics(tmp_path / "run") if "hard_share" in record]
    assert shares == sorted(shares, reverse=True)
    assert 0.25 <= shares[-1] < 0.4 < 0.6 < shares[0] <= 1


@pytest.mark.parametrize("stop_after", [1, 5, 6, 11])
@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_a_stopped_run_ends_bit_identical(tmp_path, monkeypatch, stop_after, unit):
    run(tmp_path / "whole", hard_share_unit=unit, predictor_view="both")
    after_step = Reporter.after_step

    def stopping(self, meter):
        after_step(self, meter)
        if self.run.state.step == stop_after:
            self.run.save()
            raise Interrupted("test")

    monkeypatch.setattr(Reporter, "after_step", stopping)
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", hard_share_unit=unit, predictor_view="both")
    monkeypatch.undo()
    run(tmp_path / "stopped", hard_share_unit=unit, predictor_view="both", workers=2)
    assert_same_state(final_state(tmp_path / "whole"), final_state(tmp_path / "stopped"))


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


def test_two_processes_give_the_result_of_one(tmp_path):
    run(tmp_path / "one", knn=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hpm",
         "pretrain", "--out", str(tmp_path / "two"), *flags(TINY | {"knn": True, "micro_batch_size": 2})],
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


def test_divergence_names_the_step_and_the_last_good_checkpoint(tmp_path, monkeypatch):
    calls, patch_loss = [], PixelTarget.patch_loss

    def poisoned(self, prediction, target):
        calls.append(1)
        return patch_loss(self, prediction, target) * (float("nan") if len(calls) == 8 else 1.0)

    monkeypatch.setattr(PixelTarget, "patch_loss", poisoned)
    with pytest.raises(InputError, match=r"not finite at step 8.*step_00000006\.pt.*learning-rate"):
        run(tmp_path / "run", checkpoint_steps=3)
    assert final_state(tmp_path / "run")["step"] == 6


def test_damaged_images_are_named_and_too_many_stop_the_run(tmp_path, capsys):
    from PIL import Image

    for number in range(20):
        Image.new("RGB", (40, 40), (number * 9, 99, 20)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"max_damaged.*1\.0%.*3\.png"):
        run(tmp_path / "run", data=str(tmp_path), batch_size=4)
    # Of all images, not of those read so far: the first batches alone would be over a tenth.
    run(tmp_path / "patient", data=str(tmp_path), batch_size=4, max_damaged=0.06, checkpoint_steps=1, seed=3)
    assert capsys.readouterr().err.count("3.png") >= 1


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
    assert hpm.load_encoder(tmp_path / "run").forward_features(torch.zeros(1, 13, 32, 32)).shape[0] == 1


@pytest.mark.parametrize("name", [*METHODS, "hpm-ema", "shapes-demo", "hpm-imagenet-200"])
def test_every_recipe_trains(tmp_path, name):
    small = {key: value for key, value in TINY.items() if key != "crop_scale"} | {"epochs": 1}
    if recipe(name).method.target == "tokens":
        small["num_tokens"] = 8
    schedule = {"ema_ramp_epochs": 0, "warmup_epochs": 0} if name == "hpm-imagenet-200" else {}
    result = pretrain(small.pop("data"), tmp_path / "run", recipe=name, **{**small, **schedule})
    assert result["steps"] == 6
    assert math.isfinite(result["reconstruction_loss"])


def test_metrics_of_a_killed_run_are_not_repeated(tmp_path, monkeypatch):
    after_step = Reporter.after_step

    def killed(self, meter):
        after_step(self, meter)
        if self.run.state.step == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(Reporter, "after_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", checkpoint_steps=4)
    assert max(record["step"] for record in read_metrics(tmp_path / "run")) == 9
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    monkeypatch.undo()
    run(tmp_path / "run", checkpoint_steps=4)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in lines if "loss" in record]
    assert steps == sorted(set(steps))


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
        wanted = hpm.load_encoder(source).pretrained_cfg
        assert tuple(wanted["mean"]) == (0.485, 0.456, 0.406)
        assert list(wanted["input_size"]) == [3, 32, 32]
