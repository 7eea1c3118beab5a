"""Exports, loaded by the libraries they are for in processes that cannot import hardpatch, against the encoder."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import hardpatch
from hardpatch.cli import main
from hardpatch.config.commands import ExportConfig
from hardpatch.data.loader.loading import Cover, Normalise
from hardpatch.evaluate.classify.classifier import build_classifier, save_classifier
from hardpatch.export import export, huggingface
from hardpatch.export.backbone import Pooled, read_backbone
from hardpatch.export.export import FORMATS
from hardpatch.method.vit import encode
from hardpatch.runs.build import timm_arguments
from hardpatch.runs.kinds import CLASSIFIER_FILE
from hardpatch.runtime.errors import InputError
from hardpatch.weights.names import from_hugging_face, to_hugging_face
from random_run import random_run
from tiny import tiny_config

torch.set_num_threads(1)

FRESH = """
import sys
for name in {forbidden}:
    sys.modules[name] = None  # importing it is an error
import numpy
stored = numpy.load({images!r})
pictures, images = list(stored["pictures"]), stored["images"]
if "torch" not in {forbidden}:
    import torch
    torch.set_grad_enabled(False)
    images = torch.from_numpy(images)
for form, usage in {usages}.items():
    exec(usage)
    numpy.save({folder!r} + form + ".npy", numpy.asarray(features))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("run") / "photos")


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """Every form once; the result by form."""
    folder = tmp_path_factory.mktemp("exported")
    return {form: write(trained, folder, form) for form in FORMATS}


def path_for(folder: Path, form: str) -> Path:
    return folder / f"{form}{FORMATS[form].suffix}"


def write(run, folder: Path, form: str, **options):
    return export.run(ExportConfig(str(run), form, str(path_for(folder, form)), **options))


def pictures_and_images(shape, count=5):
    """uint8 pictures (B, H, W, C) of the right size, and the same normalised as in the tiny runs."""
    channels, height, width = shape
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    images = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    return pixels, images


@pytest.mark.parametrize(
    ("forms", "forbidden"),
    [
        (["timm", "safetensors"], ["hardpatch", "transformers"]),
        (["hf", "torch"], ["hardpatch", "timm"]),
        (["onnx"], ["hardpatch", "timm", "torch", "onnx"]),
    ],
)
def test_three_lines_in_a_process_without_hpm_give_the_same_features(forms, forbidden, trained, exported, tmp_path):
    results = [exported[form] for form in forms]
    pixels, images = pictures_and_images((3, 32, 32))
    np.savez(tmp_path / "images.npz", pictures=pixels, images=images.numpy())
    usages = {result.format: "\n".join(result.usage) for result in results}
    script = FRESH.format(
        forbidden=forbidden, images=str(tmp_path / "images.npz"), usages=usages, folder=f"{tmp_path}/"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = encode(read_backbone(trained).vit, images)[:, 1:].mean(1).numpy()
    for form, result in zip(forms, results):
        assert result.max_difference <= result.tolerance
        found = np.load(tmp_path / f"{form}.npy")
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 if form == "onnx" else 1e-5)


@pytest.mark.parametrize(
    ("changes", "forms"),
    [
        ({"channels": 4, "mean": (0.5,) * 4, "std": (0.2,) * 4, "data": "x"}, ["timm", "hf", "safetensors", "onnx"]),
        ({"image_size": (32, 48)}, ["timm", "hf", "torch"]),
        ({"encoder": "vit_wee_patch16_reg1_gap_256"}, ["timm", "safetensors", "onnx"]),  # no class token, a register
        ({"encoder": "deit3_small_patch16_224"}, ["timm", "torch"]),  # layer scale, class token without position
    ],
)
def test_other_encoders(changes, forms, tmp_path):
    run = random_run(tmp_path / "run", **changes)
    for form in forms:
        assert write(run, tmp_path, form).max_difference <= 1e-4


@pytest.mark.parametrize("output", ["class", "mean"])
def test_outputs(output, trained, tmp_path):
    """By hand from all tokens, for another batch size than the graph was made with."""
    result = write(trained, tmp_path, "torch", pooling=output)
    _, images = pictures_and_images((3, 32, 32), count=7)
    with torch.no_grad():
        tokens = encode(read_backbone(trained).vit, images)
        found = torch.export.load(result.out).module()(images)
    expected = tokens[:, 0] if output == "class" else sum(tokens[:, i] for i in range(1, 17)) / 16
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert result.usage[-1].endswith("(B, D)")


