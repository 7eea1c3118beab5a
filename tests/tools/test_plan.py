"""``hardpatch plan``: the rules, what is proposed, and that the proposal is a run."""

import importlib
import json
import random
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hardpatch.config.plan import PlanConfig, duration, parse_budget
from hardpatch.config.recipes import recipe
from hardpatch.config.rules import split_batch
from hardpatch.config.values import load_config
from hardpatch.runtime.errors import InputError
from hardpatch.tools.plan import candidates, plan
from hardpatch.tools.plan.candidates import (
    Machine,
    StepSeconds,
    loading_limit,
    make_candidate,
    reckoned,
    sizes_for,
    step_seconds,
    with_loading,
)
from hardpatch.tools.plan.images_found import Loading, look_at, open_images_of, time_loading
from hardpatch.tools.plan.sizes import (
    MAX_EPOCHS,
    SIZES,
    Size,
    choose_batch,
    choose_grid,
    choose_patch,
    choose_side,
    enough_views,
    epochs_within,
    preferred,
)

NAMES = [size.name for size in SIZES]
CPU = torch.device("cpu")
planning = importlib.import_module("hardpatch.cli.plan")  # the package's attribute of this name is the function
pretraining = importlib.import_module("hardpatch.cli.pretrain")


# The rules


@pytest.mark.parametrize(
    ("text", "seconds"), [("90m", 5400), ("8h", 28800), ("2d", 172800), ("1.5 h", 5400), ("30S", 30)]
)
def test_budgets(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "8", "h", "-1h", "0h", "8 hours", "1e3s", "nan h"])
def test_what_is_no_budget(text):
    with pytest.raises(InputError, match="budget: must be a number above 0 and s, m, h or d"):
        parse_budget(text)


def test_durations():
    assert [duration(s) for s in (0.5, 150, 7200, 5400, 259_200)] == ["0.5 s", "2.5 min", "2.0 h", "90.0 min", "3.0 d"]


@pytest.mark.parametrize(
    ("height", "width", "grid"),
    [
        ((500), 375, (224, 16)), (224, 224, (224, 16)), (223, 300, (224, 16)), (160, 160, (160, 16)),
        (120, 120, (128, 16)), (100, 128, (96, 8)), (64, 64, (64, 8)), (63, 63, (64, 8)), (40, 72, (40, 4)),
        (32, 32, (32, 4)), (28, 28, (32, 4)), (10, 200, (32, 4)),
    ],
)  # fmt: skip
def test_crops_are_about_as_large_as_the_images_in_64_patches_or_more(height, width, grid):
    assert choose_grid(height, width) == grid


def test_every_grid_can_be_halved_for_the_teacher_and_leaves_a_choice():
    for side in range(1, 400):
        chosen, patch = choose_grid(side, side + 7)
        assert chosen % (2 * patch) == 0
        assert 8 <= chosen // patch <= 16
        assert side < 32 or side > 224 or abs(chosen - side) <= patch


def test_a_patch_or_a_size_that_is_given_holds():
    assert choose_side(500, 500, 14) == 224
    assert choose_side(100, 300, 14) == 112
    assert [choose_patch(n, n) for n in (224, 240, 64, 32, 72, 16, 30)] == [16, 8, 8, 4, 4, 4, None]
    assert choose_patch(96, 64) == 8


@pytest.mark.parametrize(
    ("images", "processes", "together", "batch"),
    [
        (1_281_167, 8, 1, 2048), (1_281_167, 1, 1, 256), (1_281_167, 12, 1, 1536), (2000, 1, 1, 128), (100, 1, 1, 64),
        (7, 1, 1, 4), (100, 8, 4, 64), (1_281_167, 1, 3, 255),
    ],
)  # fmt: skip
def test_batches(images, processes, together, batch):
    found = choose_batch(images, processes, together)
    assert found == batch
    assert found % (processes * together) == 0
    assert found <= images


def test_enough_views():
    assert enough_views(1_000_000) == 100_000_000
    assert enough_views(1_281_167) == enough_views(10**9) == 128_000_000
    assert enough_views(5_000) == 1_000_000
    assert enough_views(100) == 160_000


