"""``hpm plan``: the rules, what is proposed, and that the proposal is a run."""

import importlib
import json

import numpy as np
import pytest
from PIL import Image

from hpm.cli import planning, pretraining
from hpm.config import load_config
from hpm.errors import InputError
from hpm.planning import plan
from hpm.planning.config import PlanConfig, parse_budget
from hpm.planning.images import look_at, time_loading
from hpm.planning.sizes import (
    MAX_EPOCHS,
    SIZES,
    Size,
    choose_batch,
    choose_image_size,
    choose_patch,
    epochs_within,
    preferred,
)

NAMES = [size.name for size in SIZES]


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


@pytest.mark.parametrize(
    ("height", "width", "side", "patch"),
    [(500, 375, 224, 16), (224, 224, 224, 16), (64, 64, 64, 8), (96, 128, 96, 8), (32, 32, 32, 4), (10, 200, 8, 4)],
)
def test_crops_are_as_large_as_the_images_up_to_the_published_size(height, width, side, patch):
    assert choose_image_size(height, width, None) == side
    assert choose_patch(side) == patch
    assert side % (2 * patch) == 0  # the teacher may look at half of it


def test_crops_fit_the_patch_that_is_given():
    assert choose_image_size(500, 500, 14) == 224
    assert choose_image_size(100, 300, 14) == 84


@pytest.mark.parametrize(
    ("images", "processes", "masks", "batch"),
    [
        (1_281_167, 8, 1, 2048), (1_281_167, 1, 1, 256), (1_281_167, 64, 1, 2048), (1000, 1, 1, 64), (100, 1, 1, 16),
        (7, 1, 1, 4), (100, 8, 4, 32),
    ],
)  # fmt: skip
def test_batches(images, processes, masks, batch):
    assert choose_batch(images, processes, masks) == batch


def test_epochs_within_a_time():
    assert epochs_within(3600, 10, 36_001) == 0
    assert epochs_within(3600, 10, 18_000) == 2
    assert epochs_within(1e9, 1e3, 100) == MAX_EPOCHS


@pytest.mark.parametrize(
    ("epochs", "images", "chosen"),
    [
        ((800, 400, 200, 150, 100), 1_000_000, "ViT-L"),
        ((800, 400, 200, 150, 99), 1_000_000, "ViT-B"),
        ((800, 400, 200, 150, 100), 499_999, "ViT-B"),
        ((1600, 1600, 1600, 1600, 1600), 500, "ViT-Ti"),
        ((50, 20, 9, 3, 1), 1_000_000, NAMES[0]),
        ((800, None, 400, None, None), 1_000_000, "ViT-S"),
        ((0, 0, 0, 0, 0), 1_000_000, None),
        ((None, 3, 1, 0, 0), 1_000_000, "ViT-Ti"),
    ],
)
def test_the_largest_encoder_that_sees_the_images_often_enough(epochs, images, chosen):
    known = {name: number for name, number in zip(NAMES, epochs) if number is not None}
    assert preferred(known, SIZES, images) == chosen


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
    """Views per second, given rather than timed; which encoders were asked for."""
    originals = {name: getattr(plan, name) for name in ("step_memory", "training_flops")}
    asked = []

    def once(count):
        def known(config, **how):
            decides = config.model, config.method, config.optimisation, config.run, config.data.size
            key = count.__name__, repr((*decides, config.data.channels, sorted(how.items())))
            if key not in counted:
                counted[key] = count(config, **how)
            return counted[key]

        return known

    for name, count in originals.items():
        monkeypatch.setattr(plan, name, once(count))

    def rate(candidate, device, seconds):
        asked.append(candidate.size.name)
        return 1e12 / candidate.flops

    monkeypatch.setattr(plan, "_step_rate", rate)
    return asked


def propose(photos, **values):
    return plan.run(PlanConfig(str(photos), **({"device": "cpu", "seconds": 0.01} | values)))


