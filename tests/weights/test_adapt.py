"""Starting a run from weights: what fits is taken exactly, sizes are adapted by timm's rules, the rest is said."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models._manipulate import adapt_input_conv

import hardpatch
from hardpatch.method.student import Teacher
from hardpatch.method.vit import encode, patchify, unpatchify
from hardpatch.runs.load import LoadedRun
from hardpatch.runtime.errors import InputError, Interrupted
from hardpatch.runtime.log import read_metrics
from hardpatch.training.reporting import Reporter
from hardpatch.weights.adapt import fit, inflate_channels, resample_pixel_head, start_from
from hardpatch.weights.names import to_published
from hardpatch.weights.read import read_weights
from tiny import TINY, assert_same_state, final_state, pretrain, tiny_config, tiny_student

torch.set_num_threads(1)
POSITIONS = ("encoder.pos_embed", "positions")


def published_file(folder, seed=1, *, average=True, **changes):
    """A published file of a random student, and the student and the average in it."""
    student, teacher = tiny_student(seed, **changes), tiny_student(seed + 1, **changes)
    content = {"state_dict": to_published(student.state_dict())}
    if average:
        content["ema_state_dict"] = to_published(teacher.state_dict())
    torch.save(content, folder / "published.pth")
    return folder / "published.pth", student, teacher


def started(path, **changes):
    """A fresh student and teacher after ``init_from``, and what was said."""
    student = tiny_student(99, **changes)
    teacher = Teacher(student)
    said = start_from(tiny_config(init_from=str(path), **changes), student, teacher)
    return student.state_dict(), teacher.model.state_dict(), said


def differing(a, b):
    return [name for name in a if a[name].shape != b[name].shape or not torch.equal(a[name], b[name])]


def test_the_same_sizes_are_taken_exactly_student_and_average_apart(tmp_path):
    path, student, average = published_file(tmp_path)
    mine, teachers, said = started(path)
    assert differing(mine, student.state_dict()) == []
    assert differing(teachers, average.state_dict()) == []
    assert "encoder, decoder input, reconstructor, loss predictor" in said
    assert "the file's moving average" in said
    assert "fresh" not in said


def test_without_average_the_teacher_is_the_student(tmp_path):
    path, student, _ = published_file(tmp_path, average=False)
    _, teachers, said = started(path)
    assert differing(teachers, student.state_dict()) == []
    assert "teacher: a copy of the student" in said


# Other image sizes


@pytest.mark.parametrize(("old", "new"), [((4, 4), (6, 3)), ((2, 8), (4, 4)), ((3, 5), (5, 3)), ((4, 4), (8, 8))])
def test_position_tables_are_resampled_in_two_dimensions_as_timm_does(tmp_path, old, new):
    """(2, 8) and (4, 4) have as many positions: the grid counts, not the number."""
    path, student, average = published_file(tmp_path, image_size=(old[0] * 8, old[1] * 8))
    with torch.no_grad():
        student.encoder.pos_embed[:, 0] = 3.0
    torch.save(
        {"model": to_published(student.state_dict()), "ema_state_dict": to_published(average.state_dict())}, path
    )
    mine, teachers, said = started(path, image_size=(new[0] * 8, new[1] * 8))
    for state, source in ((mine, student.state_dict()), (teachers, average.state_dict())):
        assert set(differing(state, source)) == set(POSITIONS)
        for name, prefix in (("encoder.pos_embed", 1), ("positions", 0)):
            expected = resample_abs_pos_embed(source[name], list(new), list(old), num_prefix_tokens=prefix)
            assert torch.equal(state[name], expected)
    assert (mine["encoder.pos_embed"][:, 0] == 3).all()
    assert f"{old[0]}x{old[1]} -> {new[0]}x{new[1]} patches" in said


def test_timms_learnt_table_is_kept_and_stays_frozen(tmp_path):
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **sizes)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    student = tiny_student(9)
    said = start_from(tiny_config(init_from=str(tmp_path)), student, Teacher(student))
    assert torch.equal(student.encoder.pos_embed, source.pos_embed)
    assert not student.encoder.pos_embed.requires_grad
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encode(student.encoder, images), source.eval().forward_features(images))
    for part in ("decoder input (not in the file)", "reconstructor (the decoder input is)", "loss predictor ("):
        assert f"fresh: {part}" in said


def test_a_learnt_table_that_is_not_square_is_refused(tmp_path):
    state = tiny_student(image_size=(24, 40)).encoder.state_dict()
    save_file(state | {"pos_embed": torch.randn(1, 16, 32)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="cannot tell rows and columns of a learnt table of 15 positions"):
        started(tmp_path / "x.safetensors")


# Other channels and patch sizes


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 13])
def test_channels_are_inflated_as_timm_does(channels):
    weight = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(inflate_channels(weight, channels), adapt_input_conv(channels, weight.clone()))


def test_other_numbers_of_channels_keep_the_size_of_the_output():
    weight = torch.randn(5, 13, 8, 8)
    assert torch.equal(inflate_channels(weight, 1)[:, 0], weight.sum(1))
    assert torch.equal(inflate_channels(weight[:, :1], 4), weight[:, :1].expand(-1, 4, -1, -1) / 4)


@pytest.mark.parametrize("channels", [1, 6, 12])
def test_copied_channels_are_encoded_scored_and_reconstructed_as_the_originals(tmp_path, channels):
    """Exact where it can be: an image whose channels are copies (or for one channel: a grey one)."""
    path, source, _ = published_file(tmp_path)
    changes = {"channels": channels, "mean": (0.5,) * channels, "std": (0.5,) * channels}
    target = tiny_student(9, **changes)
    said = start_from(tiny_config(init_from=str(path), **changes), target, Teacher(target))
    images = torch.randn(2, 1, 32, 32).expand(-1, 3, -1, -1) if channels == 1 else torch.randn(2, 3, 32, 32)
    copied = images[:, :1] if channels == 1 else images.repeat(1, channels // 3, 1, 1)
    hidden = torch.rand(2, 16).argsort(1) >= 4
    with torch.no_grad():
        expected, actual = source(images, hidden, num_hidden=12), target(copied, hidden, num_hidden=12)
        torch.testing.assert_close(encode(target.encoder, copied), encode(source.encoder, images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(target.predict_loss(copied), source.predict_loss(images), rtol=1e-4, atol=1e-5)
    pixels = expected.prediction.reshape(2, 12, 64, 3)
    wanted = pixels.mean(-1, keepdim=True) if channels == 1 else pixels.repeat(1, 1, 1, channels // 3)
    torch.testing.assert_close(actual.prediction, wanted.flatten(2), rtol=1e-4, atol=1e-5)
    assert f"3 channels -> {channels}" in said
    assert "same scores" in said


def test_thirteen_channels(tmp_path):
    path, source, _ = published_file(tmp_path)
    mine, _, _ = started(path, channels=13)
    name = "encoder.patch_embed.proj.weight"
    torch.testing.assert_close(mine[name], adapt_input_conv(13, source.state_dict()[name].clone()))
    heads = {f"{part}.head.{kind}" for part in ("reconstructor", "predictor") for kind in ("weight", "bias")}
    assert set(differing(mine, source.state_dict())) == {name, *heads}


@pytest.mark.parametrize(("patch", "size"), [(4, 32), (16, 32), (16, 64)])
def test_other_patch_sizes_resample_the_embedding_as_timm_does(tmp_path, patch, size):
    path, source, _ = published_file(tmp_path)
    mine, _, said = started(path, patch_size=patch, image_size=size)
    name = "encoder.patch_embed.proj.weight"
    assert torch.equal(mine[name], resample_patch_embed(source.state_dict()[name], [patch, patch]))
    assert f"8x8 pixels -> {patch}x{patch}" in said
    score = source.state_dict()["predictor.head.weight"].mean(0)
    torch.testing.assert_close(mine["predictor.head.weight"].mean(0), score, rtol=1e-5, atol=1e-6)
    assert len(mine["predictor.head.weight"]) == patch * patch * 3


def test_the_pixel_head_puts_out_the_same_picture_resized():
    """A head whose bias is a picture: that picture, and for flat pictures any size gives it back."""
    picture = torch.rand(1, 3, 1, 1).expand(-1, -1, 8, 8).contiguous()
    head = patchify(picture, (8, 8))[0].T
    for after in ((4, 4), (16, 12)):
        out = resample_pixel_head(head, channels=(3, 3), patch=((8, 8), after))
        torch.testing.assert_close(unpatchify(out.T[None], after, (1, 1)), picture[..., :1, :1].expand(-1, -1, *after))
    picture = torch.rand(1, 3, 8, 4)
    head = patchify(picture, (8, 4))[0].T
    assert torch.equal(resample_pixel_head(head, channels=(3, 3), patch=((8, 4), (8, 4))), head)
    out = resample_pixel_head(head, channels=(3, 5), patch=((8, 4), (8, 4)))
    assert torch.equal(unpatchify(out.T[None], (8, 4), (1, 1)), picture[:, [0, 1, 2, 0, 1]])


# What is not taken


def test_mae_gives_all_but_the_loss_predictor(tmp_path):
    plain = {"mask": "random", "predicted_loss": "none"}
    path, source, _ = published_file(tmp_path, average=False, **plain)
    fresh = tiny_student(99).state_dict()
    mine, teachers, said = started(path)
    assert "fresh: loss predictor (not in the file)" in said
    assert differing(source.state_dict(), mine) == []
    assert all(torch.equal(mine[name], fresh[name]) for name in mine if name.startswith("predictor."))
    assert differing(mine, teachers) == []


def test_a_predictor_that_the_run_has_not_is_left_aside_and_said(tmp_path):
    path, _, _ = published_file(tmp_path)
    assert "loss predictor: not in this run" in started(path, mask="random", predicted_loss="none")[2]


def test_other_decoders_start_fresh_with_the_reason(tmp_path):
    path, source, _ = published_file(tmp_path)
    mine, _, said = started(path, decoder_width=16)
    assert "fresh: decoder input (decoder_embed.weight: (32, 32), wanted (16, 32)" in said
    assert "fresh: reconstructor (the decoder input is)" in said
    fresh = tiny_student(99, decoder_width=16).state_dict()
    assert all(torch.equal(mine[name], fresh[name]) for name in mine if not name.startswith("encoder."))
    mine, _, said = started(path, predictor_depth=2)
    assert "fresh: loss predictor (predictor.blocks.1." in said
    assert torch.equal(mine["reconstructor.head.weight"], source.reconstructor.head.weight)


def test_a_head_of_the_same_width_for_another_target_is_not_taken(tmp_path):
    """ViT-B's features and 16 x 16 x 3 pixels are 768 numbers each."""
    path, _, _ = published_file(tmp_path)
    weights, student = read_weights(path), tiny_student(9)

    def fresh(here, there, **changes):
        config, theirs = tiny_config(target=here, **changes), tiny_config(target=there, **changes) if there else None
        fitted = fit(weights._replace(config=theirs), weights.student, student, config)
        assert ("reconstructor.head.weight" in fitted.state) == (not fitted.fresh)
        return fitted.fresh

    assert fresh("pixels", None) == fresh("pixels", "norm_pix") == fresh("hog", "hog") == []
    assert fresh("tokens", "tokens", tokenizer="mine:codebook") == [], "the same tokenizer numbers them alike"
    for here, there in (("ema_features", None), ("pixels", "ema_features"), ("hog", "pixels"), ("tokens", "tokens")):
        assert fresh(here, there) == ["reconstructor's head (the file's is for another target)"]


