"""Ablations: the plan, equal compute, runs that are shared and not repeated, and the tables."""

import csv
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys

import pytest
import torch

from hardpatch.cli import main
from hardpatch.config.config import Config
from hardpatch.config.recipes import METHODS, TARGETS, recipe
from hardpatch.cost.flops import training_flops
from hardpatch.runtime.errors import DivergedError, InputError, Interrupted
from hardpatch.tools.ablate import ablate as ablation
from hardpatch.tools.ablate import measure as measuring
from hardpatch.tools.ablate import step_times as clock
from hardpatch.tools.ablate.ablate import ablate
from hardpatch.tools.ablate.measure import Accuracies
from hardpatch.tools.ablate.runs_to_do import choose_rows, plan
from hardpatch.tools.ablate.step_times import seconds_of
from hardpatch.tools.ablate.suites import SUITES, AblateConfig
from hardpatch.tools.ablate.table import Outcome, Table, View, cells, mean_and_spread
from hardpatch.training.pretrain import train
from tiny import TINY, flags

torch.set_num_threads(1)
SMALL = {"data": "shapes:32", "epochs": 1}
FIELDS = {name: value for name, value in TINY.items() if name not in ("figures", "knn")} | SMALL
ROWS = ("mae", "hpm")
MEASURED = {"knn_top1": 1.0, "linear_top1": 2.0}


def setting(out, **changes):
    return AblateConfig(**{"suite": "mask-strategy", "out": str(out), "rows": ROWS, "seeds": (0, 1), **changes})


def planned(config, fields, step_seconds=None):
    return plan(config, choose_rows(config, fields), step_seconds)


@pytest.fixture
def trained(monkeypatch):
    """Folders that were trained, in order."""
    folders = []

    def spy(config, out, **rest):
        folders.append(out.name)
        return train(config, out, **rest)

    monkeypatch.setattr(ablation, "train", spy)
    return folders


def test_every_row_of_every_suite_is_a_recipe():
    for suite in SUITES.values():
        assert suite.reference in suite.rows
        assert len(set(suite.rows)) == len(suite.rows)
        for row in suite.rows:
            assert any(row == m or row in {f"{m}-{t}" for t in TARGETS} for m in METHODS)


def test_plan_has_every_row_and_seed_and_gives_the_cheaper_rows_more_epochs(tmp_path):
    jobs = planned(setting(tmp_path), FIELDS | {"epochs": 2})
    told = [(job.seed, job.row, job.budget, job.config.optimisation.epochs) for job in jobs]
    flops = {job.row: job.flops for job in jobs}
    longer = round(2 * flops["hpm"] / flops["mae"])
    assert longer > 2
    expected = [("mae", "epochs", 2), ("mae", "compute", longer), ("hpm", "epochs", 2)]
    assert told == [(seed, *job) for seed in (0, 1) for job in expected]
    assert all(job.config.optimisation.seed == job.seed for job in jobs)
    assert len({job.folder for job in jobs}) == 6
    assert len(planned(setting(tmp_path, equal_compute=False), FIELDS)) == 4


def test_equal_time_goes_by_the_clock_and_equal_compute_by_flops(tmp_path):
    fields = FIELDS | {"epochs": 2}
    jobs = planned(setting(tmp_path, seeds=(0,)), fields, {"mae": 0.01, "hpm": 0.044})
    assert [(job.row, job.budget) for job in jobs] == [
        ("mae", "epochs"), ("mae", "compute"), ("mae", "time"), ("hpm", "epochs"),
    ]  # fmt: skip
    assert jobs[2].epochs == round(2 * 4.4) == 9 != jobs[1].epochs
    alone = planned(setting(tmp_path, seeds=(0,), equal_compute=False), fields, {"mae": 0.01, "hpm": 0.01})
    assert [(job.row, job.budget) for job in alone] == [("mae", "epochs"), ("hpm", "epochs")]


def test_a_run_too_short_for_its_schedule_is_refused_before_the_first(tmp_path):
    fields = FIELDS | {"epochs": 2, "learning_rate_schedule": "constant", "cooldown_epochs": 1.5}
    call = setting(tmp_path, seeds=(0,), equal_compute=False)
    assert len(planned(call, fields, {"mae": 0.01, "hpm": 0.01})) == 2
    with pytest.raises(InputError, match="cooldown_epochs: must begin after the warm-up"):
        planned(call, fields, {"mae": 0.02, "hpm": 0.01})  # one epoch of mae


