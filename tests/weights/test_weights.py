"""Reading weights: the same tensors, whoever wrote them and however; and what is refused."""

import argparse
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from hardpatch.method.masks import split_patches
from hardpatch.method.student import Teacher
from hardpatch.method.vit import encode, sincos_positions
from hardpatch.runtime.errors import InputError
from hardpatch.weights.adapt import start_from
from hardpatch.weights.names import from_hugging_face, from_published, to_published
from hardpatch.weights.read import read_pickle, read_weights, table_grid
from tiny import TINY, pretrain, tiny_config, tiny_student

torch.set_num_threads(1)


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def prefixed(state, prefix="module."):
    return OrderedDict((prefix + name, tensor) for name, tensor in state.items())


STUDENT, AVERAGE = tiny_student(1).state_dict(), tiny_student(2).state_dict()
PUBLISHED, PUBLISHED_AVERAGE = to_published(STUDENT), to_published(AVERAGE)
BESIDES = {
    "epoch": 7,
    "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
    "scaler": {"scale": 65536.0, "growth_tracker": 0},
    "args": argparse.Namespace(
        lr=np.float64(0.1), best=np.float32(2), out=Path("x"), seed=np.int64(1), history=np.arange(3.0),
        device=torch.device("cpu"), none=None,
    ),
}  # fmt: skip
LAYOUTS = {  # content, is there a teacher
    "bare": (PUBLISHED, False),
    "DDP": (prefixed(PUBLISHED), False),
    "compiled DDP": (prefixed(PUBLISHED, "_orig_mod.module."), False),
    "parameters": ({name: torch.nn.Parameter(tensor) for name, tensor in PUBLISHED.items()}, False),
    "MAE": ({"model": PUBLISHED} | BESIDES, False),
    "HPM": (
        {"state_dict": prefixed(PUBLISHED), "ema_state_dict": PUBLISHED_AVERAGE, "loss_scaler": {}} | BESIDES,
        True,
    ),
    "module": ({"module": PUBLISHED}, False),
    "ours": (STUDENT, False),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_layout_gives_the_same_tensors(tmp_path, layout, zipped):
    content, with_teacher = LAYOUTS[layout]
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    weights = read_weights(tmp_path / "x.pth")
    assert_same(weights.student, STUDENT)
    assert (weights.teacher is not None) == with_teacher
    if with_teacher:
        assert_same(weights.teacher, AVERAGE)
    assert weights.epoch == (7 if "epoch" in content else 0)
    assert weights.has("reconstructor")
    assert weights.has("predictor")


def test_mae_without_predictor_encoder_alone_and_classifier(tmp_path):
    mae = {name: tensor for name, tensor in PUBLISHED.items() if "losspred" not in name}
    torch.save({"model": mae}, tmp_path / "mae.pth")
    weights = read_weights(tmp_path / "mae.pth")
    assert weights.has("reconstructor")
    assert not weights.has("predictor")
    encoder = {name.removeprefix("encoder."): t for name, t in STUDENT.items() if name.startswith("encoder.")}
    for head in ({}, {"head.weight": torch.ones(2, 32), "head.bias": torch.ones(2)}):
        save_file(encoder | head, tmp_path / "encoder.safetensors")
        weights = read_weights(tmp_path / "encoder.safetensors")
        assert_same(weights.student, {name: t for name, t in STUDENT.items() if name.startswith("encoder.")})
        assert set(weights.left_aside) == set(head)
        assert not weights.has("reconstructor")


def test_half_precision_is_read_as_float32(tmp_path):
    torch.save({name: tensor.bfloat16() for name, tensor in PUBLISHED.items()}, tmp_path / "x.pth")
    assert_same(read_weights(tmp_path / "x.pth").student, {n: t.bfloat16().float() for n, t in STUDENT.items()})


# Hugging Face, with transformers as the oracle

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 32,
    "patch_size": 8, "layer_norm_eps": 1e-6,
}  # fmt: skip
SAME_SIZES = {"encoder_depth": 2, "encoder_heads": 4, "decoder_width": 16, "decoder_depth": 3, "decoder_heads": 4}