@pytest.mark.parametrize(("changes", "lines"), [
    ({"encoder_width": 64}, ["encoder.cls_token: (1, 1, 32), wanted (1, 1, 64)", "and 13 more"]),
    ({"encoder_depth": 2, "image_size": 64}, ["encoder.blocks.1.norm1.weight: missing, wanted (32,)", "and 7 more"]),
    ({"encoder": "vit_wee_patch16_reg1_gap_256"}, ["encoder.reg_token: missing, wanted (1, 1, 32)"]),
])  # fmt: skip
def test_another_encoder_is_refused_with_the_first_mismatches(tmp_path, changes, lines):
    path, _, _ = published_file(tmp_path)
    with pytest.raises(InputError, match=r"init_from: .*holds another encoder than the run's") as caught:
        started(path, **changes)
    said = str(caught.value).splitlines()
    assert said[1].strip() == lines[0]
    assert [line for line in lines if line not in str(caught.value)] == []
    assert len(said) <= 7


def run(out, **changes):
    return pretrain(out=out, **TINY | changes)


def test_another_number_of_heads_is_refused_where_it_is_known(tmp_path):
    run(tmp_path / "first", epochs=1)
    with pytest.raises(InputError, match="encoder_heads: the file's encoder has 2, the run's 4"):
        started(tmp_path / "first", encoder_heads=4)
    said = started(tmp_path / "first", decoder_heads=4)[2]
    assert "fresh: reconstructor (2 attention heads in the file, 4 here)" in said