def test_ratios_of_steps_are_medians_within_rounds():
    """A round in which the machine was half as fast changes no ratio, nor does one that was spoilt for one row."""
    steady = seconds_of({"mae": [100.0, 50.0], "hpm": [25.0, 12.5]}, "mae")
    assert steady["hpm"] / steady["mae"] == pytest.approx(4)
    assert steady["mae"] == pytest.approx((1 / 100 + 1 / 50) / 2)
    spoilt = seconds_of({"mae": [100.0, 30.0, 100.0], "hpm": [25.0, 25.0, 25.0]}, "mae")
    assert spoilt["hpm"] / spoilt["mae"] == pytest.approx(4)
    rates = {"mae": [100.0, 100.0], "hpm": [25.0, 12.5], "fast": [100.0, 50.0]}
    alone = seconds_of(rates, "mae")
    assert alone["hpm"] / alone["mae"] == pytest.approx(6)
    assert seconds_of(rates, "hpm")["hpm"] / seconds_of(rates, "hpm")["fast"] == pytest.approx(1 / 0.25)
    assert seconds_of(rates, "hpm")["mae"] / seconds_of(rates, "hpm")["hpm"] == pytest.approx(
        (25 / 100 + 12.5 / 100) / 2
    )


def test_equal_time_end_to_end_is_timed_once_and_kept(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(clock, "SECONDS", 0.2)
    call = setting(tmp_path / "a", seeds=(0,), equal_compute=False, equal_time=True)
    ablate(call, FIELDS | {"epochs": 2})
    (file,) = (tmp_path / "a").glob("step-times-*.json")
    known = json.loads(file.read_text())
    assert known["images_per_second"]["mae"] > known["images_per_second"]["hpm"]
    assert len(known["images_per_second_rounds"]["mae"]) == clock.ROUNDS
    times = seconds_of(known["images_per_second_rounds"], "hpm")
    lines = list(csv.DictReader((tmp_path / "a/mask-strategy.csv").read_text().splitlines()))
    (longer,) = (line for line in lines if line["budget"] == "time")
    assert int(longer["epochs"]) == round(2 * times["hpm"] / times["mae"]) > 2
    page = (tmp_path / "a/mask-strategy.md").read_text()
    assert "## Equal time" in page
    assert "## Equal compute" not in page
    assert f"a step takes, of mae's: mae 1.00, hpm {times['hpm'] / times['mae']:.2f}." in page

    def never(*_):
        raise AssertionError("timed again")

    monkeypatch.setattr(clock, "_rates", never)
    ablate(call, FIELDS | {"epochs": 2})
    assert len(trained) == 3
    known["versions"]["device"] = "another machine"
    file.write_text(json.dumps(known))
    with pytest.raises(InputError, match="equal_time: the steps were timed on another machine"):
        ablate(call, FIELDS | {"epochs": 2})


@pytest.mark.parametrize("method", ["mae-tokens", "hpm-both-norm-pix", "random+lpred", "hpm-fast", "hpm-shared"])
def test_every_kind_of_step_can_be_timed(method, monkeypatch):
    """Codebooks that are not fitted, predictors without a teacher, several masks of an image."""
    monkeypatch.setattr(clock, "SECONDS", 0.01)
    monkeypatch.setattr(clock, "ROUNDS", 1)
    config = recipe_with(method, FIELDS | {"batch_size": 8, "micro_batch_size": 4})
    step = clock.TimedStep.of(config, torch.device("cpu"))
    assert step.config.optimisation.batch_size == 4
    (rates,) = clock._rates({method: step}, torch.device("cpu")).values()
    assert len(rates) == 1
    assert rates[0] > 0


def test_step_times_belong_to_what_decides_them():
    base = recipe_with("hpm", FIELDS)
    steps = {"hpm": clock.TimedStep.of(base, torch.device("cpu"))}
    for changed in ({"micro_batch_size": 4}, {"precision": "bf16"}, {"compile": "on"}, {"channels": 1},
                    {"activation_checkpointing": True}, {"predictor_depth": 2}):  # fmt: skip
        other = {"hpm": clock.TimedStep.of(recipe_with("hpm", FIELDS | changed), torch.device("cpu"))}
        assert clock.known_by(other) != clock.known_by(steps), changed
    longer = {"hpm": clock.TimedStep.of(recipe_with("hpm", FIELDS | {"epochs": 7}), torch.device("cpu"))}
    assert clock.known_by(longer) == clock.known_by(steps)


def test_labels_belong_to_the_images_of_a_table(tmp_path):
    """The same images with other classes are measured anew."""
    base = recipe_with("mae", FIELDS | {"data": "shapes:64"})
    found = [measuring.open_images(with_data(base, spec), f"shapes:32@1{kind}").fingerprint
             for spec, kind in (("shapes:64", ""), ("shapes:64:background", ":background"))]  # fmt: skip
    assert found[0] != found[1]


def with_data(config, spec):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, data=spec))