def test_epochs_within_a_time():
    assert epochs_within(3600, 10, 36_001) == 0
    assert epochs_within(3600, 10, 18_000) == 2
    assert epochs_within(1e9, 1e3, 100) == MAX_EPOCHS
    assert epochs_within(-5, 10, 10) == 0


@pytest.mark.parametrize(
    ("epochs", "images", "chosen"),
    [
        ((800, 400, 200, 150, 100), 1_000_000, "ViT-L"),
        ((800, 400, 200, 150, 99), 1_000_000, "ViT-B"),
        ((800, 400, 300, 280, 260), 499_999, "ViT-B"),
        ((1600, 1600, 1600, 1600, 1600), 500, "ViT-Ti"),
        ((50, 20, 9, 3, 1), 1_000_000, NAMES[0]),
        ((100, 60, 30, 13, 9), 10_000_000, "ViT-B"),
        ((800, None, 400, None, None), 1_000_000, "ViT-S"),
        ((0, 0, 0, 0, 0), 1_000_000, None),
        ((None, 3, 1, 0, 0), 1_000_000, "ViT-Ti"),
    ],
)
def test_the_largest_encoder_that_sees_enough(epochs, images, chosen):
    views = {name: number * images for name, number in zip(NAMES, epochs) if number is not None}
    assert preferred(views, SIZES, images, enough=enough_views(images)) == chosen


def test_sizes_grow():
    assert [size.min_images for size in SIZES] == sorted(size.min_images for size in SIZES)


# Plans of a small folder, with steps that take as long as the test says


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(40):
        file = folder / f"class{i % 4}" / f"{i:03d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 72, 3), dtype=np.uint8)).save(file)
    return folder


@pytest.fixture(scope="module")
def counted():
    """What was counted before: memory and FLOPs of one encoder take seconds."""
    return {}


@pytest.fixture
def rates(monkeypatch, counted):
    """Seconds of a step, given rather than timed; which encoders were asked for."""
    originals = {name: getattr(candidates, name) for name in ("step_memory", "training_flops")}
    asked = []

    def once(count):
        def known(config, **how):
            decides = config.model, config.method, config.optimisation.batch_size, config.run, config.data.size
            key = count.__name__, repr((*decides, config.data.channels, sorted(how.items(), key=str)))
            if key not in counted:
                counted[key] = count(config, **how)
            return counted[key]

        return known

    def seconds(candidate, machine, _):
        asked.append(candidate.size.name)
        return StepSeconds(candidate.flops / 1e12, 0.0)

    for name, count in originals.items():
        monkeypatch.setattr(candidates, name, once(count))
    monkeypatch.setattr(plan, "training_flops", candidates.training_flops)
    monkeypatch.setattr(plan, "step_seconds", seconds)
    monkeypatch.setattr(plan, "time_loading", lambda *_, **__: Loading(1e6, 400_000))
    monkeypatch.setattr(plan, "START_SECONDS", 0.0)
    monkeypatch.setattr(
        plan, "sizes_for", lambda given: sizes_for(given) if given.keys() & {"encoder", "init_from"} else LITTLE
    )
    return asked


TI = "vit_tiny_patch16_224"
ONE: dict = {"encoder": TI, "encoder_depth": 1, "decoder_depth": 1, "predictor_depth": 1}
"""A small encoder that is given."""
LITTLE = tuple(
    Size(size.name, {"encoder": TI, "encoder_depth": 1 + i, "decoder_depth": 1}, size.min_images)
    for i, size in enumerate(SIZES)
)
"""In place of the five that are proposed: counting those takes half a minute."""


def propose(photos, budget="10m", method="hpm-fast-norm-pix", memory=None, processes=None, out="", **given):
    chosen = PlanConfig(budget, out, method, processes, memory, 0.01)
    return plan.run(chosen, {"data": str(photos), "device": "cpu", **given})