# Whole runs


def test_a_stopped_run_goes_on_exactly_without_the_file(tmp_path, monkeypatch):
    path, _, _ = published_file(tmp_path)
    changes = {"init_from": str(path), "image_size": (48, 24)}
    run(tmp_path / "whole", **changes)
    after_step = Reporter.after_step

    def stopping(self, meter):
        after_step(self, meter)
        if self.run.state.step == 5:
            self.run.save()
            raise Interrupted("test")

    monkeypatch.setattr(Reporter, "after_step", stopping)
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", **changes)
    monkeypatch.undo()
    path.unlink()
    run(tmp_path / "stopped", **changes)
    assert_same_state(final_state(tmp_path / "whole"), final_state(tmp_path / "stopped"))


def test_what_a_continued_run_leaves_has_its_position_table(tmp_path):
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **sizes)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    run(tmp_path / "run", init_from=str(tmp_path), image_size=(48, 24), epochs=1)
    expected = resample_abs_pos_embed(source.pos_embed, [6, 3], [4, 4])
    encoder, loaded = hardpatch.load_encoder(tmp_path / "run"), LoadedRun(tmp_path / "run")
    for vit in (encoder, loaded.student.encoder, loaded.teacher.model.encoder):
        torch.testing.assert_close(vit.pos_embed, expected, rtol=1e-6, atol=1e-6)
    images = torch.randn(2, 3, 48, 24)
    assert torch.equal(encoder.forward_features(images), loaded.student.encoder.forward_features(images))


