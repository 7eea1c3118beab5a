"""Fine-tuning: recipe, layer decay, augmentation without state, resume to the bit, refusals, what it leaves."""

import csv
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import timm
import torch
import yaml
from timm.data import create_transform
from timm.models import save_for_hf
from timm.optim import param_groups_layer_decay

import hardpatch
from hardpatch.cli import main
from hardpatch.config.evaluations import FinetuneConfig
from hardpatch.data.images.decode import DecodeError, Sample
from hardpatch.data.loader.loading import Normalise, ordered_batches
from hardpatch.data.sources import Source, open_source
from hardpatch.evaluate.classify import finetune, finetune_training
from hardpatch.evaluate.classify.augment import FinetuneImages, Mixing, RandAugment, posterize, stack
from hardpatch.evaluate.classify.classifier import build_classifier, layer_groups, load_classifier
from hardpatch.evaluate.classify.finetune_settings import (
    RAND_AUGMENT,
    adapted_batch,
    adapted_crop,
    resolve_settings,
)
from hardpatch.evaluate.contenders import folder_name
from hardpatch.method.schedules import learning_rate
from hardpatch.runs.build import build_encoder, build_normalise, build_student, timm_arguments
from hardpatch.runs.checkpoint import CheckpointFolder
from hardpatch.runs.load import load_encoder
from hardpatch.runtime.errors import InputError, Interrupted
from hardpatch.runtime.log import read_metrics
from tiny import TINY, flags, in_child, pretrain, tiny_config

torch.set_num_threads(1)