def test_graphs_say_what_they_want(exported):
    import onnx

    about = {entry.key: entry.value for entry in onnx.load(exported["onnx"].out).metadata_props}
    assert json.loads(about["hardpatch"])["input"]["mean"] == [0.485, 0.456, 0.406]
    extra = {"hardpatch.json": ""}
    torch.export.load(exported["torch"].out, extra_files=extra)
    assert json.loads(extra["hardpatch.json"])["output"] == "tokens"


def test_timm_folder_is_not_said_to_be_other_weights(exported):
    cfg = json.loads(Path(exported["timm"].out, "config.json").read_text())["pretrained_cfg"]
    assert cfg["tag"] == "hardpatch"
    assert "license" not in cfg
    assert cfg["mean"] == [0.485, 0.456, 0.406]


def test_a_file_of_weights_can_be_exported(trained, exported, tmp_path):
    weights = Path(exported["safetensors"].out)
    assert torch.equal(hardpatch.load_encoder(weights).pos_embed, read_backbone(trained).vit.pos_embed)
    write(weights, tmp_path, "timm")
    assert "Not known" in (tmp_path / "timm" / "README.md").read_text()


# ------------------------------------------------------------------------------------------------- Hugging Face


def test_names_go_there_and_back(trained):
    state = read_backbone(trained).vit.state_dict()
    back = from_hugging_face(to_hugging_face(state))
    assert back.keys() == {f"encoder.{name}" for name in state}
    assert all(torch.equal(back[f"encoder.{name}"], tensor) for name, tensor in state.items())


def test_another_eps_and_activation_are_expressed(trained, tmp_path):
    """Values so far off that a loader that took its own would be seen."""
    backbone = read_backbone(trained)
    for module in backbone.vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.1
    for block in backbone.vit.blocks:
        block.mlp.act = nn.SiLU()
    huggingface.check(backbone)
    huggingface.write_folder(backbone, tmp_path / "out")
    export.compare(FORMATS["hf"], tmp_path / "out", backbone, "tokens")
    backbone.vit.norm.eps = 1e-6
    with pytest.raises(InputError, match="different eps"):
        huggingface.check(backbone)
    with pytest.raises(AssertionError, match="does not compute the same"):
        export.compare(FORMATS["hf"], tmp_path / "out", backbone, "tokens")


@pytest.mark.parametrize(
    ("encoder", "reason"),
    [
        ("vit_wee_patch16_reg1_gap_256", "no class token"),
        ("vit_small_patch14_reg4_dinov2", "4 register tokens"),
        ("deit3_small_patch16_224", "no place in the position table"),
        ("vit_small_patch14_dinov2", "layer scale"),
        ("vit_base_patch32_clip_224", "before the first block"),
    ],
)
def test_what_transformers_cannot_express_is_refused(encoder, reason, tmp_path):
    run = random_run(tmp_path / "run", encoder=encoder)
    with pytest.raises(InputError, match=f"format: .*{encoder}.*{reason}"):
        write(run, tmp_path, "hf")
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: setattr(block.attn, "q_norm", nn.LayerNorm(16)), "queries and keys"),
        (lambda block: setattr(block.mlp, "norm", nn.LayerNorm(128)), "inside the MLP"),
        (lambda block: setattr(block.mlp, "act", nn.Tanh()), "Tanh"),
        (lambda block: setattr(block, "norm1", nn.RMSNorm(32)), "RMSNorm"),
        (lambda block: setattr(block, "mlp", nn.Linear(32, 32)), "another kind"),
    ],
)
def test_parts_of_blocks_that_transformers_has_not(change, reason, trained):
    backbone = read_backbone(trained)
    change(backbone.vit.blocks[0])
    with pytest.raises(InputError, match=reason):
        huggingface.check(backbone)


