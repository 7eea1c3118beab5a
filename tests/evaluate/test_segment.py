"""Segmentation: figures against scikit-learn, windows against the identity, training against a kill."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix, jaccard_score
from torch import nn

from dense_run import save, write_blobs, write_run
from hardpatch.cli import main
from hardpatch.config.dense_evaluations import SegmentConfig
from hardpatch.data.images.decode import Decoder
from hardpatch.data.sources import open_source
from hardpatch.evaluate.contenders import open_contenders
from hardpatch.evaluate.dense import segment
from hardpatch.evaluate.dense.class_masks import IGNORED, MaskedImage, MaskedImages, MaskRules, match_by_stem
from hardpatch.evaluate.dense.comparison import held_back
from hardpatch.evaluate.dense.feature_maps import DenseEncoder, choose_depths, parameter_groups
from hardpatch.evaluate.dense.overlays import class_colours, overlay
from hardpatch.evaluate.dense.segment_crops import SegmentationCrops, working_size
from hardpatch.evaluate.dense.segment_data import open_data
from hardpatch.evaluate.dense.segment_heads import LinearHead, Segmenter, UperNetHead, pixel_loss
from hardpatch.evaluate.dense.windows import most_likely, slide, window_corners
from hardpatch.method.vit import create_encoder, encode
from hardpatch.runs.load import LoadedRun
from hardpatch.runtime.errors import InputError

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("segment") / "run")


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("blobs"), 12)


def tiny_vit(depth=1, **changes):
    sizes = {"image_size": (32, 32), "patch_size": 8, "width": 16, "heads": 2}
    return create_encoder("vit_tiny_patch16_224", depth=depth, **sizes | changes)


# What is measured


def test_figures_equal_scikit_learn():
    random = np.random.default_rng(0)
    truth, found = random.integers(0, 5, 4000), random.integers(0, 5, 4000)
    found = np.where(random.random(4000) < 0.6, truth, found)
    scores = segment.scores_of(torch.from_numpy(confusion_matrix(truth, found)))
    assert scores.iou == pytest.approx(jaccard_score(truth, found, average=None).tolist())
    assert scores.miou == pytest.approx(jaccard_score(truth, found, average="macro"))
    assert scores.pixel_accuracy == pytest.approx((truth == found).mean())


def test_a_class_that_is_nowhere_is_left_out_of_the_mean():
    """Class 1 is predicted once and never there (IoU 0), class 3 neither: it has no IoU."""
    confusion = torch.tensor([[3, 1, 0, 0], [0, 0, 0, 0], [0, 0, 4, 0], [0, 0, 0, 0]])
    scores = segment.scores_of(confusion)
    assert scores.iou == [0.75, 0.0, 1.0, None]
    assert scores.miou == pytest.approx(1.75 / 3)


def test_the_loss_is_a_mean_over_pixels_that_count():
    logits, masks = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5)).to(torch.int16)
    masks[0, :2] = IGNORED
    rows = [(logits[b, :, y, x], int(masks[b, y, x])) for b in range(2) for y in range(4) for x in range(5)]
    slow = torch.stack([F.cross_entropy(row[None], torch.tensor([k])) for row, k in rows if k != IGNORED]).mean()
    torch.testing.assert_close(pixel_loss(logits, masks), slow)
    nothing = torch.full((2, 4, 5), IGNORED, dtype=torch.int16)
    assert pixel_loss(logits, nothing) == 0


# Windows


@pytest.mark.parametrize("size", [(32, 32), (33, 32), (40, 100), (20, 70), (5, 6), (97, 61)])
@pytest.mark.parametrize("overlap", [0.0, 1 / 3, 0.9])
def test_windows_cover_every_pixel_and_overlap_enough(size, overlap):
    corners = window_corners(size, (32, 24), overlap=overlap)
    seen = np.zeros(size, dtype=int)
    for top, left in corners:
        seen[top : top + 32, left : left + 24] += 1
        assert top + 32 <= max(32, size[0])
        assert left + 24 <= max(24, size[1])
    assert seen.min() >= 1
    for axis, side in ((0, 32), (1, 24)):
        starts = sorted({corner[axis] for corner in corners})
        assert all(b - a <= max(1, side * (1 - overlap)) for a, b in pairwise(starts))
    assert len(corners) == len(set(corners))


@pytest.mark.parametrize("size", [(32, 32), (40, 100), (20, 70), (5, 6)])
def test_what_is_said_of_a_pixel_does_not_depend_on_its_window(size):
    image = torch.randn(3, *size)
    found = slide(lambda windows: 2 * windows, image, window=(32, 24), overlap=1 / 3, batch_size=3)
    torch.testing.assert_close(found, 2 * image)


def test_windows_are_averaged():
    """Each window says its own number; in the middle both count."""
    calls = iter([1.0, 3.0])
    found = slide(
        lambda windows: torch.full((1, 1, 4, 4), next(calls)), torch.zeros(1, 4, 6), window=(4, 4), overlap=0.5,
        batch_size=1,
    )  # fmt: skip
    assert found[0, 0].tolist() == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("num_classes", [1, 2, 8, 9, 20])
def test_most_likely_equals_the_argmax_of_all_classes_at_once(num_classes):
    logits = torch.randn(num_classes, 5, 7)
    slow = F.interpolate(logits[None], size=(23, 31), mode="bilinear", align_corners=False)[0].argmax(dim=0)
    assert torch.equal(most_likely(logits, (23, 31)), slow)


# Encoder and heads


def test_maps_are_the_encoders_tokens_in_their_places():
    vit = tiny_vit(depth=3)
    maps = DenseEncoder(vit, size=(32, 32), depths=(1, 1, 3), trained=False)(images := torch.randn(2, 3, 32, 32))
    tokens = encode(vit, images)[:, 1:].reshape(2, 4, 4, 16).permute(0, 3, 1, 2)
    torch.testing.assert_close(maps[2], tokens)
    assert torch.equal(maps[0], maps[1])
    assert not torch.allclose(maps[0], maps[2])


def test_another_size_resamples_a_copy():
    vit = tiny_vit()
    before = vit.pos_embed.clone()
    encoder = DenseEncoder(vit, size=(48, 64), depths=(1,), trained=True)
    assert encoder(torch.randn(1, 3, 48, 64))[0].shape == (1, 16, 6, 8)
    assert encoder.vit.pos_embed.shape == (1, 49, 16)
    assert not encoder.vit.pos_embed.requires_grad
    assert torch.equal(vit.pos_embed, before)
    # The middle of the coarse table is the middle of the fine one.
    own, new = (table[0, 1:].unflatten(0, grid).mean(dim=(0, 1)) for table, grid in (
        (before, (4, 4)), (encoder.vit.pos_embed, (6, 8))))  # fmt: skip
    torch.testing.assert_close(own, new, atol=0.1, rtol=0)


@pytest.mark.parametrize("trained", [True, False])
def test_only_an_encoder_that_is_trained_gets_gradients(trained):
    vit = tiny_vit(depth=3)
    encoder = DenseEncoder(vit, size=(32, 32), depths=(1, 2, 2, 2), trained=trained)
    model = Segmenter(encoder, UperNetHead(16, num_classes=3, width=8))
    model.train()
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    got = {name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert ("vit.blocks.0.mlp.fc1.weight" in got) == trained
    assert not any(name.startswith("vit.blocks.2") for name in got)
    assert all(p.grad is not None for p in model.head.parameters())
    assert encoder.vit.training == trained
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    groups = parameter_groups(encoder, model.head, weight_decay=0.1, layer_decay=0.5)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(wanted)


def test_layer_decay_counts_from_the_head():
    vit = tiny_vit(depth=3)
    encoder = DenseEncoder(vit, size=(32, 32), depths=(3,), trained=True)
    groups = parameter_groups(encoder, nn.Linear(2, 2), weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group.get("lr_scale", 1) for group in groups for p in group["params"]}
    names = dict(encoder.vit.named_parameters())
    expected = {"norm.weight": 0.5, "blocks.2.attn.qkv.weight": 0.5, "blocks.0.attn.qkv.bias": 0.125,
                "patch_embed.proj.weight": 0.0625}  # fmt: skip
    assert {name: scale[id(names[name])] for name in expected} == expected
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay[id(names["norm.weight"])] == 0
    assert decay[id(names["patch_embed.proj.weight"])] == 0.1


def test_depths():
    assert choose_depths((), 12) == (3, 6, 9, 12)
    assert choose_depths((), 24) == (6, 12, 18, 24)
    assert choose_depths((), 1) == (1, 1, 1, 1)
    assert choose_depths((2, 4, 6, 8), 12) == (2, 4, 6, 8)
    for wrong in ((1, 2, 3), (0, 1, 2, 3), (1, 2, 3, 13), (4, 3, 2, 1)):
        with pytest.raises(InputError, match="depths"):
            choose_depths(wrong, 12)


def test_heads_give_a_logit_for_every_pixel():
    encoder = DenseEncoder(tiny_vit(), size=(32, 64), depths=(1, 1, 1, 1), trained=False)
    images = torch.randn(2, 3, 32, 64)
    linear, upernet = LinearHead(16, num_maps=4, num_classes=5), UperNetHead(16, num_classes=5, width=8)
    assert linear(encoder(images)).shape == (2, 5, 4, 8)
    assert upernet(encoder(images)).shape == (2, 5, 16, 32)
    assert Segmenter(encoder, upernet)(images).shape == (2, 5, 32, 64)


# Crops


class Halves(MaskedImages):
    """Left half dark and class 3, right half bright and class 7."""

    def __init__(self):
        pass

    def read(self, position):
        image, mask = torch.zeros(3, 24, 40, dtype=torch.uint8), torch.full((24, 40), 3, dtype=torch.int16)
        image[..., 20:], mask[:, 20:] = 200, 7
        return MaskedImage(image, mask)


def crops(**changes):
    values = {"crop": (32, 32), "short_side": 0, "scale": (0.5, 2.0), "flip": True, "fill": (90, 91, 92), "seed": 0}
    return SegmentationCrops(Halves(), **values | changes)


def test_masks_follow_their_images():
    sides = set()
    for number in range(30):
        image, mask = crops()[number, 0]
        assert image.shape == (3, 32, 32)
        assert mask.shape == (32, 32)
        outside = mask == IGNORED
        for channel, fill in enumerate((90, 91, 92)):
            assert (image[channel][outside] == fill).all()
        bright = image[0] > 100
        wrong = (bright != (mask == 7)) & ~outside
        assert wrong.float().mean() < 0.1  # the blurred edge between the halves
        if (mask == 3).any() and (mask == 7).any():
            columns = torch.arange(32).expand(32, 32)
            sides.add(bool(columns[mask == 7].float().mean() > columns[mask == 3].float().mean()))
        assert set(mask.unique().tolist()) <= {IGNORED, 3, 7}
    assert sides == {True, False}, "mirrored and not"


def test_a_crop_follows_from_seed_pass_and_index():
    first, again = crops()[2, 5], crops()[2, 5]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    others = (crops()[3, 5], crops()[2, 6], crops(seed=1)[2, 5])
    assert not any(torch.equal(first[0], other[0]) for other in others)


def test_working_size():
    assert working_size(100, 200, 50) == (50, 100)
    assert working_size(200, 100, 50, 2.0) == (200, 100)
    assert working_size(33, 57, 0) == (33, 57)


def test_held_back_images_are_drawn_by_the_seed():
    kept, drawn = held_back(50, 0.2, 3)
    assert len(drawn) == 10
    assert sorted(kept + drawn) == list(range(50))
    assert held_back(50, 0.2, 3) == (kept, drawn)
    assert held_back(50, 0.2, 4) != (kept, drawn)
    with pytest.raises(InputError, match="val_share"):
        held_back(2, 0.2, 0)


# The whole


def call(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


@pytest.mark.parametrize(
    "more",
    [
        ["--cache", "--epochs", "12"],
        ["--epochs", "30"],
        ["--epochs", "30", "--head", "upernet", "--width", "16", "--finetune", "--learning-rate", "3e-3"],
    ],
    ids=["cached", "crops", "fine-tuned"],
)
def test_bright_squares_are_found(capsys, run_folder, blobs, more):
    words = ["evaluate", "segment", "--checkpoint", run_folder, "--images", blobs[0], "--masks", blobs[1], "--binary",
             "--batch-size", "4", "--val-share", "0.25", "--learning-rate", "0.02",
             "--no-untrained", "--scale", "1", "1.5", "--json", *more]  # fmt: skip
    code, out, err = call(capsys, *words)
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["miou"] > 75
    assert result["pixel_accuracy"] > 85
    assert [item["name"] for item in result["per_class"]] == ["background", "foreground"]
    assert (result["num_train"], result["num_val"]) == (9, 3)
    assert Path(result["figure"]).read_bytes().startswith(b"\x89PNG")
    assert json.loads((run_folder / "evaluate" / "segment.json").read_text())["miou"] == result["miou"]
    assert "next:" in out
    page = (run_folder / "report.html").read_text()
    assert "Semantic segmentation" in page
    assert 'alt="segmentations"' in page
    # The same command finds its training finished and says the same.
    code, out, err = call(capsys, *words)
    assert code == 0
    assert "holds this training finished" in err.replace("\n", " ")
    assert json.loads(out.splitlines()[-1])["miou"] == result["miou"]


def test_the_confusion_matrix_equals_scikit_learns(run_folder, blobs, tmp_path):
    """Every pixel of every image counts once, at the image's own size; ignored ones do not."""
    for index in range(3):
        random = np.random.default_rng(index)
        save(tmp_path / "masks" / f"{index}.png", random.choice([0, 1, 2, 255], (40, 56)).astype(np.uint8))
        save(tmp_path / "images" / f"{index}.png", random.integers(0, 255, (40, 56, 3)).astype(np.uint8))
    config = SegmentConfig(
        checkpoint=str(run_folder), images=str(tmp_path / "images"), masks=str(tmp_path / "masks"),
        val_images=str(tmp_path / "images"), batch_size=2, epochs=1, out=str(tmp_path / "out"), device="cpu",
    )  # fmt: skip
    data = open_data(config, decoder=Decoder(), size=(32, 32))
    loaded = LoadedRun(config.checkpoint)
    segmentation = segment.Segmentation(config, data, (32, 32), tmp_path, torch.device("cpu"))
    measured = segmentation.measure(open_contenders(loaded, [])[0])
    truth, found = [], []
    for index in range(3):
        image, mask = data.val.read(index)
        counts = (mask != IGNORED).numpy()
        truth.append(mask.numpy()[counts])
        found.append(segmentation.predict(measured.model, measured.contender, image).numpy()[counts])
    expected = confusion_matrix(np.concatenate(truth), np.concatenate(found), labels=[0, 1, 2])
    np.testing.assert_array_equal(measured.figures.numpy(), expected)
    assert expected.sum() < 3 * 40 * 56