GIVEN = FinetuneConfig(checkpoint="run", train="t", val="v")
SHORT = {
    "epochs": 3,
    "batch_size": 8,
    "base_learning_rate": 3e-2,
    "mixed_share": 1.0,
    "workers": 0,
    "device": "cpu",
    "precision": "float32",
    "checkpoint_minutes": 100.0,
}
"""Nine steps on 24 images."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    values = TINY | {"epochs": 1}
    pretrain(values.pop("data"), out, **values)
    return str(out)


def config(checkpoint, out, **changes):
    values = {"train": "shapes:24", "val": "shapes:16@1", **SHORT, **changes}
    return FinetuneConfig(checkpoint=checkpoint, out=str(out), **values)


def command(checkpoint, out, *, untrained=False, **fields):
    """The words after ``hpm``."""
    values = {"checkpoint": checkpoint, "out": str(out), "train": "shapes:24", "val": "shapes:16@1", **fields}
    return ["evaluate", "finetune", *flags(values), *(["--untrained"] if untrained else [])]


def last(out):
    return torch.load(out / "checkpoints" / "last", weights_only=True)


def assert_same(a, b):
    assert a["step"] == b["step"]
    for part in ("model",):
        assert a[part].keys() == b[part].keys()
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), f"{part}: {name}"
    for number, moments in a["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, b["optimizer"]["state"][number][name]), f"optimizer: {number}.{name}"


# The recipe


def resolved(given=GIVEN, *, num_images=1_281_167, size=(224, 224), channels=3, width=768, processes=1):
    return resolve_settings(
        given, num_images=num_images, size=size, channels=channels, width=width, flip=True, num_processes=processes
    )


def test_the_published_size_gets_the_published_recipe():
    base, large = resolved(), resolved(width=1024)
    assert (base.epochs, large.epochs) == (100, 50)
    assert replace(base, epochs=50) == large
    expected = {
        "batch_size": 1024, "base_learning_rate": 5e-4, "min_learning_rate": 1e-6, "layer_decay": 0.8,
        "warmup_epochs": 5, "weight_decay": 0.05, "betas": (0.9, 0.999), "crop_scale": (0.08, 1.0),
        "rand_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0, "mixed_share": 1,
        "label_smoothing": 0.1,
        "drop_path": 0.1, "gradient_clip": None,
    }  # fmt: skip
    assert {name: value for name, value in asdict(base).items() if name in expected} == expected
    assert base.peak_learning_rate == pytest.approx(2e-3)
    assert base.total_steps == 100 * 1251
    assert base.warmup_steps == 5 * 1251


@pytest.mark.parametrize(
    ("num_images", "batch"),
    [(2, 2), (19, 2), (39, 2), (40, 4), (920, 64), (2300, 128), (10_239, 512), (10_240, 1024), (23_000, 1024)],
)
def test_small_data_gets_batches_of_which_an_epoch_has_ten(num_images, batch):
    assert adapted_batch(num_images) == batch


def test_small_batches_learn_at_the_root_of_the_published_rate():
    peaks = {batch: resolved(replace(GIVEN, batch_size=batch)).peak_learning_rate for batch in (16, 64, 1024, 4096)}
    expected = {16: 2e-3 / 8, 64: 2e-3 / 4, 1024: 2e-3, 4096: 8e-3}
    assert peaks == {batch: pytest.approx(value) for batch, value in expected.items()}
    given = replace(GIVEN, batch_size=64, base_learning_rate=5e-4)
    assert resolved(given).peak_learning_rate == pytest.approx(5e-4 / 4), "what is given counts per 256, as published"


def test_short_runs_and_small_images_adapt():
    short = resolved(replace(GIVEN, epochs=8))
    assert (short.warmup_epochs, short.mixed_share) == (pytest.approx(0.8), pytest.approx(0.08))
    assert resolved(replace(GIVEN, epochs=8), width=1024).mixed_share == pytest.approx(0.16)
    assert resolved(replace(GIVEN, epochs=300)).mixed_share == 1
    assert adapted_crop((224, 224)) == adapted_crop((512, 512)) == (0.08, 1.0)
    assert adapted_crop((128, 128)) == (pytest.approx(0.245, abs=1e-3), 1.0)
    assert adapted_crop((64, 64)) == adapted_crop((32, 48)) == (0.35, 1.0)
    assert resolved(channels=5).rand_augment == ""
    given = replace(GIVEN, batch_size=96, warmup_epochs=3.0, crop_scale=(0.5, 0.9), flip=False, rand_augment="")
    settings = resolved(given, num_images=920)
    assert (settings.batch_size, settings.warmup_epochs, settings.crop_scale) == (96, 3.0, (0.5, 0.9))
    assert (settings.flip, settings.rand_augment, settings.steps_per_epoch) == (False, "", 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 2048}, r"batch_size: must be at most the number of training images \(920\), got 2048"),
        ({"batch_size": 9}, "batch_size: mixup and cutmix mix pairs"),
        ({"micro_batch_size": 1}, "micro_batch_size: mixup and cutmix mix pairs"),
        ({"micro_batch_size": 48}, "micro_batch_size: must divide the 64 images"),
        ({"epochs": 5, "warmup_epochs": 5.0}, r"warmup_epochs: must be less than epochs \(5\)"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale: must go from a small"),
        ({"min_learning_rate": 1.0}, "min_learning_rate: must be at most the peak"),
        ({"rand_augment": "rand-x9"}, "rand_augment: timm knows no policy 'rand-x9'"),
    ],
)
def test_rules_between_fields(changes, message):
    with pytest.raises(InputError, match=message):
        resolved(replace(GIVEN, **changes), num_images=920)


def test_rules_of_fields_and_of_processes_and_channels():
    with pytest.raises(InputError, match=r"(?s)epochs: .* got 0.*mixup: .* got -1"):
        replace(GIVEN, epochs=0, mixup=-1.0)
    with pytest.raises(InputError, match="rand_augment: works on 3 channels only, and the images have 5"):
        resolved(replace(GIVEN, rand_augment=RAND_AUGMENT), channels=5)
    with pytest.raises(InputError, match=r"batch_size: must be divisible by the number of processes \(3\)"):
        resolved(num_images=920, processes=3)
    assert resolved(replace(GIVEN, batch_size=9, mixup=0.0, cutmix=0.0), num_images=920).micro_batch_size == 9


def test_the_learning_rate_ends_at_its_floor():
    rates = [learning_rate(s, peak=1.0, warmup_steps=10, total_steps=100, floor=0.2) for s in range(101)]
    assert rates[0] == 0
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.6)
    assert rates[100] == pytest.approx(0.2)


# The classifier


ENCODERS = {
    "class token": {},
    "no class token": {"encoder": "vit_base_patch16_siglip_gap_224"},
    "attention pooling": {"encoder": "vit_base_patch16_siglip_224"},
    "registers": {"encoder": "vit_wee_patch16_reg1_gap_256"},
    "five channels, not square": {"channels": 5, "mean": (0.5,) * 5, "std": (0.2,) * 5, "image_size": (32, 48)},
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_classifier_is_the_encoder_under_mean_norm_and_head(kind):
    run_config = tiny_config(**ENCODERS[kind])
    encoder = build_student(run_config, target_dim=1).encoder.eval()
    model = build_classifier(timm_arguments(run_config), encoder, num_classes=7, drop_path=0.1, seed=0).eval()
    images = torch.randn(2, run_config.data.channels, *run_config.data.size)
    encoder.norm = torch.nn.Identity()
    patches = encoder.forward_features(images)[:, encoder.num_prefix_tokens :]
    torch.testing.assert_close(model.pool(model.forward_features(images)), patches.mean(dim=1))
    torch.testing.assert_close(model(images), model.head(model.fc_norm(patches.mean(dim=1))))
    assert 1e-5 < model.head.weight.std() < 3e-5
    assert all(parameter.requires_grad for parameter in model.parameters()), "positions, too, as published"
    (model.train()(images) ** 2).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), "DDP waits for every gradient"
    again = build_classifier(timm_arguments(run_config), encoder, num_classes=7, drop_path=0.1, seed=0)
    assert torch.equal(model.head.weight, again.head.weight)


def test_layer_groups_equal_timm_and_the_published_formula():
    run_config = tiny_config(encoder_depth=3)
    model = build_classifier(
        timm_arguments(run_config), build_encoder(run_config), num_classes=4, drop_path=0.0, seed=0
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def by_name(groups):
        return {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}

    found = by_name(layer_groups(model, weight_decay=0.05, layer_decay=0.8))
    oracle = param_groups_layer_decay(model, 0.05, no_weight_decay_list={"pos_embed", "cls_token"}, layer_decay=0.8)
    assert found == by_name(oracle)
    assert found.keys() == set(names.values())
    for name, parameter in model.named_parameters():
        if name.startswith(("cls_token", "pos_embed", "patch_embed")):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            layer = 4
        decays = parameter.ndim > 1 and name not in ("pos_embed", "cls_token")
        assert found[name] == (pytest.approx(0.8 ** (4 - layer)), 0.05 if decays else 0.0), name


# Augmentation and mixing


class Bright(Source):
    """Images of the class of their brightness, some of them damaged."""

    def __init__(self, num_images=12, damaged=(), channels=3, size=(16, 16)):
        self.num_images, self.damaged, self.channels, self.size = num_images, damaged, channels, size

    def __len__(self):
        return self.num_images

    def read(self, index):
        if index in self.damaged:
            raise DecodeError("scratched")
        noise = torch.Generator().manual_seed(index)
        image = torch.randint(0, 50, (self.channels, *self.size), generator=noise) + 60 * (index % 4)
        return Sample(image.to(torch.uint8))

    def name(self, index):
        return f"image {index}"

    def content(self, index):
        return bytes([index])

    @property
    def labels(self):
        return ["abcd"[i % 4] for i in range(self.num_images)]


def training_images(source, **changes):
    given = replace(GIVEN, batch_size=4, **changes)
    settings = resolve_settings(
        given, num_images=len(source), size=source.size, channels=source.channels, width=32, flip=True
    )
    grey = (0.5,) * source.channels
    return FinetuneImages(
        source, list("abcd"), size=source.size, normalise=Normalise(grey, grey), mean=grey, settings=settings
    )


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_augmentation_is_a_function_of_seed_epoch_and_image(channels):
    images = training_images(Bright(channels=channels), erasing=1.0)
    one = images[0, 3]
    assert one.image.shape == (channels, 16, 16)
    assert one.label == 3
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    images[0, 4], images[1, 3]
    assert torch.equal(images[0, 3].image, one.image)
    for other in (images[1, 3], images[0, 7], training_images(Bright(channels=channels), erasing=1.0, seed=1)[0, 3]):
        assert not torch.equal(other.image, one.image)


def test_what_is_switched_off_is_off():
    plain = {"crop_scale": (1.0, 1.0), "flip": False, "rand_augment": "", "erasing": 0.0}
    source = Bright()
    image = training_images(source, **plain)[5, 3].image
    torch.testing.assert_close(image, source.read(3).image / 255 * 2 - 1)
    changes = ({"crop_scale": (0.2, 0.5)}, {"flip": True}, {"rand_augment": RAND_AUGMENT}, {"erasing": 1.0})
    for change in changes:
        images = training_images(source, **(plain | change))
        assert any(not torch.equal(images[epoch, 3].image, image) for epoch in range(20))


def test_rand_augment_is_set_up_as_timm_does():
    """Every operation, its magnitude and its settings; fill colour and interpolation are not in the repr."""
    oracle = create_transform(
        (3, 32, 48), is_training=True, auto_augment=RAND_AUGMENT, interpolation="bicubic", mean=(0.1, 0.5, 0.9)
    )
    theirs = next(step for step in oracle.transforms if type(step).__name__ == "RandAugment")
    ours = RandAugment(RAND_AUGMENT, (32, 48), (0.1, 0.5, 0.9)).transform
    assert repr(ours) == repr(theirs)
    assert [operation.hparams for operation in ours.ops] == [operation.hparams for operation in theirs.ops]
    assert [operation.kwargs for operation in ours.ops] == [operation.kwargs for operation in theirs.ops]


def test_rand_augment_survives_its_strongest_level():
    from PIL import Image

    picture = Image.fromarray(np.full((4, 4, 3), 200, np.uint8))
    assert not np.array(posterize(picture, 0)).any()
    assert (np.array(posterize(picture, 1)) == 128).all()
    augment = RandAugment("rand-m10-n15-p1.0-inc1", (16, 16), (0.5,) * 3)
    for seed in range(20):
        np.random.seed(seed), random.seed(seed)
        assert augment(Bright().read(seed % 12).image).shape == (3, 16, 16)


def test_a_damaged_image_is_replaced_with_its_label():
    images = training_images(Bright(damaged=(5, 6)))
    found = images[0, 5]
    assert found.label == 7 % 4
    assert [item.name for item in found.damaged] == ["image 5", "image 6"]
    assert training_images(Bright(damaged=(11,)))[0, 11].label == 0, "after the last comes the first"
    batch = stack([images[0, 4], found])
    assert batch.labels.tolist() == [0, 3]
    assert len(batch.damaged) == 2


def test_mixing_follows_its_place_and_targets_follow_the_images():
    mixing = Mixing(resolved(replace(GIVEN, batch_size=4), num_images=920), num_classes=4)
    labels = torch.tensor([0, 1, 2, 3])

    def mixed(place):
        return mixing(torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8).clone(), labels, place=place)

    one, again, other = mixed((7, 0, 0)), mixed((7, 0, 0)), mixed((8, 0, 0))
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one[1], other[1])
    smooth = 0.1 / 4
    half = Mixing(resolved(replace(GIVEN, batch_size=4, mixed_share=0.5), num_images=920), num_classes=4)
    plain = [half(torch.zeros(4, 3, 8, 8), labels, place=(place, 0, 0))[1][0, 3] == smooth for place in range(40)]
    assert 8 < sum(plain) < 32
    for place in range(20):
        images, targets = mixed((place, 0, 0))
        share = (targets[0, 0] - smooth) / 0.9  # of the image itself; the rest is the last image of the batch
        torch.testing.assert_close(images[0].mean(), 3 * (1 - share), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))


def test_without_mixing_only_the_smoothing_is_left():
    mixing = Mixing(resolved(replace(GIVEN, mixup=0.0, cutmix=0.0, label_smoothing=0.2), num_images=920), 4)
    images = torch.randn(3, 3, 8, 8)
    same, targets = mixing(images, torch.tensor([0, 3, 1]), place=(0, 0, 0))
    assert torch.equal(same, images)
    torch.testing.assert_close(targets[1], torch.tensor([0.05, 0.05, 0.05, 0.85]))


# Whole runs


def test_it_learns_and_leaves_a_classifier_that_loads(checkpoint, tmp_path):
    """Without augmentation the training images themselves are learnt by heart: the pieces are joined right."""
    plain = {"crop_scale": (1.0, 1.0), "flip": False, "rand_augment": "", "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0,
             "drop_path": 0.0, "label_smoothing": 0.0, "epochs": 40, "val_epochs": 7}  # fmt: skip
    out = tmp_path / "tuned"
    result = finetune.run(config(checkpoint, out, val="shapes:24", **plain))
    assert result.top1 >= 90
    assert result.top5 == 100
    assert result.untrained_top1 is None
    assert (result.num_train, result.num_val, result.num_classes, result.steps) == (24, 24, 8, 120)
    assert result.top1_interval.low < result.top1 <= result.top1_interval.high
    records = read_metrics(out)
    assert [record["epoch"] for record in records] == list(range(1, 41))
    assert [r["epoch"] for r in records if "val_top1" in r] == [7, 14, 21, 28, 35, 40]
    assert records[-1]["train_loss"] < 0.7 * records[0]["train_loss"]
    assert {"learning_rate", "gradient_norm", "images_per_second"} <= records[0].keys()
    with (out / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["num_images"]) for row in rows) == 24
    assert np.mean([float(row["top1"]) for row in rows]) == pytest.approx(result.top1)
    assert (out / "confusion.png").stat().st_size > 1000
    assert json.loads((out / "result.json").read_text())["top1"] == result.top1

    model = hardpatch.load_classifier(out)
    assert model.pretrained_cfg["label_names"] == sorted(set(open_source("shapes:24").labels))
    source = open_source("shapes:24", image_size=(32, 32))
    normalise = build_normalise(tiny_config())
    with torch.no_grad():
        (batch,) = ordered_batches(source, size=(32, 32))
        best = model(normalise(batch.images)).argmax(dim=1)
    named = [model.pretrained_cfg["label_names"][i] for i in best.tolist()]
    assert 100 * np.mean([a == b for a, b in zip(named, source.labels)]) == pytest.approx(result.top1)
    transform = create_transform(**timm.data.resolve_model_data_config(model))
    assert transform.transforms[-1].mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    with pytest.raises(InputError, match=r"classifier: no classifier\.safetensors"):
        hardpatch.load_classifier(checkpoint)


def test_the_command_prints_and_keeps_what_the_interface_promises(checkpoint, tmp_path, capsys):
    arguments = command(
        checkpoint, "", train="shapes:48", labels_per_class=3, epochs=1, device="cpu", workers=0, untrained=True
    )
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--json"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out.splitlines()
    figures = json.loads(printed[-1])
    assert {"top1", "top5", "untrained_top1", "num_train", "num_val"} <= figures.keys()
    assert (figures["num_train"], figures["num_val"], figures["labels_per_class"]) == (24, 16, 3)
    assert any(line.startswith("this run ") for line in printed)
    assert any(line.startswith("untrained") for line in printed)
    assert f"  model = hardpatch.load_classifier('{checkpoint}/finetune')    # a plain timm model" in printed
    kept = json.loads((hardpatch.runs.folder.RunFolder(checkpoint).evaluations / "finetune.json").read_text())
    assert kept == figures
    report = hardpatch.runs.folder.RunFolder(checkpoint).report_file.read_text()
    assert "Fine-tuned" in report
    assert "confusion" in report
    one, other = (
        yaml.safe_load((hardpatch.runs.folder.RunFolder(checkpoint).path / place / "config.yaml").read_text())[
            "finetune"
        ]
        for place in ("finetune", "finetune/untrained")
    )
    assert one.pop("encoder") != other.pop("encoder")
    assert one == other, "the control differs in its start alone"
    assert torch.equal(load_encoder(checkpoint).pos_embed, load_encoder(checkpoint).pos_embed)
    with pytest.raises(SystemExit) as stop:
        main([*arguments[:-1], "--json"])  # finished: measured again, and the control is not asked for
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] == figures["top1"]


def test_other_encoders_by_the_same_recipe_in_one_table(checkpoint, tmp_path):
    """A run named twice is the run again; a timm model keeps its own size and normalisation."""
    sizes = {"img_size": 48, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes)
    model.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), input_size=(3, 48, 48), num_classes=5)
    save_for_hf(model, tmp_path / "vit", model_args=sizes, safe_serialization=True)
    against = (str(hardpatch.runs.folder.RunFolder(checkpoint).weights_file), f"timm:local-dir:{tmp_path / 'vit'}")
    result = finetune.run(config(checkpoint, tmp_path / "tuned", against=against, untrained=True, epochs=1))
    ours, untrained, again, theirs = result.standings
    assert [row.name for row in result.standings] == ["this run", "untrained", *against]
    assert ours.top1 == result.top1
    assert untrained.top1 == result.untrained_top1
    assert (again.top1, again.lead) == (ours.top1, 0.0), "the same weights, seed and images"
    assert theirs.lead == pytest.approx(ours.top1 - theirs.top1)
    tuned = load_classifier(tmp_path / "tuned" / folder_name(against[1]))
    assert tuned.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]
    assert tuned.patch_embed.img_size == (48, 48)
    assert tuned.pretrained_cfg["label_names"] == sorted(set(open_source("shapes:24").labels))
    before, after = model.state_dict(), tuned.state_dict()
    assert 0 < (after["blocks.0.mlp.fc1.weight"] - before["blocks.0.mlp.fc1.weight"]).abs().max() < 0.05


@pytest.mark.parametrize("stop_after", [1, 3, 8])
def test_a_stopped_run_ends_bit_identical(checkpoint, tmp_path, monkeypatch, stop_after):
    """In mid-epoch, between two epochs, before the last step; with clipping, micro-batches and data workers."""
    extra = {"gradient_clip": 1.0, "micro_batch_size": 4, "drop_path": 0.5}
    whole = finetune.run(config(checkpoint, tmp_path / "whole", **extra))
    learn = finetune_training.Finetuning._learn

    def signalled(training, *arguments):
        if training.step + 1 == stop_after:
            signal.raise_signal(signal.SIGTERM)
        return learn(training, *arguments)

    monkeypatch.setattr(finetune_training.Finetuning, "_learn", signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=f"SIGTERM and saved at step {stop_after} of 9"):
        finetune.run(config(checkpoint, tmp_path / "stopped", **extra))
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    again = finetune.run(config(checkpoint, tmp_path / "stopped", **extra | {"workers": 1}))
    assert_same(last(tmp_path / "whole"), last(tmp_path / "stopped"))
    timeless = [[{k: v for k, v in r.items() if "second" not in k} for r in read_metrics(tmp_path / name)]
                for name in ("whole", "stopped")]  # fmt: skip
    assert timeless[0] == timeless[1]
    assert (whole.top1, whole.train_loss) == (again.top1, again.train_loss)


def test_stochastic_depth_is_the_same_in_the_first_step_after_a_stop(tmp_path, monkeypatch):
    """A data loader that starts draws a number of its own: it must not shift those of the step."""
    values = TINY | {"epochs": 1, "encoder_depth": 3}
    pretrain(values.pop("data"), tmp_path / "deep", **values)
    test_a_stopped_run_ends_bit_identical(str(tmp_path / "deep"), tmp_path, monkeypatch, 4)


def finetune_in_child(arguments):
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    main(arguments)


def test_kill_9_leaves_no_trace_and_sigterm_leaves_with_code_3(checkpoint, tmp_path):
    def arguments(name):
        return command(checkpoint, tmp_path / name, **SHORT | {"epochs": 20, "workers": 1, "checkpoint_minutes": 0.0})

    def newest(name):
        return max(CheckpointFolder(tmp_path / name / "checkpoints").steps(), default=0)

    def stopped_at(name, step, number):
        child = in_child(finetune_in_child, arguments(name))
        while newest(name) < step and child.is_alive():
            time.sleep(0.002)
        assert child.is_alive(), "finished before it was stopped: make the run longer"
        os.kill(child.pid, number)
        child.join(60)
        return child.exitcode

    whole = in_child(finetune_in_child, arguments("whole"))
    whole.join(120)
    assert whole.exitcode == 0
    assert [stopped_at("killed", step, signal.SIGKILL) for step in (2, 9, 20)] == [-signal.SIGKILL] * 3
    assert stopped_at("killed", 30, signal.SIGTERM) == 3
    child = in_child(finetune_in_child, arguments("killed"))
    child.join(120)
    assert child.exitcode == 0
    assert_same(last(tmp_path / "whole"), last(tmp_path / "killed"))
    losses = [[record["train_loss"] for record in read_metrics(tmp_path / name)] for name in ("whole", "killed")]
    assert losses[0] == losses[1]
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*.tmp"))


def test_accumulated_gradients_are_those_of_the_whole_batch(checkpoint, tmp_path):
    """Without mixing and stochastic depth, which are drawn per forward pass."""
    same = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0}
    one = finetune.run(config(checkpoint, tmp_path / "one", **same))
    four = finetune.run(config(checkpoint, tmp_path / "four", micro_batch_size=2, **same))
    assert one.train_loss == pytest.approx(four.train_loss, rel=1e-4)


def test_every_layer_learns_at_its_share_of_the_schedule(checkpoint, tmp_path, monkeypatch):
    rates, learn = [], torch.optim.AdamW.step

    def spied(self, *arguments):
        rates.append({round(group["lr_scale"], 6): group["lr"] for group in self.param_groups})
        return learn(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    finetune.run(config(checkpoint, tmp_path / "run", warmup_epochs=1.0, min_learning_rate=1e-4))
    assert len(rates) == 9
    for step, by_scale in enumerate(rates):
        expected = learning_rate(step, peak=3e-2 * 8 / 256, warmup_steps=3, total_steps=9, floor=1e-4)
        assert by_scale == {round(0.8**i, 6): pytest.approx(0.8**i * expected) for i in range(3)}


def test_another_config_in_the_folder_is_an_error_that_shows_it(checkpoint, tmp_path):
    out = tmp_path / "run"
    finetune.run(config(checkpoint, out, epochs=1, mixed_share=None))
    with pytest.raises(
        InputError, match=r"(?s)other settings.*epochs: 1 -> 2\n  layer_decay: 0.8 -> 0.7.*  mixed_share: 0.01 -> 0.02$"
    ):
        finetune.run(config(checkpoint, out, epochs=2, layer_decay=0.7, mixed_share=None))
    with pytest.raises(InputError, match=r"train: '24 images, .* -> '32 images"):
        finetune.run(config(checkpoint, out, epochs=1, train="shapes:32", mixed_share=None))
    assert finetune.run(config(checkpoint, out, epochs=2, resume="restart")).epochs == 2
    with pytest.raises(InputError, match=r"out: .* holds no fine-tuning but something else"):
        finetune.run(config(checkpoint, checkpoint))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").touch()
    with pytest.raises(InputError, match=r"out: .* is not empty and holds no fine-tuning"):
        finetune.run(config(checkpoint, tmp_path / "full"))
    with pytest.raises(InputError, match=r"out: cannot make .*a\.txt"):
        finetune.run(config(checkpoint, tmp_path / "full" / "a.txt"))
    with pytest.raises(InputError, match=r"out: name a folder; .* is no run folder"):
        finetune.run(replace(config(checkpoint, ""), checkpoint=f"{checkpoint}/checkpoints/last"))


def test_five_channels_not_square(tmp_path):
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(8):
            array = np.random.default_rng(number).integers(0, 100, (5, 32, 48)) + 150 * (name == "b")
            np.save(tmp_path / "images" / name / f"{number}.npy", array.astype(np.uint8))
    values = TINY | {"epochs": 1, "channels": 5, "image_size": (32, 48)}
    del values["data"]
    images = str(tmp_path / "images")
    pretrain(images, tmp_path / "run", **values)
    few = config(str(tmp_path / "run"), "", train=images, val=images)
    assert finetune.run(few).num_classes == 2
    assert hardpatch.load_classifier(tmp_path / "run")(torch.randn(1, 5, 32, 48)).shape == (1, 2)
    with pytest.raises(InputError, match="rand_augment: works on 3 channels only"):
        finetune.run(replace(few, rand_augment=RAND_AUGMENT))
    with pytest.raises(InputError, match="train: shapes have 3 channels, got channels=5"):
        finetune.run(replace(few, train="shapes:24"))


def test_too_much_damage_stops_it(checkpoint, tmp_path, monkeypatch):
    source = Bright(num_images=24, damaged=(4,), size=(32, 32))
    monkeypatch.setattr("hardpatch.evaluate.classify.labelled_images.open_source", lambda *_, **__: source)
    with pytest.raises(
        InputError, match=r"max_damaged: at most 1\.0% .* 1 of the 24 of train are; .*image 4: scratched"
    ):
        finetune.run(config(checkpoint, tmp_path / "run"))
    assert finetune.run(config(checkpoint, tmp_path / "run", max_damaged=0.1)).damaged == 2


def test_a_loss_that_is_not_finite_stops_it_before_it_is_saved(checkpoint, tmp_path):
    with pytest.raises(InputError, match="not finite"):
        finetune.run(config(checkpoint, tmp_path / "run", base_learning_rate=1e30, warmup_epochs=0.0))
    saved = CheckpointFolder(tmp_path / "run" / "checkpoints", holds="model").load_latest()
    assert saved is None or all(torch.isfinite(value).all() for value in saved["sums"])


@pytest.mark.slow
def test_two_processes_train_one_classifier(checkpoint, tmp_path):
    out = tmp_path / "run"
    words = command(checkpoint, out, val="shapes:17@1", **SHORT | {"epochs": 2})
    done = subprocess.run(
        [
            *f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 -m hardpatch".split(),
            *words,
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["num_val"] == 17
    assert last(out)["step"] == 6
    assert done.stdout.count("fine-tuned from") == 1
