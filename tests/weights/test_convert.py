"""``hardpatch convert``: round trips are exact, what has no counterpart is refused, files are never lost."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hardpatch
from hardpatch.cli import main
from hardpatch.config.commands import ConvertConfig
from hardpatch.method.vit import encode
from hardpatch.runs.load import LoadedRun
from hardpatch.runtime.errors import InputError
from hardpatch.weights.convert import inferred_config, run
from hardpatch.weights.names import to_published
from places import SHARED
from tiny import TINY, pretrain, tiny_student

torch.set_num_threads(1)
FOLDER = Path(os.environ.get("HPM_REFERENCE_DIR", SHARED / "reference"))
CASES = sorted(FOLDER.glob("*.json"))
HEADS = ("--encoder-heads", 2, "--decoder-heads", 2)


def call(capsys, *words):
    """Exit code, standard output and standard error of ``hardpatch words``."""
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return left.value.code, captured.out, captured.err


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    pretrain(out=folder / "hpm", **TINY | {"data": "shapes:16", "target": "norm_pix"})
    pretrain(out=folder / "mae", **TINY | {"data": "shapes:16", "mask": "random", "predicted_loss": "none"})
    return folder


@pytest.mark.skipif(not CASES, reason=f"no reference numbers in {FOLDER}; set HPM_REFERENCE_DIR")
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_reference_weights_there_and_back(capsys, tmp_path, path):
    case, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    init, final, average = (
        {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        for prefix in ("init.", "final.", "final_ema.")
    )
    sizes, there, back = case["config"], tmp_path / "ours.pt", tmp_path / "back.pth"
    heads = ("--encoder-heads", sizes["num_heads"], "--decoder-heads", sizes["decoder_num_heads"])
    torch.save({"state_dict": {f"module.{name}": t for name, t in final.items()}, "ema_state_dict": average,
                "optimizer": {}, "epoch": 3, "loss_scaler": {}}, tmp_path / "theirs.pth")  # fmt: skip
    words = ("convert", "--from", tmp_path / "theirs.pth", "--to", there, *heads)
    if case["target"] == "feature":
        code, _, err = call(capsys, *words)
        assert code == 2
        assert "it was trained on another target, such as features" in err
        return
    assert call(capsys, *words)[0] == 0
    assert call(capsys, "convert", "--from", there, "--to", back)[0] == 0
    assert_same(load(back)["state_dict"], final)
    assert_same(load(back)["model"], final)
    assert_same(load(back)["ema_state_dict"], average)
    assert load(back)["epoch"] == 3
    torch.save({"model": init}, tmp_path / "theirs.pth")
    assert call(capsys, *words, "--force")[0] == 0
    scores = hardpatch.load_teacher(there).predict_loss(tensors["images"])
    torch.testing.assert_close(scores, tensors["teacher_loss_prediction"], rtol=1e-5, atol=1e-5)


def test_a_run_there_and_back_and_what_is_said(capsys, finished, tmp_path):
    theirs, ours = tmp_path / "theirs.pth", tmp_path / "ours.pt"
    code, out, _ = call(capsys, "convert", "--from", finished / "hpm", "--to", theirs, "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1]) | {"to": ""} == {
        "to": "", "kind": "published", "parts": ["encoder", "reconstructor", "predictor"],
        "teacher": "moving average", "encoder": "vit_tiny_patch16_224", "encoder_heads": 2, "decoder_heads": 2,
        "image_size": [32, 32], "patch_size": 8, "tensors": 54, "left_aside": [],
    }  # fmt: skip
    assert "use:   import torch" in out
    assert set(load(theirs)) == {"state_dict", "model", "ema_state_dict", "epoch"}
    assert load(theirs)["epoch"] == 2
    words = ("convert", "--from", theirs, "--to", ours, "--target", "norm_pix", *HEADS)
    code, out, _ = call(capsys, *words)
    assert code == 0
    assert f"next:  hardpatch visualize --checkpoint {ours}" in out
    saved = load(finished / "hpm/checkpoints/last")
    assert_same(load(ours)["student"], saved["student"])
    assert_same(load(ours)["teacher"], saved["teacher"])
    images = torch.randn(2, 3, 32, 32)
    for loader in (hardpatch.load_encoder, hardpatch.load_teacher):
        model, original = loader(ours), loader(finished / "hpm")
        assert_same(model.state_dict(), original.state_dict())
    assert torch.equal(hardpatch.load_encoder(ours)(images), hardpatch.load_encoder(finished / "hpm")(images))
    assert LoadedRun(ours).config.method.target == "norm_pix"
    figure = tmp_path / "hard.png"
    words = ("visualize", "--checkpoint", ours, "--images", "shapes:4", "--count", 2, "--out", figure)
    assert call(capsys, *words)[0] == 0
    assert figure.stat().st_size > 5000


def test_a_published_file_without_average_gets_a_copy(capsys, tmp_path):
    torch.save({"model": to_published(tiny_student().state_dict())}, tmp_path / "a.pth")
    code, out, _ = call(capsys, "convert", "--from", tmp_path / "a.pth", "--to", tmp_path / "a.pt", *HEADS)
    assert code == 0
    assert "copy of the student" in out
    assert_same(load(tmp_path / "a.pt")["student"], load(tmp_path / "a.pt")["teacher"])


def test_without_loss_predictor_it_is_the_layout_of_mae(capsys, finished, tmp_path):
    assert call(capsys, "convert", "--from", finished / "mae", "--to", tmp_path / "mae.pth")[0] == 0
    content = load(tmp_path / "mae.pth")
    assert set(content) == {"model", "state_dict", "epoch"}, "a teacher that nobody asked is not written"
    assert not any("losspred" in name for name in content["model"])
    assert call(capsys, "convert", "--from", tmp_path / "mae.pth", "--to", tmp_path / "mae.pt", *HEADS)[0] == 0
    run = LoadedRun(tmp_path / "mae.pt")
    assert (run.config.method.mask, run.config.method.predicted_loss) == ("random", "none")
    assert_same(run.student.state_dict(), load(finished / "mae/checkpoints/last")["student"])
    images = ("--images", "shapes:4", "--count", 2, "--out", tmp_path / "hard.png")
    assert call(capsys, "visualize", "--checkpoint", tmp_path / "mae.pt", *images)[0] == 0


@pytest.mark.parametrize("source", ["run", "published"])
def test_the_encoder_alone(capsys, finished, tmp_path, source):
    path = finished / "hpm"
    if source == "published":
        assert call(capsys, "convert", "--from", path, "--to", tmp_path / "x.pth")[0] == 0
        path = tmp_path / "x.pth"
    words = ("convert", "--from", path, "--to", tmp_path / "new" / "encoder.safetensors", *HEADS)
    code, out, _ = call(capsys, *words)
    assert code == 0
    assert "hardpatch.load_encoder(" in out
    encoder = hardpatch.load_encoder(tmp_path / "new" / "encoder.safetensors")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encode(encoder, images), encode(hardpatch.load_encoder(finished / "hpm"), images))
    assert encoder.pretrained_cfg["mean"] == [0.485, 0.456, 0.406]


def test_a_full_size_vit_b_there_and_back_is_bit_identical(tmp_path):
    from hardpatch.config.config import Config
    from hardpatch.runs.build import build_student

    with torch.device("meta"):
        shapes = to_published(build_student(Config()).state_dict())
    state = {
        name: torch.arange(tensor.numel()).float().view(tensor.shape) + k
        for k, (name, tensor) in enumerate(shapes.items())
    }  # every value of a tensor differs, and every tensor from those of its shape
    state["decoder_pos_embed"][:, 0] = 0
    torch.save({"model": state}, tmp_path / "published.pth")
    there = run(ConvertConfig(source=str(tmp_path / "published.pth"), to=str(tmp_path / "ours.pt")))
    assert there.encoder == "vit_base_patch16_224"
    assert (there.encoder_heads, there.decoder_heads, there.image_size) == (12, 16, (224, 224))
    assert (tmp_path / "ours.pt").stat().st_size < 1.01 * (tmp_path / "published.pth").stat().st_size, "stored once"
    (tmp_path / "published.pth").unlink()
    run(ConvertConfig(source=str(tmp_path / "ours.pt"), to=str(tmp_path / "back.pth")))
    back = load(tmp_path / "back.pth")
    assert_same(back["model"], state)
    assert_same(back["ema_state_dict"], state)


def test_heads_and_grid_come_from_hugging_faces_config(capsys, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
    )  # fmt: skip
    transformers.ViTMAEForPreTraining(config).save_pretrained(tmp_path / "hf")
    code, out, _ = call(capsys, "convert", "--from", tmp_path / "hf", "--to", tmp_path / "a.pt", "--json")
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert (result["encoder_heads"], result["decoder_heads"], result["image_size"]) == (4, 2, [32, 32])


@pytest.mark.parametrize(("width", "depth", "patch", "name"), [
    (192, 12, 16, "vit_tiny_patch16_224"), (384, 12, 16, "vit_small_patch16_224"),
    (1024, 24, 16, "vit_large_patch16_224"), (1280, 32, 14, "vit_huge_patch14_224"),
    (768, 12, 8, "vit_base_patch16_224"), (1280, 2, 16, "vit_base_patch16_224"),
])  # fmt: skip
def test_the_timm_model_is_chosen_by_the_shapes(width, depth, patch, name):
    from hardpatch.config.config import Config
    from hardpatch.config.values import with_fields
    from hardpatch.runs.build import build_student
    from hardpatch.weights.read import Weights

    sizes = {
        "encoder_width": width,
        "encoder_depth": depth,
        "patch_size": patch,
        "encoder_heads": 16,
        "image_size": 112,
    }
    with torch.device("meta"):
        state = build_student(with_fields(Config(), sizes)).state_dict()
    weights = Weights("", state, None, None, (112 // patch, 112 // patch), None, None, 0, ())
    config = inferred_config(weights, ConvertConfig(source="", to=""))
    assert config.model.encoder == name
    assert (config.model.encoder_width is None) == (name != "vit_base_patch16_224")
    assert config.model.encoder_heads in (None, 16 if width == 1280 else 12)
    with torch.device("meta"):
        assert {n: t.shape for n, t in build_student(config).state_dict().items()} == {
            n: t.shape for n, t in state.items()
        }


# What is refused


def published(path, **changes):
    torch.save({"model": to_published(tiny_student(**changes).state_dict())}, path)
    return path


def test_files_are_not_overwritten_without_force(capsys, finished, tmp_path):
    to = tmp_path / "x.pth"
    to.write_text("precious")
    code, _, err = call(capsys, "convert", "--from", finished / "hpm", "--to", to)
    assert code == 2
    assert "exists; --force replaces it" in err
    assert to.read_text() == "precious"
    assert call(capsys, "convert", "--from", finished / "hpm", "--to", to, "--force")[0] == 0
    (tmp_path / "folder.pth").mkdir()
    assert (
        "a folder" in call(capsys, "convert", "--from", finished / "hpm", "--to", tmp_path / "folder.pth", "--force")[2]
    )


def test_a_failed_write_leaves_the_old_file(capsys, finished, tmp_path, monkeypatch):
    to = tmp_path / "x.pth"
    to.write_text("precious")

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    code, _, err = call(capsys, "convert", "--from", finished / "hpm", "--to", to, "--force")
    assert code == 2
    assert "disk is full" in err
    assert to.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


@pytest.mark.parametrize(("words", "message"), [
    (("--to", "x.bin"), "to: must end in .pt, .safetensors, .pth, got"),
    (("--to", "x.pt"), "encoder_heads: cannot be told for an encoder of width 32; give --encoder-heads"),
    (("--to", "x.pt", "--encoder-heads", 2), "decoder_heads: cannot be told for decoders 32 wide"),
    (("--to", "x.pt", "--encoder-heads", 5, "--decoder-heads", 2), "encoder: timm cannot build"),
    (("--to", "x.pt", *HEADS, "--image-size", 64), "encoder.pos_embed: (1, 17, 32), wanted (1, 65, 32)"),
])  # fmt: skip
def test_what_cannot_be_told_is_asked_for(capsys, tmp_path, words, message):
    path = published(tmp_path / "theirs.pth")
    words = [tmp_path / word if str(word).startswith("x.") else word for word in words]
    code, _, err = call(capsys, "convert", "--from", path, *words)
    assert code == 2
    assert message in " ".join(err.split())
    assert [file.name for file in tmp_path.iterdir()] == ["theirs.pth"]


def test_other_channels_need_their_statistics(capsys, tmp_path):
    path = published(tmp_path / "theirs.pth", channels=5, image_size=(16, 32))
    words = ("convert", "--from", path, "--to", tmp_path / "x.pt", *HEADS)
    assert "how images of 5 channels were normalised" in call(capsys, *words)[2]
    statistics = ("--mean", *[0.4] * 5, "--std", *[0.2] * 5)
    assert call(capsys, *words, *statistics)[0] == 0
    assert LoadedRun(tmp_path / "x.pt").config.data.size == (16, 32), "the grid is seen in the sin-cos table"


def test_a_learnt_table_that_is_not_square_needs_the_size(capsys, tmp_path):
    state = to_published(tiny_student(image_size=(24, 40)).state_dict())
    state |= {"pos_embed": torch.randn(1, 16, 32)}
    torch.save(state, tmp_path / "theirs.pth")
    words = ("convert", "--from", tmp_path / "theirs.pth", "--to", tmp_path / "x.pt", *HEADS)
    assert "give --image-size HEIGHT WIDTH" in call(capsys, *words)[2]
    assert call(capsys, *words, "--image-size", 24, 40)[0] == 0
    assert LoadedRun(tmp_path / "x.pt").config.data.size == (24, 40)


def test_damaged_tensors_are_named(capsys, tmp_path):
    state = to_published(tiny_student().state_dict())
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(3, 3)
    del state["norm.bias"], state["decoder_blocks.0.norm1.bias"]
    torch.save(state, tmp_path / "theirs.pth")
    code, _, err = call(capsys, "convert", "--from", tmp_path / "theirs.pth", "--to", tmp_path / "x.pt", *HEADS)
    assert code == 2
    assert err.splitlines()[1:] == [
        "  encoder.blocks.0.mlp.fc1.weight: (3, 3), wanted (128, 32)",
        "  encoder.norm.bias: missing, wanted (32,)",
        "  reconstructor.blocks.0.norm1.bias: missing, wanted (32,)",
    ]


def test_an_encoder_alone_is_no_checkpoint(capsys, tmp_path):
    save_file(tiny_student().encoder.state_dict(), tmp_path / "encoder.safetensors")
    for to in ("x.pt", "x.pth"):
        code, _, err = call(
            capsys, "convert", "--from", tmp_path / "encoder.safetensors", "--to", tmp_path / to, *HEADS
        )
        assert code == 2
        assert "holds an encoder without reconstructor" in err


def ours(path, **changes):
    """A checkpoint of a random student of ours."""
    from dataclasses import asdict

    from tiny import tiny_config

    config = asdict(tiny_config(**{name: value for name, value in changes.items() if name != "method"}))
    config["method"] |= changes.get("method", {})
    state = tiny_student(**{name: value for name, value in changes.items() if name != "method"}).state_dict()
    torch.save({"student": state, "teacher": state, "config": config, "step": 1}, path)
    return path


@pytest.mark.parametrize(("changes", "message"), [
    ({"encoder": "vit_wee_patch16_reg1_gap_256"}, "prefix tokens"),
    ({"encoder": "vit_base_patch16_siglip_224"}, "has 0 prefix tokens, not one class token"),
    ({"encoder": "vit_small_patch14_dinov2"}, "no counterpart of encoder.blocks.0.ls1.gamma"),
    ({"encoder": "vit_base_patch16_clip_quickgelu_224"}, "computes with QuickGELU"),
    ({"encoder": "vit_base_patch16_clip_224"}, "computes with GELU.*eps=1e-05"),
    ({"decoder": "cross"}, "decoders are of self-attention"),
    ({"method": {"target": "hog"}}, "its reconstructor's target is 'hog', not pixels"),
])  # fmt: skip
def test_what_has_no_published_counterpart_is_refused(tmp_path, changes, message):
    path = ours(tmp_path / "ours.pt", **changes)
    with pytest.raises(InputError, match=f"from: .*ours.pt' has no published counterpart: .*{message}"):
        run(ConvertConfig(source=str(path), to=str(tmp_path / "x.pth")))
    assert not (tmp_path / "x.pth").exists()


def test_ours_to_ours_is_refused(finished, tmp_path):
    with pytest.raises(InputError, match="is hardpatch's own already"):
        run(ConvertConfig(source=str(finished / "hpm"), to=str(tmp_path / "x.pt")))