def test_a_plan(photos, rates):
    found = propose(photos)
    assert found["images"] == {"number": 40, "classes": 4, "height": 40, "width": 72}
    assert found["config"]["image_size"] == (40, 40)
    assert found["config"]["patch_size"] == 4
    assert found["config"]["channels"] == 3
    assert [row["name"] for row in found["candidates"]] == NAMES
    chosen = next(row for row in found["candidates"] if row["name"] == found["encoder"])
    assert found["epochs"] == chosen["epochs"] > 0
    assert found["hours"] * 3600 <= 600
    assert found["command_from_file"] is None
    assert found["steps"] == found["epochs"] * (40 // found["config"]["batch_size"])
    assert rates == [row["name"] for row in found["candidates"] if row["measured"]]


def test_a_longer_budget_buys_epochs_in_proportion(photos, rates):
    short, long = (propose(photos, budget, **ONE, knn=False) for budget in ("10s", "20s"))
    assert long["epochs"] == pytest.approx(2 * short["epochs"], rel=0.1)


def test_looks_at_accuracy_are_paid_for(photos, rates):
    blind, looking = (propose(photos, "10s", **ONE, knn=knn) for knn in (False, True))
    assert blind["epochs"] - looking["epochs"] in (2, 3)  # three looks at half the cost


@pytest.mark.parametrize("method", ["hpm-fast-norm-pix", "hpm-shared", "mae"])
def test_the_command_and_the_file_are_the_proposal(photos, rates, tmp_path, monkeypatch, method):
    out = tmp_path / "plan.yaml"
    found = propose(photos, method=method, out=str(out), **ONE, crop_scale=(0.5, 1.0), flip=False)
    seen = []
    monkeypatch.setattr("hardpatch.training.pretrain.train", lambda config, out, **_: seen.append(config) or {})
    monkeypatch.setattr(pretraining, "report_run", lambda *_, **__: None)
    for command in (found["command"], found["command_from_file"]):
        words = shlex.split(command)
        assert words[:2] == ["hardpatch", "pretrain"]
        pretraining.pretrain(words[2:])
    assert seen[0] == seen[1] == load_config(out)
    assert seen[0].run.device == "cpu"  # what was timed
    assert seen[0].data.crop_scale == (0.5, 1.0)
    for part in (seen[0].data, seen[0].model, seen[0].method, seen[0].optimisation):
        for name, value in vars(part).items():
            assert found["config"][name] == value, name


def test_several_processes_start_by_torchrun_also_from_a_file(photos, rates, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "find_machine", lambda base, config: Machine(CPU, 2, 1e12))
    found = propose(photos, **ONE, out=str(tmp_path / "plan.yaml"))
    for name in ("command", "command_from_file"):
        assert found[name].startswith("torchrun --nproc-per-node 2 -m hardpatch pretrain --")
    assert found["config"]["batch_size"] % 2 == 0


def test_no_more_processes_than_devices(photos, rates):
    with pytest.raises(InputError, match="processes: must be at most 1, the number of GPUs here"):
        propose(photos, processes=2)


def test_epochs_that_are_given_hold_and_are_held_against_the_budget(photos, rates):
    found = propose(photos, "1h", **ONE, epochs=30)
    assert found["epochs"] == 30
    assert found["advice"] == []
    found = propose(photos, "1s", **ONE, epochs=1500)
    assert found["epochs"] == 1500
    assert "more than the budget" in found["advice"][0]


def test_fields_that_are_given_hold(photos, rates):
    found = propose(photos, **ONE, batch_size=20, micro_batch_size=10, image_size=(64, 64))
    for name, value in {**ONE, "batch_size": 20, "micro_batch_size": 10, "image_size": (64, 64)}.items():
        assert found["config"][name] == value


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_small_memory_gets_micro_batches_of_32_then_recomputation_then_smaller_ones(monkeypatch, rates, precision):
    monkeypatch.setattr(candidates, "training_flops", lambda _: 1.0)
    base = plan.with_fields(recipe("mae"), {"image_size": 64, "patch_size": 8, "precision": precision})
    large, small = (256, 128, 64, 32), (16, 8, 4, 2, 1)
    ways = [(again, views) for views_of in (large, small) for again in (False, True) for views in views_of]

    def cut(memory):
        found = make_candidate(LITTLE[1], base, {}, 10_000, Machine(CPU, 1, memory))
        assert found.memory_bytes <= memory or not found.fits
        run = found.config.run
        return (run.activation_checkpointing, run.micro_batch_size or 256) if found.fits else None

    roomy = make_candidate(LITTLE[1], base, {}, 10_000, Machine(CPU, 1, 1e12)).config
    needed = {}
    for again in (False, True):
        config = plan.with_fields(roomy, {"activation_checkpointing": again})
        counted = candidates.step_memory(config, processes=1, bf16=precision == "bf16", device=CPU)
        needed |= {(again, n): candidates.UNCOUNTED * counted.of(n) for a, n in ways if a == again}
    looked_at = [*((False, n) for n in large), (True, 32), (True, 8), (True, 1)]
    memories = sorted((needed[way] for way in looked_at), reverse=True)
    chosen = [cut(memory + 1) for memory in memories]
    assert chosen == [next(way for way in ways if needed[way] <= memory + 1) for memory in memories]
    assert set(chosen) >= {*((False, n) for n in large), (True, 32)}
    assert any(n in small for _, n in chosen)
    assert cut(min(needed.values()) - 1) is None


def test_a_memory_that_is_too_small(photos, rates):
    with pytest.raises(InputError, match=r"memory_gigabytes: the smallest step needs about .* and 0\.0 may be taken"):
        propose(photos, **ONE, memory=0.001)


def test_an_encoder_that_only_shards_hold_is_reckoned_from_a_smaller_one(photos, rates, monkeypatch):
    monkeypatch.setattr(plan, "find_machine", lambda base, config: Machine(CPU, 2, 1e12))
    found = propose(photos, "8h", **ONE, sharding="full")
    assert rates == [NAMES[0]]
    (row,) = found["candidates"]
    assert (row["sharding"], row["measured"]) == ("full", False)
    assert 0 < row["images_per_second"] < 1e9


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_asked_the_proposal_is_a_run_that_would_start(rates, seed):
    chance = random.Random(seed)
    masks, crops, processes = chance.choice((1, 2, 3, 4)), chance.choice((1, 2)), chance.choice((1, 2, 3))
    fields = {"image_size": 32, "patch_size": 4, "masks_per_image": masks, "crops_per_image": crops}
    given = {"batch_size": masks * crops * processes * chance.choice((5, 8, 25))} if seed % 2 else {}
    base = plan.with_fields(recipe("mae"), {"batch_size": 24, **fields})
    machine = Machine(CPU, processes, 1e12)
    whole = make_candidate(LITTLE[0], base, given, 2000, machine)
    for share in (1.001, 0.8, 0.5, 0.3, 0.2):
        found = make_candidate(LITTLE[0], base, given, 2000, replace(machine, memory=share * whole.memory_bytes))
        assert split_batch(found.config, processes=processes) >= 1
        assert found.memory_bytes <= share * whole.memory_bytes or not found.fits
        assert found.fits or share < 0.8


def test_the_optimizer_is_paid_once_a_step_however_it_is_cut(photos, rates, monkeypatch):
    monkeypatch.setattr(plan, "step_seconds", lambda *_: StepSeconds(0.01, 1.0))
    found = {n: propose(photos, "1h", **ONE, batch_size=n)["images_per_second"] for n in (10, 40)}
    cut = propose(photos, "1h", **ONE, batch_size=40, micro_batch_size=10)["images_per_second"]
    assert found[10] == pytest.approx(10 / 1.1, rel=0.01)
    assert found[40] == pytest.approx(40 / 1.4, rel=0.01)
    assert cut == pytest.approx(found[40])


def test_what_does_not_fit_when_it_is_tried_is_not_proposed(photos, rates, monkeypatch):
    given = plan.step_seconds

    def tried(candidate, *how):
        return None if candidate.size.name == NAMES[1] else given(candidate, *how)

    monkeypatch.setattr(plan, "step_seconds", tried)
    found = propose(photos, "30d")
    assert [row["fits"] for row in found["candidates"]] == [True, False, True, True, True]
    assert found["encoder"] == NAMES[0]  # 40 images are too few for the others


def test_a_run_takes_as_long_whatever_the_budget(photos, rates):
    hours = [propose(photos, budget, **ONE, epochs=20)["hours"] for budget in ("1h", "30d")]
    assert hours[0] == pytest.approx(hours[1])


def test_more_epochs_than_were_ever_published(photos, rates):
    found = propose(photos, "30d", epochs=2000)
    assert found["epochs"] == 2000
    assert found["advice"] == []
    assert found["encoder"] == propose(photos, "30d", epochs=1000)["encoder"] == NAMES[1]


def test_a_warmup_that_is_given_is_held_against_the_final_epochs(photos, rates):
    assert propose(photos, "1h", **ONE, epochs=30, warmup_epochs=5.0)["config"]["warmup_epochs"] == 5


def test_what_is_far_too_slow_is_not_timed(photos, rates):
    found = propose(photos, "2s")
    timed = [row["measured"] for row in found["candidates"]]
    assert timed == sorted(timed, reverse=True)
    assert not timed[-1]
    assert len(rates) == sum(timed)
    speeds = [row["images_per_second"] for row in found["candidates"]]
    assert speeds == sorted(speeds, reverse=True)
    assert "would be better" in found["advice"][0]


def test_a_step_that_is_not_timed_follows_from_flops_and_parameters():
    base = plan.with_fields(recipe("mae"), {"image_size": 64, "patch_size": 8})
    small, large = (make_candidate(LITTLE[i], base, {}, 10_000, Machine(CPU, 1, 1e12)) for i in (0, 3))
    found = reckoned(large, small, StepSeconds(1.0, 1.0))
    assert found.learn == pytest.approx(large.flops / small.flops)
    assert found.finish == pytest.approx(large.parameters / small.parameters)
    again = plan.replace(large, config=plan.with_fields(large.config, {"activation_checkpointing": True}))
    assert reckoned(again, small, StepSeconds(1.0, 1.0)).learn == pytest.approx(4 / 3 * found.learn)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": "soon"}, "budget: must be a number"),
        ({"budget": ".001s"}, "budget: must allow for one pass over the 40 images, which takes .* s here, got .001s"),
        ({"method": "hpm-64px"}, "method: must be METHOD.* without a scale, got 'hpm-64px'"),
        ({"method": "hmp"}, "method: .* got 'hmp'; did you mean hpm"),
        ({"out": "plan.json"}, r"out: must end in \.yaml, got 'plan.json'"),
        ({"out": "nowhere/plan.yaml"}, r"out: must be in a folder that is there"),
        ({"encoder": "resnet50"}, "encoder: .*resnet50"),
        ({"image_size": (30, 30)}, "image_size: .*30"),
        ({"processes": 0}, "processes: .* got 0"),
        ({"memory": -1.0}, "memory_gigabytes: .* got -1"),
        ({"sharding": "full", **ONE}, "sharding: 'full' cuts the model over processes and needs at least 2"),
        ({"batch_size": 30, "micro_batch_size": 4, **ONE}, "micro_batch_size: must divide the 30 images"),
        ({"batch_size": 50, **ONE}, r"batch_size: must be at most the number of images \(40\), got 50"),
        ({"init_from": "runs/old"}, "init_from: also name the --encoder"),
        ({"masks_per_image": 64, "batch_size": 64}, "data: needs an image or more for each of 1 processes with 64"),
    ],
)
def test_mistakes_are_named_before_anything_is_timed(photos, rates, values, message, monkeypatch):
    if values.get("budget") != ".001s":
        monkeypatch.setattr(plan, "time_loading", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(InputError, match=message):
        propose(photos, **values)


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="data: "):
        propose(tmp_path / "nowhere")