def test_shapes_bring_their_masks_and_the_untrained_encoder_stands_beside(run_folder, tmp_path):
    config = SegmentConfig(
        checkpoint=str(run_folder), images="shapes:8", val_images="shapes:4@1", batch_size=4, epochs=1, cache=True,
        out=str(tmp_path), device="cpu", against=(str(run_folder),),
    )  # fmt: skip
    result = segment.run(config)
    # The run is the untrained encoder itself: the same seeds give the same figures.
    assert result.miou == result.untrained_miou == result.against[str(run_folder)]
    assert (result.num_train, result.num_val) == (8, 4)


def test_ade20k_layout(run_folder, tmp_path):
    random = np.random.default_rng(0)
    for split, count in (("training", 4), ("validation", 2)):
        for number in range(count):
            save(tmp_path / "images" / split / f"{number}.jpg", random.integers(0, 255, (32, 48, 3)).astype(np.uint8))
            mask = random.integers(0, 4, (32, 48)).astype(np.uint8)
            save(tmp_path / "annotations" / split / f"{number}.png", mask)
    (tmp_path / "names.txt").write_text("wall\nbuilding\nsky\n")
    config = SegmentConfig(
        checkpoint=str(run_folder), images=str(tmp_path), reduce_zero_label=True, batch_size=2, epochs=1,
        class_names=str(tmp_path / "names.txt"), out=str(tmp_path / "out"), num_pictures=0, untrained=False,
    )  # fmt: skip
    result = segment.run(config)
    assert [item.name for item in result.per_class] == ["wall", "building", "sky"]
    assert (result.num_train, result.num_val, result.figure) == (4, 2, None)
    assert sum(item.pixels for item in result.per_class) < 2 * 32 * 48


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": ""}, "masks: name the folder"),
        ({"masks": "/nothing"}, "masks: must be a folder"),
        ({"binary": False}, "--binary"),
        ({"crop_size": (30, 32)}, "crop_size: must be divisible by the encoder's patch size 8x8, got 30x32"),
        ({"depths": (1, 2, 3, 4)}, "depths"),
        ({"finetune": True}, "finetune: the linear head"),
        ({"head": "upernet", "cache": True}, "cache"),
        ({"head": "upernet", "batch_size": 1}, "batch_size: upernet needs at least 2"),
        ({"batch_size": 100}, "batch_size: must be at most the 10 training images"),
        ({"scale": (2.0, 1.0)}, "scale"),
        ({"class_names": "/nothing"}, "class_names: cannot read"),
        ({"checkpoint": "/nothing"}, "does not exist"),
        ({"cache": True, "cache_gb": 1e-6}, "cache_gb"),
    ],
)
def test_wrong_values_are_refused(run_folder, blobs, tmp_path, changes, message):
    values = {"checkpoint": str(run_folder), "images": str(blobs[0]), "masks": str(blobs[1]), "binary": True,
              "out": str(tmp_path), "batch_size": 4}  # fmt: skip
    with pytest.raises(InputError, match=message):
        segment.run(SegmentConfig(**values | changes))
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(
    ("value", "train", "message"),
    [
        (
            9,
            {"num_classes": 3},
            r"val_masks: classes go from 0 to 2 \(num_classes\), and the mask of .*0.png has class 9",
        ),
        (9, {}, "val_masks: classes go from 0 to 1"),
        (1, {"num_classes": 3}, None),
        (2, {"num_classes": 3}, "val_masks: class 2 is in the mask of .*0.png and in no training mask"),
    ],
)
def test_classes_of_both_sides_must_fit(blobs, tmp_path, value, train, message):
    images, masks = write_blobs(tmp_path / "train", 3, value=1)
    val_images, val_masks = write_blobs(tmp_path / "val", 2, value=value)
    config = SegmentConfig(checkpoint="", images=str(images), masks=str(masks), val_images=str(val_images),
                           val_masks=str(val_masks), **train)  # fmt: skip
    if message is None:
        assert open_data(config, decoder=Decoder(), size=(32, 32)).names == ["class 0", "class 1", "class 2"]
    else:
        with pytest.raises(InputError, match=message):
            open_data(config, decoder=Decoder(), size=(32, 32))