def test_a_plan(photos, rates):
    found = propose(photos, budget="10m")
    assert found["images"] == {"number": 40, "classes": 4, "height": 40, "width": 72, "decoded_bytes": 40 * 40 * 72 * 3}
    assert found["config"]["image_size"] == (40, 40)
    assert found["config"]["patch_size"] == 4
    assert found["config"]["channels"] == 3
    assert found["cached"]
    assert [row["name"] for row in found["candidates"]] == NAMES
    chosen = next(row for row in found["candidates"] if row["name"] == found["encoder"])
    assert found["epochs"] == chosen["epochs"] > 0
    assert found["hours"] * 3600 <= 600
    assert found["steps"] == found["epochs"] * (40 // found["config"]["batch_size"])
    assert found["advice"] == []


def test_a_longer_budget_buys_epochs_in_proportion(photos, rates):
    short, long = (propose(photos, budget=budget, encoder="vit_tiny_patch16_224") for budget in ("10s", "20s"))
    assert long["epochs"] == pytest.approx(2 * short["epochs"], rel=0.1)


def test_the_command_and_the_file_are_the_proposal(photos, rates, tmp_path, monkeypatch):
    out = tmp_path / "plan.yaml"
    found = propose(photos, budget="10m", out=str(out))
    seen = []
    loop = importlib.import_module("hpm.pretrain")
    monkeypatch.setattr(loop, "train", lambda config, out, resume: seen.append(config) or {})
    monkeypatch.setattr(pretraining, "report_run", lambda *_, **__: None)
    words = found["command"].split()
    assert words[:2] == ["hpm", "pretrain"]
    pretraining.pretrain(words[2:])
    pretraining.pretrain(["--config", str(out), "--out", "RUN"])
    assert seen[0] == seen[1] == load_config(out)
    for part in (seen[0].data, seen[0].model, seen[0].method, seen[0].optimisation):
        for name, value in vars(part).items():
            assert found["config"][name] == value, name


def test_several_processes_share_the_batch_and_start_by_torchrun(photos, rates):
    one, two = (propose(photos, budget="10m", processes=n, encoder="vit_tiny_patch16_224") for n in (1, 2))
    assert two["command"].startswith("torchrun --nproc-per-node 2 -m hpm pretrain --recipe hpm-fast-norm-pix ")
    assert two["epochs"] > one["epochs"]


def test_a_small_memory_gets_micro_batches_then_recomputation(photos, rates):
    roomy = propose(photos, encoder="vit_tiny_patch16_224", budget="10m")
    needed = roomy["memory_bytes"] / 1e9
    assert roomy["config"]["micro_batch_size"] is None
    tight = propose(photos, encoder="vit_tiny_patch16_224", budget="10m", memory_gigabytes=0.9 * needed)
    assert tight["memory_bytes"] <= 0.9 * needed * 1e9
    assert tight["config"]["micro_batch_size"] or tight["config"]["activation_checkpointing"]
    with pytest.raises(InputError, match=r"memory_gigabytes: the smallest step needs about .* and 0\.0 may be taken"):
        propose(photos, encoder="vit_tiny_patch16_224", memory_gigabytes=0.001)


def test_what_is_far_too_slow_is_not_timed(photos, rates):
    found = propose(photos, budget="5s")
    timed = [row["measured"] for row in found["candidates"]]
    assert timed == sorted(timed, reverse=True)
    assert not timed[-1]
    assert len(rates) == sum(timed)
    speeds = [row["images_per_second"] for row in found["candidates"]]
    assert speeds == sorted(speeds, reverse=True)
    assert found["advice"][0].startswith(f"{found['epochs']} epochs are few") or found["epochs"] >= 100


def test_a_model_that_is_not_timed_is_as_much_slower_as_its_flops(photos, rates):
    found = propose(photos, budget="5s")
    last, before = found["candidates"][-1], found["candidates"][-2]
    assert not before["measured"]
    costs = [plan._candidate(size, _config(found), 40, 1, 1e12, CPU).flops for size in SIZES[-2:]]
    assert before["images_per_second"] / last["images_per_second"] == pytest.approx(costs[1] / costs[0], rel=0.1)


CPU = plan.torch.device("cpu")


def _config(found):
    return plan.with_fields(plan.recipe(found["method"]), {k: found["config"][k] for k in ("image_size", "patch_size")})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": "soon"}, "budget: must be a number"),
        ({"budget": ".001s"}, "budget: must allow for one pass over the 40 images, which takes"),
        ({"method": "hpm-64px"}, "method: must be METHOD"),
        ({"method": "hmp"}, "recipe: no recipe 'hmp'; did you mean"),
        ({"out": "plan.json"}, r"out: must end in \.yaml, got 'plan.json'"),
        ({"encoder": "resnet50"}, "encoder"),
        ({"image_size": 30, "patch_size": 4}, "image_size"),
    ],
)
def test_mistakes_are_named(photos, rates, values, message):
    with pytest.raises(InputError, match=message):
        propose(photos, **values)


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="data: "):
        propose(tmp_path / "nowhere")


def test_channels_are_those_of_the_images(tmp_path, rates):
    for i in range(16):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).random((32, 32, 6), dtype=np.float32))
    found = propose(tmp_path, budget="1m", encoder="vit_tiny_patch16_224")
    assert found["config"]["channels"] == 6
    assert found["config"]["mean"] == ()  # the run finds it again
    assert " --channels 6 " in found["command"]
    assert found["images"]["classes"] == 0


# On this machine


def test_a_plan_that_is_timed_here(photos, capsys):
    planning.plan(["--data", str(photos), "--encoder", "vit_tiny_patch16_224", "--budget", "1h", "--seconds", "0.05",
          "--device", "cpu", "--json"])  # fmt: skip
    text = capsys.readouterr().out
    found = json.loads(text.splitlines()[-1])
    assert found["candidates"][0]["measured"]
    assert 0 < found["images_per_second"] < 1e5
    assert "40 images, about 72x40 px, 4 classes" in text
    assert "<- proposed" in text
    assert f"next:  {found['command']}" in text


def test_loading_is_timed_from_ram_where_a_run_would_keep_images_there(photos, monkeypatch):
    config, source, found = plan._open(plan.recipe("hpm-fast"), PlanConfig(str(photos)))
    assert found == look_at(source)
    read = []
    original = type(source).read
    monkeypatch.setattr(type(source), "read", lambda self, index: read.append(index) or original(self, index))
    loading = time_loading(config, source, seconds=0.2)
    assert loading.cached
    assert loading.images_per_second > 0
    assert len(read) <= 2 * 40  # once to estimate, once to keep


def test_one_encoder_alone(photos, rates):
    found = propose(photos, encoder="vit_tiny_patch16_224", budget="10m")
    assert [row["name"] for row in found["candidates"]] == ["vit_tiny_patch16_224"]
    assert plan._sizes(PlanConfig("x", encoder="a")) == (Size("a", "a", {}, 0),)
