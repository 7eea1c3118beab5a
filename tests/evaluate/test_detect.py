"""Detection: average precision on cases worked out by hand, strides that fit, crops whose boxes fit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torchvision.ops import masks_to_boxes, roi_align

from dense_run import write_blobs, write_run
from hardpatch.cli import main
from hardpatch.config.dense_evaluations import DetectConfig
from hardpatch.data.images.decode import Decoder
from hardpatch.evaluate.dense import detect
from hardpatch.evaluate.dense.coco import CocoImages, instances_from_masks
from hardpatch.evaluate.dense.detect_crops import InstanceCrops, clean_target
from hardpatch.evaluate.dense.detector import adapted_samples, build_detector, check_patch, fitting_size
from hardpatch.evaluate.dense.feature_maps import DenseEncoder
from hardpatch.evaluate.dense.pyramid import SCALES, SimplePyramid, rescale
from hardpatch.method.vit import create_encoder
from hardpatch.runtime.errors import InputError

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Average precision


def truth(*boxes, **more):
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": list(box), **more} for i, box in enumerate(boxes, 1)
    ]
    return {"images": [{"id": 1, "height": 100, "width": 100}], "annotations": annotations,
            "categories": [{"id": 1, "name": "thing"}]}  # fmt: skip


def found(*boxes):
    return [{"image_id": 1, "category_id": 1, "bbox": list(box), "score": 1 - i / 10} for i, box in enumerate(boxes)]


A, B = (10, 10, 20, 20), (60, 60, 20, 20)


@pytest.mark.parametrize(
    ("boxes", "ap", "ap50"),
    [
        ((A, B), 100, 100),
        ((B, A), 100, 100),
        ((), 0, 0),
        ((A,), 100 * 51 / 101, 100 * 51 / 101),  # precision 1 up to recall 0.5: 51 of COCO's 101 recalls
        (((0, 70, 5, 5), A, B), 100 * (2 / 3), 100 * (2 / 3)),  # a wrong one comes first: precision 1/2, then 2/3
        ((A, B, A), 100, 100),  # found twice: the second does no harm at the end
        # Moved by 4 of 20 pixels the IoU is 16/24, above 4 of the 10 thresholds (0.5, 0.55, 0.6, 0.65).
        (((14, 10, 20, 20), (64, 60, 20, 20)), 40, 100),
    ],
)
def test_average_precision_by_hand(boxes, ap, ap50):
    precision = detect.average_precision(truth(A, B), found(*boxes), "bbox")
    assert precision.ap == pytest.approx(ap, abs=1e-6)
    assert precision.ap50 == pytest.approx(ap50, abs=1e-6)


def test_average_precision_of_masks_by_hand():
    """A triangle against its own box: half of the pixels."""
    mask = np.tril(np.ones((20, 20), dtype=np.uint8))
    picture = np.zeros((100, 100), dtype=np.uint8)
    picture[10:30, 10:30] = mask
    code = coco_mask.encode(np.asfortranarray(picture))
    whole = np.zeros_like(picture)
    whole[10:30, 10:30] = 1
    content = truth(A, segmentation={"size": [100, 100], "counts": code["counts"].decode()})
    about = {"image_id": 1, "category_id": 1, "score": 1.0}
    assert detect.average_precision(content, [{**about, "segmentation": code}], "segm").ap == pytest.approx(100)
    box = coco_mask.encode(np.asfortranarray(whole))  # IoU 210 / 400 = 0.525: the first threshold alone
    assert detect.average_precision(content, [{**about, "segmentation": box}], "segm").ap == pytest.approx(10)


def test_nothing_to_find_is_no_figure():
    assert detect.average_precision(truth(), found(A), "bbox") == (None, None, None)
    assert detect.average_precision(truth(A, iscrowd=1), found(A), "bbox") == (None, None, None)


def test_average_precision_leaves_its_arguments_alone():
    content, detections = truth(A), found(A)
    before = json.dumps([content, detections])
    detect.average_precision(content, detections, "bbox")
    assert json.dumps([content, detections]) == before


# The detector


def tiny_encoder(size=64, patch=8, bf16=False):
    vit = create_encoder("vit_tiny_patch16_224", image_size=(32, 32), patch_size=patch, width=16, depth=1, heads=2)
    return DenseEncoder(vit, size=(size, size), depths=(1,), trained=True, bf16=bf16)


def tiny_detector(size=64, masks=True, bf16=False):
    return build_detector(
        tiny_encoder(size, bf16=bf16), num_classes=2, masks=masks, size=size, width=8, anchor_scale=4.0,
        mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2),
    )  # fmt: skip


@pytest.mark.parametrize("scale", SCALES)
def test_levels_are_rescaled(scale):
    step, channels = rescale(16, scale)
    assert step(torch.randn(2, 16, 8, 12)).shape == (2, channels, int(8 * scale), int(12 * scale))


def test_the_pyramid_has_five_levels():
    maps = SimplePyramid(16, 8)(torch.randn(1, 16, 8, 8))
    assert {name: tuple(value.shape[1:]) for name, value in maps.items()} == {
        "0": (8, 32, 32), "1": (8, 16, 16), "2": (8, 8, 8), "3": (8, 4, 4), "pool": (8, 2, 2),
    }  # fmt: skip


def test_sizes():
    assert [fitting_size(n, 16) for n in (224, 256, 1024, 1)] == [256, 256, 1024, 64]
    assert check_patch((8, 8)) == 8
    for wrong in ((8, 16), (14, 14)):
        with pytest.raises(InputError, match="square patches"):
            check_patch(wrong)


def test_boxes_are_pooled_where_they_are_on_wide_images():
    """torchvision infers strides from image sizes without their padding; on a 3:2 image it would be wrong by two."""
    pool = tiny_detector().roi_heads.box_roi_pool
    ramp = {str(i): torch.arange(n).float().expand(1, 1, n, n).contiguous() for i, n in enumerate((32, 16, 8, 4))}
    box = torch.tensor([[16.0, 4.0, 40.0, 28.0]])
    pooled = pool(ramp, [box], [(43, 64)])
    slow = roi_align(ramp["0"], [box], output_size=7, spatial_scale=0.5, sampling_ratio=2)
    torch.testing.assert_close(pooled, slow)


def test_large_boxes_are_pooled_from_coarse_levels():
    pool = tiny_detector().roi_heads.box_roi_pool
    # ViTDet at strides of 4 and up: 112 pixels of side begin the second level. Here strides are half of that.
    sides = torch.tensor([27.0, 55, 57, 111, 113, 225])
    boxes = torch.stack([torch.zeros(6), torch.zeros(6), sides, sides], dim=1)
    assert pool.map_levels([boxes]).tolist() == [0, 0, 1, 1, 2, 3]


def test_heads_compute_in_bf16_and_boxes_do_not():
    """In bfloat16 a coordinate near 500 is a multiple of 2."""
    torch.manual_seed(0)
    model = tiny_detector(512, bf16=True).eval()
    seen = {}

    def look(name):
        return lambda module, inputs, output: seen.update({name: output.dtype})

    model.backbone.pyramid.module.levels[0][3].register_forward_hook(look("pyramid"))
    model.rpn.head.module.cls_logits.register_forward_hook(look("rpn"))
    model.roi_heads.box_head.module.fc7.register_forward_hook(look("box"))
    model.roi_heads.mask_head.module[0].register_forward_hook(look("mask"))
    model.roi_heads.mask_predictor.module.mask_fcn_logits.register_forward_hook(look("masks"))
    proposals = []
    model.rpn.register_forward_hook(lambda module, inputs, output: proposals.extend(output[0]))
    found = model([torch.rand(3, 512, 512)])[0]
    assert seen == dict.fromkeys(("pyramid", "rpn", "box", "mask", "masks"), torch.bfloat16)
    assert found["boxes"].dtype == found["scores"].dtype == found["masks"].dtype == torch.float32
    for boxes in (proposals[0], found["boxes"]):
        inside = boxes[(boxes > 256) & (boxes < 512)]
        assert len(inside) > 20
        assert (inside != inside.bfloat16()).float().mean() > 0.9


def test_bf16_changes_the_losses_by_rounding_alone():
    torch.manual_seed(0)
    plain, half = (tiny_detector(bf16=bf16).train() for bf16 in (False, True))
    half.load_state_dict(plain.state_dict())
    target = {"boxes": torch.tensor([[8.0, 8, 40, 48]]), "labels": torch.tensor([1]),
              "masks": torch.ones(1, 64, 64, dtype=torch.uint8)}  # fmt: skip
    losses = []
    for model in (plain, half):
        torch.manual_seed(1)
        images = [torch.rand(3, 64, 64)]
        losses.append({name: value.item() for name, value in model(images, [target]).items()})
    assert losses[0].keys() == losses[1].keys()
    assert len(losses[0]) == 5
    for name in losses[0]:
        assert losses[1][name] == pytest.approx(losses[0][name], rel=0.02), name
        assert losses[1][name] != losses[0][name], name


def test_anchors_stand_on_the_strides_of_their_levels():
    model = tiny_detector()
    image_list, _ = model.transform([torch.rand(3, 43, 64), torch.rand(3, 64, 20)])
    assert image_list.tensors.shape == (2, 3, 64, 64)
    maps = model.backbone(image_list.tensors)
    anchors = model.rpn.anchor_generator(image_list, list(maps.values()))[0]
    start = 0
    for level, stride in zip(maps.values(), (2, 4, 8, 16, 32)):
        count = level.shape[2] * level.shape[3] * 3
        part = anchors[start : start + count].reshape(level.shape[2], level.shape[3], 3, 4)
        start += count
        assert (part[0, 1, 0] - part[0, 0, 0]).tolist() == [stride, 0, stride, 0]
        square = part[0, 0, 1]
        assert (square[2] - square[0], square[3] - square[1]) == (4 * stride, 4 * stride)
    assert start == len(anchors)


def test_results_come_back_at_the_images_own_size():
    model = tiny_detector().eval()
    with torch.no_grad():
        result = model([torch.rand(3, 40, 100)])[0]
    assert result["masks"].shape[2:] == (40, 100)
    assert (result["boxes"][:, 2] <= 100).all()
    assert (result["boxes"][:, 3] <= 40).all()


def test_without_masks_it_is_faster_rcnn():
    model = tiny_detector(masks=False)
    boxes, labels = torch.tensor([[4.0, 4, 30, 30]]), torch.tensor([2])
    losses = model([torch.rand(3, 64, 64)], [{"boxes": boxes, "labels": labels}])
    assert not any("mask" in name for name in losses)
    sum(losses.values()).backward()
    assert model.backbone.encoder.vit.patch_embed.proj.weight.grad.abs().sum() > 0


# Crops


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("blobs"), 8)


@pytest.fixture(scope="module")
def images(blobs):
    return CocoImages(instances_from_masks(*blobs, decoder=Decoder()), blobs[0], decoder=Decoder())


def crops(images, **changes):
    values = {"size": 64, "scale": (0.5, 2.0), "flip": True, "fill": (0, 0, 0), "seed": 0}
    return InstanceCrops(images, **values | changes)


def test_boxes_fit_their_masks_and_masks_their_image(images):
    counts = set()
    for number in range(20):
        image, target = crops(images)[number, number % 8]
        assert image.shape == (3, 64, 64)
        counts.add(len(target["boxes"]))
        if len(target["boxes"]):
            tight = masks_to_boxes(target["masks"]) + torch.tensor([0, 0, 1, 1])
            torch.testing.assert_close(target["boxes"], tight)
            covered = target["masks"].bool().any(dim=0)
            assert image[0][covered].float().mean() > 120
            assert image[0][~covered].float().mean() < 60
        assert len(target["labels"]) == len(target["boxes"]) == len(target["masks"])
    assert len(counts) > 1


def test_a_crop_follows_from_seed_pass_and_index(images):
    first, again, other = crops(images)[1, 2], crops(images)[1, 2], crops(images, seed=1)[1, 2]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1]["boxes"], again[1]["boxes"])
    assert not torch.equal(first[0], other[0])


def test_instances_that_were_cut_away_are_gone():
    boxes = torch.tensor([[0.0, 0, 9, 9], [5, 5, 5, 9]])
    target = clean_target(boxes, torch.tensor([1, 2]), None)
    assert target["labels"].tolist() == [1]
    masks = torch.zeros(2, 10, 10, dtype=torch.uint8)
    masks[1, 2:4, 3:7] = 1
    target = clean_target(boxes, torch.tensor([1, 2]), masks)
    assert target["labels"].tolist() == [2]
    assert target["boxes"].tolist() == [[3, 2, 7, 4]]
    empty = clean_target(boxes[:0], torch.zeros(0, dtype=torch.int64), masks[:0])
    assert empty["boxes"].shape == (0, 4)


# The whole


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("detect") / "run")


def test_bright_squares_are_found(capsys, run_folder, blobs):
    words = ["evaluate", "detect", "--checkpoint", run_folder, "--train-images", blobs[0], "--train-annotations",
             f"from-masks:{blobs[1]}", "--val-images", blobs[0], "--val-annotations", f"from-masks:{blobs[1]}",
             "--epochs", "12", "--batch-size", "4", "--learning-rate", "5e-3", "--width", "16",
             "--size", "64", "--scale", "1", "1", "--anchor-scale", "4", "--num-pictures", "2", "--json"]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert stopped.value.code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["ap50"] > 20
    assert result["mask_ap50"] > 20
    assert result["untrained_ap"] is None
    assert (result["num_train"], result["num_val"], result["steps"]) == (8, 8, 24)
    assert Path(result["figure"]).read_bytes().startswith(b"\x89PNG")
    assert 'alt="detections"' in (run_folder / "report.html").read_text()
    assert json.loads((run_folder / "evaluate" / "detect.json").read_text())["ap"] == result["ap"]


def test_boxes_alone_and_the_untrained_encoder(run_folder, blobs, tmp_path):
    content = instances_from_masks(*blobs, decoder=Decoder())
    for item in content["annotations"]:
        del item["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    result = detect.run(DetectConfig(
        checkpoint=str(run_folder), train_images=str(blobs[0]), train_annotations=str(tmp_path / "boxes.json"),
        epochs=1, batch_size=2, width=8, freeze=True, untrained=True, out=str(tmp_path / "out"), device="cpu",
    ))  # fmt: skip
    assert (result.num_train, result.num_val) == (6, 2)
    assert result.mask_ap is None
    assert result.untrained_ap == result.ap  # the run is the untrained encoder itself


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 48}, r"size: must be a multiple of 4 patches \(32 pixels\), got 48"),
        ({"val_images": "x"}, "val_annotations: val_images and val_annotations belong together"),
        ({"train_annotations": "/nothing.json"}, "train_annotations: cannot read"),
        ({"train_images": "/nothing"}, "train_images: must be a folder"),
        ({"batch_size": 9}, "batch_size: must be at most the 6 training images"),
        ({"min_pixels": 10**6}, "train_annotations: has no instance"),
    ],
)
def test_wrong_values_are_refused(run_folder, blobs, tmp_path, changes, message):
    values = {"checkpoint": str(run_folder), "train_images": str(blobs[0]), "batch_size": 2, "out": str(tmp_path),
              "train_annotations": f"from-masks:{blobs[1]}"}  # fmt: skip
    with pytest.raises(InputError, match=message):
        detect.run(DetectConfig(**values | changes))
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(("size", "samples"), [(1024, 512), (512, 512), (256, 256), (64, 64), (16, 32)])
def test_small_images_are_learnt_from_by_fewer_proposals(size, samples):
    assert adapted_samples(size) == samples


def test_images_of_another_channel_count(run_folder, tmp_path):
    images, masks = write_blobs(tmp_path, 4)
    np.save(images / "3.npy", np.zeros((40, 56, 5), dtype=np.uint8))
    (images / "3.png").unlink()
    config = DetectConfig(checkpoint=str(run_folder), train_images=str(images), batch_size=2, out=str(tmp_path / "out"),
                          train_annotations=f"from-masks:{masks}")  # fmt: skip
    with pytest.raises(InputError, match=r"cannot be read as 3 channels \(where all files are like it: --channels 5\)"):
        detect.run(config)


def test_a_category_that_training_does_not_know(run_folder, blobs, tmp_path):
    content = instances_from_masks(*blobs, decoder=Decoder())
    content["categories"][0]["name"] = "horse"
    (tmp_path / "val.json").write_text(json.dumps(content))
    config = DetectConfig(
        checkpoint=str(run_folder), train_images=str(blobs[0]), train_annotations=f"from-masks:{blobs[1]}",
        val_images=str(blobs[0]), val_annotations=str(tmp_path / "val.json"), out=str(tmp_path / "out"),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"category 1 \(horse\) is not among those"):
        detect.run(config)


@pytest.mark.parametrize(
    ("scores", "drawn"),
    [([0.9, 0.6, 0.4], [True, True, False]), ([0.4, 0.3], [True, False]), ([0.1, 0.3], [False, True]), ([], [])],
)
def test_pictures_show_what_is_likely_or_else_the_best(scores, drawn):
    assert detect.worth_drawing(torch.tensor(scores)).tolist() == drawn