def test_flops_of_a_step_follow_the_table_of_the_method():
    """Forward multiply-adds of ViT-B/16: MAE 29.3 G, HPM without the teacher's reconstructor 68.4 G."""
    small = {"encoder_depth": 2, "decoder_depth": 2, "predictor_depth": 2}
    base = {"image_size": 64, "encoder": "vit_tiny_patch16_224", **small}
    cost = {name: training_flops(recipe_with(name, base)) for name in ("mae", "random+lpred", "hpm")}
    assert cost["mae"] < cost["random+lpred"] < cost["hpm"]


def recipe_with(name, fields):
    from hardpatch.config.values import with_fields

    return with_fields(recipe(name), fields)


def test_flops_of_a_block_are_the_textbooks():
    """12 D^2 per token in the linear layers and 2 T D in attention, forward; three times that for training."""
    config = recipe_with("mae", FIELDS | {"image_size": 64, "encoder_depth": 3})
    deeper = recipe_with("mae", FIELDS | {"image_size": 64, "encoder_depth": 4})
    width, tokens = 32, 16 + 1
    block = 2 * (12 * width**2 * tokens + 2 * tokens**2 * width)
    assert training_flops(deeper) - training_flops(config) == pytest.approx(3 * block, rel=0.01)


def test_ablation_end_to_end(tmp_path, trained, capsys):
    words = ["ablate", "--suite", "mask-strategy", "--out", str(tmp_path / "a"), "--rows", *ROWS, "--seeds", "0", "1",
             "--val", "shapes:24@1", "--json", *flags(FIELDS)]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert len(trained) == len(result["runs"]) == 6
    assert {run["epochs"] for run in result["runs"] if run["row"] == "hpm"} == {1}
    for run in result["runs"]:
        assert 0 <= run["knn_top1"] <= 100
        assert 0 <= run["linear_top1"] <= 100
        assert (run["rank_correlation"] is None) == (run["row"] == "mae")
        assert run["pflop"] == pytest.approx(run["gflop_per_image"] * run["samples"] / 1e6)
    assert set(result["untrained"]) == set(result["untrained_linear"]) == {"0", "1"}
    page = (tmp_path / "a/mask-strategy.md").read_text()
    assert page in printed
    assert "## Equal epochs" in page
    assert "## Equal compute" in page
    lines = list(csv.DictReader((tmp_path / "a/mask-strategy.csv").read_text().splitlines()))
    assert [line["row"] for line in lines] == ["mae", "mae", "hpm"] * 2
    assert (tmp_path / "a/mask-strategy.png").stat().st_size > 1000

    # Again: nothing is repeated. Another suite: shared rows neither.
    val = {"val": "shapes:24@1"}
    ablate(setting(tmp_path / "a"), FIELDS | val)
    assert len(trained) == 6
    ablate(setting(tmp_path / "a", suite="masks", rows=("hpm", "random+lpred"), seeds=(0,)), FIELDS | val)
    assert len(trained) == 7
    # Other fields: other runs, beside the old ones.
    ablate(setting(tmp_path / "a", rows=("hpm",), seeds=(0,)), {**FIELDS, **val, "mask_ratio": 0.5})
    assert len(trained) == 8
    assert len(list((tmp_path / "a/runs").iterdir())) == 8