def test_channels_are_those_of_the_images(tmp_path, rates):
    for i in range(16):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).random((32, 32, 6), dtype=np.float32))
    found = propose(tmp_path, **ONE)
    assert found["config"]["channels"] == 6
    assert found["config"]["mean"] == found["config"]["value_range"] == ()  # the run finds them
    assert " --channels 6 " in found["command"]
    assert found["images"]["classes"] == 0


def test_an_encoder_keeps_its_own_patch_where_images_are_large_enough(tmp_path, rates):
    for i in range(8):
        Image.new("RGB", (150, 140), (i, i, i)).save(tmp_path / f"{i}.png")
    own = propose(tmp_path, method="mae", encoder=TI, encoder_depth=1)
    assert (own["config"]["image_size"], own["config"]["patch_size"]) == ((128, 128), None)
    assert own["config"]["decoder_width"] == 256
    given = propose(tmp_path, method="mae", encoder=TI, encoder_depth=1, image_size=(96, 96))
    assert given["config"]["patch_size"] == 8


# Loading


def test_a_crop_serves_all_its_masks():
    loading = Loading(100.0, 0)
    machine = Machine(torch.device("cuda"), 2, 1e9)
    once = loading_limit(recipe("mae"), loading, machine)
    assert loading_limit(recipe("hpm-shared"), loading, machine) == 4 * once
    assert with_loading(1e9, recipe("mae"), loading, machine) == once
    assert with_loading(1.0, recipe("mae"), loading, machine) == 1.0


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr("hardpatch.runtime.machine.processor_quota", lambda: None)
    limits = [loading_limit(recipe("mae"), Loading(1.0, 0), Machine(torch.device("cuda"), n, 1e9)) for n in (1, 2, 8)]
    assert limits == [8, 14, 8]