@pytest.mark.parametrize("size", [(48, 72), (72, 48), (64, 64)])
def test_image_processor_prepares_images_as_hpm_does(size, exported):
    from transformers import AutoImageProcessor

    # Sizes whose long side is a whole number after resizing: transformers rounds it down, hardpatch to the nearest.
    smooth = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    picture = nn.functional.interpolate(smooth[None], size, mode="bicubic").clamp(0, 1)[0].mul(255).to(torch.uint8)
    found = AutoImageProcessor.from_pretrained(exported["hf"].out)(picture, return_tensors="pt")["pixel_values"]
    covered = Cover((32, 32))(picture)[None]
    expected = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(covered)
    one_level = 1 / 255 / 0.224
    torch.testing.assert_close(found, expected, rtol=0, atol=1.5 * one_level)


# ------------------------------------------------------------------------------------------------- what may go wrong


@pytest.mark.parametrize("spoil", [1e-3, float("nan")])
def test_an_export_that_computes_something_else_is_our_fault_and_leaves_nothing(spoil, trained, tmp_path, monkeypatch):
    def spoiled(backbone, to):
        FORMATS_BEFORE.write(backbone._replace(vit=other), to)

    FORMATS_BEFORE = FORMATS["timm"]  # noqa: N806
    other = read_backbone(trained).vit
    with torch.no_grad():
        other.blocks[0].attn.qkv.bias[70] += spoil  # of a value: softmax does not see those of keys
    monkeypatch.setitem(FORMATS, "timm", FORMATS_BEFORE._replace(write=spoiled))
    with pytest.raises(AssertionError, match="does not compute the same"):
        write(trained, tmp_path, "timm")
    assert list(tmp_path.iterdir()) == []