def test_the_first_step_sees_the_weights(tmp_path):
    run(tmp_path / "long", epochs=6)
    run(tmp_path / "on", init_from=str(tmp_path / "long"), epochs=1, warmup_epochs=0.5, seed=3)
    run(tmp_path / "cold", epochs=1, warmup_epochs=0.5, seed=3)
    last = read_metrics(tmp_path / "long")[-1]["reconstruction_loss"]
    on, cold = (read_metrics(tmp_path / name)[0]["reconstruction_loss"] for name in ("on", "cold"))
    assert on < (last + cold) / 2, "nearer to where the long run ended than to a cold start"
    assert cold > 1.1 * last, "which is far away"


def test_a_bad_file_leaves_no_folder_and_an_old_run_alone(tmp_path):
    with pytest.raises(InputError, match=r"init_from: .*does not exist"):
        run(tmp_path / "new", init_from=str(tmp_path / "nowhere"))
    assert not (tmp_path / "new").exists()
    run(tmp_path / "old", epochs=1)
    before = final_state(tmp_path / "old")
    with pytest.raises(InputError, match="init_from"):
        pretrain(out=tmp_path / "old", resume="restart", **TINY | {"init_from": str(tmp_path / "nowhere")})
    assert_same_state(before, final_state(tmp_path / "old"))


def test_restart_may_start_from_the_run_that_it_clears(tmp_path):
    run(tmp_path / "run", epochs=1)
    pretrain(out=tmp_path / "run", resume="restart", **TINY | {"init_from": str(tmp_path / "run"), "epochs": 1})
    assert final_state(tmp_path / "run")["step"] == 6