def test_images_of_another_channel_count(tmp_path):
    run = write_run(tmp_path / "run", data="", channels=5, mean=(0.5,) * 5, std=(0.2,) * 5)
    images, masks = write_blobs(tmp_path, 4)
    config = SegmentConfig(checkpoint=str(run), images=str(images), masks=str(masks), binary=True, batch_size=2)
    with pytest.raises(InputError, match="cannot be read as 5 channels"):
        segment.run(config)


def test_overlays_show_ignored_pixels_black_and_leave_the_background_alone():
    image = np.full((2, 3, 3), 100, dtype=np.uint8)
    classes = np.array([[0, 1, IGNORED], [0, 0, 0]])
    drawn = overlay(image, classes, class_colours(2))
    assert (drawn[classes == 0] == 100).all()
    assert (drawn[0, 2] == 0).all()
    assert len(set(drawn[0, 1].tolist())) > 1
    assert len(np.unique(class_colours(150), axis=0)) == 150


def test_masked_images_of_a_list(blobs, tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(str(blobs[0] / f"{i}.png") for i in (3, 1)))
    source = open_source(str(tmp_path / "train.txt"))
    files = match_by_stem(source, blobs[1], field="masks")
    assert [file.name for file in files] == ["3.png", "1.png"]
    assert MaskedImages(source, files, MaskRules(binary=True)).read(1).mask.max() == 1