def test_killed_ablation_goes_on_where_it_was(tmp_path, trained, monkeypatch):
    evaluated = []

    def killed(folder, *_):
        evaluated.append(folder.name)
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        return {"knn_top1": 1.0}

    monkeypatch.setattr(ablation, "measure", killed)
    call = setting(tmp_path, equal_compute=False)
    with pytest.raises(KeyboardInterrupt):
        ablate(call, FIELDS)
    assert "mae" in (tmp_path / "mask-strategy.md").read_text()
    steps = {path.name: (path / "metrics.jsonl").read_text() for path in (tmp_path / "runs").iterdir()}
    result = ablate(call, FIELDS)
    assert len(result["runs"]) == 4
    first, second = trained[0], trained[1]
    assert evaluated == [first, second, second, *trained[3:]]
    for name, text in steps.items():  # trained to the end before: not one step more
        assert (tmp_path / "runs" / name / "metrics.jsonl").read_text() == text


@pytest.mark.slow
def test_two_processes_fill_the_table_of_one(tmp_path):
    words = ["ablate", "--suite", "main", "--out", str(tmp_path / "two"), "--rows", "hpm", "--seeds", "0",
             "--val", "shapes:24@1", *flags(FIELDS)]  # fmt: skip
    done = subprocess.run(
        [*f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 -m hardpatch".split(), *words],
        check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=240, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("## Equal epochs") == 1
    (one,) = ablate(
        setting(tmp_path / "one", suite="main", rows=("hpm",), seeds=(0,)), {**FIELDS, "val": "shapes:24@1"}
    )["runs"]
    (two,) = csv.DictReader((tmp_path / "two/main.csv").read_text().splitlines())
    assert float(two["rank_correlation"]) == pytest.approx(one["rank_correlation"], abs=0.02)
    assert float(two["reconstruction_loss"]) == pytest.approx(one["reconstruction_loss"], rel=1e-3)
    assert float(two["knn_top1"]) == pytest.approx(one["knn_top1"], abs=100 / 24 + 0.1)


def test_a_run_that_diverges_is_reported_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "measure", lambda *_: {"knn_top1": 30.0})
    monkeypatch.setattr(ablation, "train", diverging(train))
    result = ablate(setting(tmp_path, equal_compute=False, seeds=(0,)), FIELDS)
    failed = {run["row"]: run["failed"] for run in result["runs"]}
    assert "not finite" in failed["mae"]
    assert failed["hpm"] is None
    page = (tmp_path / "mask-strategy.md").read_text()
    assert "| mae | failed |" in page
    assert "- mae, seed 0: the loss" in page


def test_an_ablation_of_which_every_run_diverges_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "train", diverging(train))
    with pytest.raises(InputError, match="every run of the ablation failed"):
        ablate(setting(tmp_path, rows=("mae",), seeds=(0,)), FIELDS)


def test_what_is_no_divergence_is_not_taken_for_a_result(tmp_path, monkeypatch):
    """Out of memory, say: mended by another flag, and then the run has to be done."""

    def too_big(config, out):
        out.mkdir(parents=True)
        (out / "config.yaml").write_text("")
        raise InputError("micro_batch_size: the device's memory is too small")

    monkeypatch.setattr(ablation, "train", too_big)
    with pytest.raises(InputError, match="micro_batch_size"):
        ablate(setting(tmp_path, rows=("mae",), seeds=(0,)), FIELDS)
    assert not list(tmp_path.glob("runs/*/evaluate/*"))


def test_figures_belong_to_the_images_they_were_measured_on(tmp_path, trained, monkeypatch):
    measured = []
    monkeypatch.setattr(ablation, "measure", lambda folder, images, _: measured.append(images) or MEASURED)
    call = setting(tmp_path, rows=("hpm",), seeds=(0,))
    for val, times in (("", 1), ("shapes:24@1", 2), ("shapes:24@1", 2), ("shapes:24@2", 3)):
        ablate(call, FIELDS | {"val": val})
        assert len(measured) == times
    assert len(set(trained)) == 1, "measured anew, not trained anew"
    assert len(list(tmp_path.glob("untrained-*.json"))) == 2


def test_a_table_without_accuracies_keeps_no_figure_of_another_call(tmp_path):
    with_accuracy = Table("main", "mae", "hpm", "why?", OUTCOMES, {"compute": {"mae"}}, {}, {})
    with_accuracy.write(tmp_path)
    assert (tmp_path / "main.png").is_file()
    without = [dataclasses.replace(run, knn_top1=None, linear_top1=None) for run in OUTCOMES]
    dataclasses.replace(with_accuracy, outcomes=without).write(tmp_path)
    assert not (tmp_path / "main.png").exists()