def test_compare_sees_a_batch_that_is_fixed(trained, tmp_path):
    backbone = read_backbone(trained)
    form = FORMATS["torch"]._replace(
        read=lambda path, backbone: lambda images: Pooled(backbone.vit, "mean")(images)[:1]
    )
    with pytest.raises(AssertionError, match=r"puts out \(1, 32\), the encoder \(3, 32\)"):
        export.compare(form, tmp_path, backbone, "mean")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onnx", "out": "model.bin"}, r"out: onnx writes a file that ends in \.onnx"),
        ({"format": "timm", "pooling": "mean"}, "pooling: is for onnx and torch"),
        ({"out": "there"}, "out: .*there.* exists"),
        ({"format": "onnx", "out": "beside.onnx"}, r"out: .*beside\.onnx\.md.* exists"),
        ({"out": "file/folder"}, "out: cannot write"),
        ({"out": "."}, "out: "),
        ({"checkpoint": "nowhere"}, "checkpoint: .*nowhere.* does not exist"),
    ],
)
def test_wrong_inputs(options, message, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    for name in ("beside.onnx.md", "file"):
        (tmp_path / name).touch()
    config = ExportConfig(str(trained), "timm", "new")
    for name, value in options.items():
        object.__setattr__(config, name, value)  # past the type checker of the tests, which a user has not
    with pytest.raises(InputError, match=message):
        export.run(config)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["beside.onnx.md", "file", "there"]


def test_a_class_token_that_is_not_there(tmp_path):
    run = random_run(tmp_path / "run", encoder="vit_wee_patch16_reg1_gap_256")
    with pytest.raises(InputError, match="pooling: 'class' needs a class token"):
        write(run, tmp_path, "torch", pooling="class")


@pytest.mark.parametrize(("form", "package"), [("hf", "transformers"), ("onnx", "onnxscript")])
def test_a_missing_package_is_named_before_any_work(form, package, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(InputError, match=rf"format: '{form}' needs {package}; pip install .*{package}>="):
        write("nowhere", tmp_path, form)


def test_torchrun_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        write(trained, tmp_path, "timm")


# ------------------------------------------------------------------------------------------------- card, command line


def test_model_card(tmp_path):
    run = random_run(tmp_path / "photos", data="/home/jane/secret/list.txt")
    (run / "evaluate").mkdir()
    knn = {"top1": 41.25, "num_val": 1000, "untrained_top1": 12.5, "by_group": {"a": {"auroc": 0.123}}, "flag": True}
    (run / "evaluate" / "knn.json").write_text(json.dumps(knn))
    write(run, tmp_path, "timm")
    card = (tmp_path / "timm" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] is None
    assert header["library_name"] == "timm"
    for line in (
        "# photos", "| knn | top1 | 41.25 |", "| knn | num_val | 1,000 |", "| pretrain | reconstruction_loss | 0.75 |",
        "`list.txt`", "12 optimizer steps of 8 images, seed 0", "| model.encoder_width | 32 |",
        "Trained with hardpatch",
        'timm.create_model("local-dir:timm", pretrained=True)', "32x32 pixels, 3 channels",
    ):  # fmt: skip
        assert line in card
    assert "jane" not in card
    assert "0.123" not in card
    assert card.count("\n| knn |") + card.count("\n| pretrain |") <= 10
    assert "None" not in card


def test_each_file_has_a_card_of_its_own(trained, tmp_path):
    for form, name in (("onnx", "bb.onnx"), ("torch", "bb.pt2")):
        assert export.run(ExportConfig(str(trained), form, str(tmp_path / name))).card == str(tmp_path / f"{name}.md")


def test_command(trained, tmp_path, capsys):
    out = tmp_path / "backbone"
    with pytest.raises(SystemExit) as stopped:
        main(["export", "--checkpoint", str(trained), "--format", "timm", "--out", str(out), "--json"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert f"local-dir:{out}" in printed
    figures = json.loads(printed.splitlines()[-1])
    assert figures["format"] == "timm"
    assert figures["max_difference"] <= figures["tolerance"]
    assert figures["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    with pytest.raises(SystemExit) as stopped:
        main(["export", "--checkpoint", str(trained), "--format", "timm", "--out", str(out)])
    assert stopped.value.code == 2


def test_a_checkpoint_file_knows_its_run(trained):
    found = read_backbone(trained / "checkpoints" / "step_00000012.pt")
    assert found.config == tiny_config()
    assert found.run.path == trained
    assert found.step == 12


@pytest.fixture(scope="module")
def classifier(trained):
    """A fine-tuned classifier of a run, whose last norm and head are far from their start; and its scores."""
    folder = trained / "finetune"
    folder.mkdir()
    model = build_classifier(
        timm_arguments(tiny_config()), hardpatch.load_encoder(trained), num_classes=3, drop_path=0.0, seed=0
    ).eval()
    with torch.no_grad():
        for parameter in (*model.fc_norm.parameters(), *model.head.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_classifier(folder / CLASSIFIER_FILE, model, timm_arguments(tiny_config()), ["ant", "bee", "cat"])
    images = pictures_and_images((3, 32, 32))[1]
    with torch.no_grad():
        return folder / CLASSIFIER_FILE, images, model(images)


@pytest.mark.parametrize("form", ["timm", "safetensors", "onnx", "torch"])
def test_a_fine_tuned_classifier_is_exported_with_its_last_norm_and_its_head(form, classifier, tmp_path):
    file, images, expected = classifier
    result = write(file if form != "timm" else file.parent, tmp_path, form)
    assert result.output == "scores"
    found: dict = {"images": images.numpy() if form == "onnx" else images}
    exec("\n".join(result.usage), found)
    np.testing.assert_allclose(np.asarray(found["features"].data), expected.numpy(), rtol=1e-4, atol=1e-4)
    assert "ant, bee, cat" in Path(result.card).read_text()
    if form == "timm":
        assert found["backbone"].pretrained_cfg["label_names"] == ["ant", "bee", "cat"]
    if form == "safetensors":
        assert torch.equal(hardpatch.load_classifier(result.out)(images), found["backbone"](images))
        assert hardpatch.load_classifier(result.out).pretrained_cfg["label_names"] == ["ant", "bee", "cat"]


def test_what_a_classifier_has_no_form_for_is_refused(classifier, tmp_path):
    with pytest.raises(InputError, match="fine-tuned classifier, which averages patch tokens"):
        write(classifier[0], tmp_path, "hf")
    with pytest.raises(InputError, match=r"pooling: .*is a fine-tuned classifier, which gives scores"):
        write(classifier[0], tmp_path, "torch", pooling="mean")
    with pytest.raises(InputError, match="is a fine-tuned classifier: load_classifier gives all of it"):
        hardpatch.load_encoder(classifier[0])
    with pytest.raises(InputError, match=r"is an encoder alone, .*no classifier"):
        hardpatch.load_classifier(write(classifier[0].parent.parent, tmp_path, "safetensors").out)
    assert not list(tmp_path.glob("*.pt2"))