def test_on_a_cpu_loading_and_steps_share_the_cores():
    machine = Machine(CPU, 1, 1e9)
    many = plan.with_fields(recipe("mae"), {"workers": 64})
    limit = loading_limit(many, Loading(100.0, 0), machine)
    assert limit == 100 * torch.get_num_threads()
    assert loading_limit(plan.with_fields(recipe("mae"), {"workers": 0}), Loading(100.0, 0), machine) == 100
    assert with_loading(limit, many, Loading(100.0, 0), machine) == pytest.approx(limit / 2)


def test_loading_is_timed_from_ram_where_a_run_would_keep_images_there(photos, monkeypatch):
    config, source, found = open_images_of(plan.with_fields(recipe("hpm-fast"), {"data": str(photos)}), {})
    assert found == look_at(source)
    read = []
    original = type(source).read
    monkeypatch.setattr(type(source), "read", lambda self, index: read.append(index) or original(self, index))
    threads = torch.get_num_threads()
    loading = time_loading(config, source, seconds=0.2)
    assert loading.cache_bytes >= 40 * 40 * 72 * 3
    assert loading.crops_per_second > 0
    assert len(read) <= 2 * 40  # once to estimate, once to keep
    assert torch.get_num_threads() == threads
    read.clear()
    config = plan.with_fields(config, {"cache": "none"})
    assert time_loading(config, source, seconds=0.05).cache_bytes == 0