def test_runs_belong_to_the_images_not_to_the_spelling_of_their_path(tmp_path, monkeypatch):
    from PIL import Image

    for folder, shade in (("a", 10), ("b", 11)):
        (tmp_path / folder).mkdir()
        for number in range(16):
            Image.new("RGB", (40, 40), (number * shade, 99, 20)).save(tmp_path / folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    call = setting(tmp_path / "out", rows=("mae",), seeds=(0,))
    folders = [planned(call, FIELDS | {"data": data})[0].folder for data in ("a", "./a/", str(tmp_path / "a"), "b")]
    assert len(set(folders[:3])) == 1
    assert folders[3] != folders[0]


def test_rows_that_are_the_same_run_are_done_once(tmp_path, capsys):
    call = setting(tmp_path, suite="predicted-loss", scale="micro", rows=("hpm", "hpm-shallow"), seeds=(0,))
    # Predictors of the scale micro have one block already.
    assert [job.row for job in planned(call, {"data": "shapes:200"})] == ["hpm"]
    assert "hpm-shallow is the same run as hpm" in capsys.readouterr().err


def test_a_row_dearer_than_the_reference_gets_fewer_epochs(tmp_path):
    jobs = planned(setting(tmp_path, suite="main", rows=("mae", "hpm"), seeds=(0,)), FIELDS | {"epochs": 10})
    dearest = {(job.row, job.budget): job.config.optimisation.epochs for job in jobs}
    assert dearest[("mae", "compute")] > 10  # hpm-norm-pix is not among the rows: the dearest is the measure
    wanted = SUITES["main"]._replace(reference="mae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUITES, "main", wanted)
        jobs = planned(setting(tmp_path, suite="main", rows=("mae", "hpm"), seeds=(0,)), FIELDS | {"epochs": 10})
    epochs = {(job.row, job.budget): job.config.optimisation.epochs for job in jobs}
    assert epochs[("hpm", "compute")] == round(10 * jobs[0].flops / jobs[1].flops)
    assert ("mae", "compute") not in epochs


def test_images_of_other_channels_are_normalised_by_their_own_statistics(tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        for number in range(24):
            (tmp_path / split / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            Image.new("L", (40, 40), number * 9).save(tmp_path / split / "ab"[number % 2] / f"{number}.png")
    fields = FIELDS | {"channels": 1, "data": str(tmp_path / "train"), "val": str(tmp_path / "val")}
    (run,) = ablate(setting(tmp_path / "out", rows=("hpm",), seeds=(0,)), fields)["runs"]
    assert 0 <= run["knn_top1"] <= 100


def test_a_signal_while_a_run_is_measured_stops_after_it(tmp_path, trained, monkeypatch):
    def signalled(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"knn_top1": 1.0}

    monkeypatch.setattr(ablation, "measure", signalled)
    with pytest.raises(Interrupted, match="SIGTERM before run 2 of 3"):
        ablate(setting(tmp_path, seeds=(0,)), FIELDS | {"epochs": 2})
    assert len(trained) == 1
    assert "mae" in (tmp_path / "mask-strategy.md").read_text()


def diverging(train):
    def run(config, out, **rest):
        result = train(config, out, **rest)
        if config.method.mask == "random":
            raise DivergedError("the loss or its gradient was not finite at step 3")
        return result

    return run


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({"suite": "mian"}, {}, "did you mean main?"),
        ({"scale": "mikro"}, {}, "did you mean micro?"),
        ({"rows": ("hmp",)}, {}, "no recipe 'hmp'"),
        ({"rows": ("hpm-64px", "mae")}, {}, "the scale is set for all by --scale; got 'hpm-64px'"),
        ({"rows": ("mae", "mae")}, {}, "rows: must be different"),
        ({"seeds": ()}, {}, "seeds: tuple should have at least 1 item"),
        ({"seeds": (1, 1)}, {}, "seeds: must be different numbers"),
        ({}, {"seed": 3}, "seed: every row"),
        ({}, {"mask": "random"}, "mask: cannot be the same for every row"),
        ({}, {"epohcs": 3}, "did you mean epochs?"),
        ({}, {"data": "/nothing"}, "does not exist"),
        ({}, {"val": "/nothing"}, "val: '/nothing' does not exist"),
        ({}, {"batch_size": 64}, "batch_size: must be at most"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_trained(tmp_path, changes, fields, message):
    with pytest.raises(InputError) as caught:
        ablate(setting(tmp_path / "a", **changes), {**FIELDS, **fields})
    assert message in str(caught.value)
    assert not (tmp_path / "a").exists()


def outcome(row, seed, knn, budget="epochs", **rest):
    return Outcome(**{
        "row": row, "seed": seed, "budget": budget, "epochs": 3, "samples": 1000, "gflop_per_image": 0.5, "pflop": 0.1,
        "seconds": 60.0, "reconstruction_loss": 0.5, "knn_top1": knn, "linear_top1": knn + 10, "rank_correlation": None,
        "foreground_auroc": None, "failed": None, "folder": "", **rest,
    })  # fmt: skip


OUTCOMES = [
    outcome("mae", 0, 20.0), outcome("mae", 1, 24.0), outcome("mae", 2, 22.0),
    outcome("mae", 0, 25.0, "compute"), outcome("mae", 1, 25.5, "compute"),
    outcome("hpm", 0, 21.0), outcome("hpm", 1, 26.0), outcome("hpm", 3, 90.0),
]  # fmt: skip


def test_differences_are_paired_by_seed():
    view = View(OUTCOMES, "epochs", ())
    row = cells(view, "hpm", "mae")
    assert row[1] == f"{statistics.fmean([21, 26, 90]):.1f} ± {statistics.stdev([21, 26, 90]):.1f}"
    assert row[2] == "+1.5 ± 0.7"  # of seeds 0 and 1 alone: 1 and 2
    assert row[4] == row[2]
    assert cells(view, "mae", "mae")[1:5] == ("22.0 ± 2.0", "-", "32.0 ± 2.0", "-")


def test_equal_compute_takes_the_longer_runs_and_keeps_rows_that_needed_none():
    view = View(OUTCOMES, "compute", {"mae"})
    assert view.accuracies("mae") == {0: 25.0, 1: 25.5}
    assert view.accuracies("hpm") == {0: 21.0, 1: 26.0, 3: 90.0}
    assert cells(view, "hpm", "mae")[2] == "-1.8 ± 3.2"


def test_a_row_whose_longer_run_is_not_done_is_not_in_the_view_of_equal_compute():
    waiting = [run for run in OUTCOMES if run.budget == "epochs"]
    assert View(waiting, "compute", {"mae"}).rows["mae"] == []
    assert View(waiting, "compute", {"mae"}).accuracies("hpm")


@pytest.mark.parametrize(
    ("values", "text"),
    [([], "-"), ([1.25], "1.2"), ([1, 2, 3], "2.0 ± 1.0"), ([float(v) for v in (0, 0)], "0.0 ± 0.0")],
)
def test_mean_and_spread(values, text):
    assert mean_and_spread(values, 1) == text


def test_columns_without_a_figure_are_left_out():
    page = Table(
        "main", "mae", "hpm", "why?", OUTCOMES, {"compute": {"mae"}}, {0: Accuracies(10.0, 12.0)}, {"torch": "2"}
    ).as_markdown()
    assert "foreground" not in page
    assert "random start: 20-NN top-1 10.0 %, linear top-1 12.0 %." in page
    assert "- torch: 2" in page
    header = next(line for line in page.splitlines() if line.startswith("|  |"))
    assert all(line.count("|") == header.count("|") for line in page.splitlines() if line.startswith("|"))


def test_config_of_the_api_needs_no_more_than_suite_and_out():
    assert AblateConfig("main", "out").seeds == (0, 1, 2)
    assert Config().run.val == ""


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_table_of_one_seed_says_that_it_is_no_result(seeds):
    some = [run for run in OUTCOMES if run.seed < seeds]
    table = Table("main", "mae", "hpm", "why?", some, {}, {}, {})
    assert ("One seed: no result" in table.as_markdown()) == (seeds == 1)
    assert ("one seed: no result" in table.draw().get_suptitle()) == (seeds == 1)