def randomised(model):
    """Random values everywhere, so that no tensor can be mistaken for another; the decoder's class row stays zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            if name.endswith("decoder_pos_embed"):
                parameter[:, 0] = 0
    return model.eval()


@pytest.fixture(scope="module")
def vit_mae():
    transformers = pytest.importorskip("transformers")
    return randomised(
        transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(
                **SIZES, decoder_hidden_size=16, decoder_num_hidden_layers=3, decoder_num_attention_heads=4,
                decoder_intermediate_size=64,
            )
        )
    )  # fmt: skip


def as_version_4(state):
    """The decoder's blocks as transformers 4 named them, which the published files have."""
    return {name.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers."): t for name, t in state.items()}


@pytest.mark.parametrize("form", ["safetensors", "bin in memory", "bin of version 4", "one file"])
def test_hugging_face_features_and_reconstruction(tmp_path, vit_mae, form):
    vit_mae.save_pretrained(tmp_path)
    source = tmp_path
    if form.startswith("bin"):
        state = (
            vit_mae.state_dict() if form == "bin in memory" else as_version_4(load_file(tmp_path / "model.safetensors"))
        )
        (tmp_path / "model.safetensors").unlink()
        torch.save(state, tmp_path / "pytorch_model.bin")
    elif form == "one file":
        source = tmp_path / "model.safetensors"
    config = tiny_config(init_from=str(source), **SAME_SIZES)
    student = tiny_student(**SAME_SIZES)
    start_from(config, student, Teacher(student))

    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    hidden = torch.rand(2, 16, generator=torch.Generator().manual_seed(2)).argsort(1) >= 4
    visible_index, hidden_index = split_patches(hidden, 12)
    with torch.no_grad():
        noise = hidden + torch.arange(16) / 100  # theirs sorts by noise: visible first, in image order
        theirs = vit_mae(images, noise=noise)
        features = vit_mae.vit(images, noise=noise).last_hidden_state
        output = student(images, hidden, num_hidden=12)
    assert torch.equal(theirs.mask.bool(), hidden)
    torch.testing.assert_close(encode(student.encoder, images, visible_index), features, rtol=1e-5, atol=1e-5)
    expected = theirs.logits.gather(1, hidden_index.unsqueeze(-1).expand(-1, -1, 192))
    torch.testing.assert_close(output.prediction, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["ViTMAEModel", "ViTModel"])
def test_hugging_face_encoder_alone(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, kind)(getattr(transformers, kind.replace("Model", "Config"))(**SIZES))
    randomised(model).save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    assert (weights.encoder_heads, weights.grid) == (4, (4, 4))
    student = tiny_student(**SAME_SIZES)
    assert not weights.has("reconstructor")
    student.load_state_dict(weights.student, strict=False)
    images = torch.randn(2, 3, 32, 32)
    noise = {"noise": torch.arange(16.0).expand(2, -1)} if kind == "ViTMAEModel" else {}
    if noise:
        model.config.mask_ratio = 0.0
    with torch.no_grad():
        expected = model(images, **noise).last_hidden_state
        torch.testing.assert_close(encode(student.encoder, images), expected, rtol=1e-5, atol=1e-5)


def test_hugging_face_models_that_compute_otherwise_are_refused(tmp_path, vit_mae):
    vit_mae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(InputError, match="hidden_act: must be 'gelu'"):
        read_weights(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json beside it cannot be read"):
        read_weights(tmp_path)
    with pytest.raises(InputError, match="has no q of query, key and value"):
        from_hugging_face({n: t for n, t in vit_mae.state_dict().items() if n != "vit.layers.1.attention.q_proj.bias"})


# timm


@pytest.mark.parametrize("form", ["folder", "timm:local-dir:"])
def test_timm_folder(tmp_path, form):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes)
    save_for_hf(model, tmp_path, model_args=sizes, safe_serialization=True)
    weights = read_weights(str(tmp_path) if form == "folder" else f"timm:local-dir:{tmp_path}")
    expected = {f"encoder.{n}": t for n, t in model.state_dict().items() if not n.startswith("head.")}
    assert_same(weights.student, expected)
    if form != "folder":
        assert (weights.encoder_heads, weights.grid) == (4, (4, 4))


@pytest.mark.parametrize("name", ["timm:vit_enormous", "timm:resnet18.nothing", "timm:local-dir:/nowhere"])
def test_what_timm_cannot_load_is_refused(name):
    with pytest.raises(InputError, match=f"weights: '{name}': timm cannot load it"):
        read_weights(name)


# Ours


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    values = {name: value for name, value in TINY.items() if name != "data"}
    out = tmp_path_factory.mktemp("runs")
    pretrain("shapes:16", out / "hpm", **values | {"epochs": 1})
    pretrain("shapes:16", out / "mae", **values | {"epochs": 1, "mask": "random", "predicted_loss": "none"})
    return out


def test_our_runs_checkpoints_and_weights(finished):
    saved = torch.load(finished / "hpm/checkpoints/last", weights_only=True)
    for source in ("hpm", "hpm/checkpoints", "hpm/checkpoints/step_00000002.pt", "hpm/checkpoints/last"):
        weights = read_weights(finished / source)
        assert_same(weights.student, saved["student"])
        assert_same(weights.teacher, saved["teacher"])
        assert (weights.grid, weights.encoder_heads, weights.decoder_heads) == ((4, 4), 2, 2)
    weights = read_weights(finished / "hpm/checkpoints/weights.safetensors")
    assert_same(weights.student, {n: t for n, t in saved["student"].items() if n.startswith("encoder.")})


def test_a_teacher_that_nobody_asked_has_learnt_nothing(finished):
    """Without predicted loss and guided masks the teacher is never updated: what is saved is the random start."""
    assert read_weights(finished / "mae").teacher is None


def test_a_damaged_checkpoint_of_ours_is_refused(finished, tmp_path):
    file = tmp_path / "step_00000002.pt"
    content = bytearray((finished / "hpm/checkpoints/step_00000002.pt").read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    digest = (finished / "hpm/checkpoints/step_00000002.pt.sha256").read_text()
    file.with_name("step_00000002.pt.sha256").write_text(digest)
    with pytest.raises(InputError, match="checksum does not fit"):
        read_weights(file)


# What is refused


class Attack:
    """Runs a command when unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("where", ["args", "state_dict", "inside args"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_pickle_is_refused_by_name_and_not_run(tmp_path, form, where):
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    attack = Attack(f"touch {trace}")
    content = {"state_dict": PUBLISHED, "args": None} | {where: attack}
    if where == "inside args":
        content["args"] = argparse.Namespace(lr=attack)
    if form == "pickle":
        path.write_bytes(pickle.dumps({"args": content["args"] or attack}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(InputError, match=r"evil\.pth': refused: loading it would call (posix|nt)\.system"):
        read_weights(path)
    assert not trace.exists()


def test_what_is_harmless_is_not_built_either(tmp_path):
    torch.save({"model": PUBLISHED, "args": argparse.Namespace(a=Path("/etc"))}, tmp_path / "x.pth")
    assert type(read_pickle(tmp_path / "x.pth")["args"]) not in (argparse.Namespace, dict)
    torch.save({"model": PUBLISHED, "fractions": __import__("fractions").Fraction(1, 2)}, tmp_path / "y.pth")
    with pytest.raises(InputError, match=r"y\.pth': refused: loading it would call fractions\.Fraction"):
        read_weights(tmp_path / "y.pth")


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, name, share):
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save(PUBLISHED, path)
    else:
        save_file(PUBLISHED, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=rf"weights: .*{name}': damaged"):
        read_weights(path)


@pytest.mark.parametrize(("content", "message"), [
    ([1, 2], "with a list in it, no weights"),
    ({"epoch": 1, "best": 0.5}, r"no tensors but epoch \(int\), best \(float\)"),
    ({"layer1.0.conv1.weight": torch.zeros(1)}, "holds no ViT: no patch_embed.proj.weight among layer1.0.conv1.weight"),
    ({}, "holds no ViT: .* among nothing"),
    (PUBLISHED | {"decoder_foo": torch.zeros(1), "rope": torch.zeros(1)}, "no parameter decoder_foo, rope"),
    (PUBLISHED | {"norm.weight": torch.full((32,), torch.nan)}, "not every value is finite in norm.weight"),
    (PUBLISHED | {"decoder_pos_embed": torch.ones(1, 17, 32)}, "a class token that has a position"),
    (PUBLISHED | {"patch_embed.proj.weight": torch.ones(32, 192)}, r"must be \(width, channels, height, width\)"),
])  # fmt: skip
def test_what_holds_no_such_weights_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(InputError, match=message):
        read_weights(tmp_path / "x.pth")


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match=r"weights: .*nowhere': does not exist"):
        read_weights(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no checkpoints; nor does it hold .*model\.safetensors"):
        read_weights(tmp_path)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(InputError, match=r"text\.pth': damaged, cut short, or no file of torch.save"):
        read_weights(tmp_path / "text.pth")


def test_names_without_counterpart_are_refused():
    with pytest.raises(InputError, match=r"no counterpart of encoder\.reg_token, encoder\.blocks\.0\.ls1\.gamma"):
        to_published(STUDENT | {"encoder.reg_token": torch.zeros(1), "encoder.blocks.0.ls1.gamma": torch.zeros(1)})
    assert_same(from_published(to_published(STUDENT)), STUDENT)


@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (8, 2), (1, 16), (3, 5), (14, 14)])
def test_the_grid_of_a_sincos_table_is_seen(grid):
    assert table_grid(sincos_positions(grid, 32)) == grid


def test_the_grid_of_a_learnt_table_is_taken_for_square():
    assert table_grid(torch.randn(16, 32)) == (4, 4)
    assert table_grid(torch.randn(15, 32)) is None