# On this machine


def test_a_plan_that_is_timed_here(photos, capsys):
    flags = [word for name, value in ONE.items() for word in plan.flag(name, value)]
    planning.plan(["--data", str(photos), *flags, "--budget", "1h", "--seconds",
                   "0.05", "--device", "cpu", "--json"])  # fmt: skip
    text = capsys.readouterr().out
    found = json.loads(text.splitlines()[-1])
    assert found["config"]["encoder_depth"] == 1
    assert found["candidates"][0]["measured"]
    assert 0 < found["images_per_second"] < 1e5
    assert "40 images, about 72x40 px, 4 classes" in text
    assert "<- proposed" in text
    assert f"next:  {found['command']}" in text


def test_a_step_is_timed_in_its_two_parts(monkeypatch):
    """Of a micro-batch; the optimizer counts once a step, however many micro-batches there are."""
    base = plan.with_fields(recipe("mae"), {"image_size": 32, "patch_size": 4})
    found = make_candidate(LITTLE[0], base, {"batch_size": 64, "micro_batch_size": 8}, 1000, Machine(CPU, 1, 1e12))
    built = []
    original = candidates.OurStep
    monkeypatch.setattr(candidates, "OurStep", lambda config, **how: built.append(config) or original(config, **how))
    seconds = step_seconds(found, Machine(CPU, 1, 1e12), 0.1)
    assert built[0].optimisation.batch_size == 8
    assert seconds.learn > 0
    assert seconds.finish > 0


def test_a_step_that_does_not_fit_after_all_is_not_timed(monkeypatch):
    def none(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(candidates, "OurStep", none)
    machine = Machine(CPU, 1, 1e12)
    found = make_candidate(LITTLE[0], plan.with_fields(recipe("mae"), {"image_size": 32}), {}, 1000, machine)
    assert step_seconds(found, machine, 1.0) is None
