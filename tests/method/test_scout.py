"""The scout: what it computes, what it learns from, and that nothing else learns from it."""

import pytest
import torch

from hardpatch.config.config import Config
from hardpatch.config.values import validated, with_fields
from hardpatch.method.choices import guide_of
from hardpatch.method.hpm import HPM
from hardpatch.method.losses import rank_correlation, relative_loss
from hardpatch.method.scout import Scout
from hardpatch.method.vit import patch_variance, patchify
from hardpatch.runs.build import SCOUT_LEARNING_RATE, build_hpm, build_optimizer
from hardpatch.runs.load import LoadedRun, load_teacher
from hardpatch.runtime.errors import InputError
from tiny import TINY, assert_same_state, final_state, pretrain


def slowly(scout: Scout, image: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """The same for one image, patch by patch."""
    rows, columns = image.shape[1] // scout.patch[0], image.shape[2] // scout.patch[1]
    cells = patchify(image[None], scout.patch)[0]
    counted = torch.ones(rows * columns, dtype=torch.bool) if valid is None else valid
    features = [torch.nn.functional.gelu(scout.embed(cell)) for cell in cells]
    for layer in scout.layers:
        known = [feature for feature, counts in zip(features, counted) if counts]
        everywhere = torch.stack(known).mean(0)
        new = []
        for number, feature in enumerate(features):
            row, column = divmod(number, columns)
            near = [
                features[r * columns + c]
                for r in range(max(0, row - 1), min(rows, row + 2))
                for c in range(max(0, column - 1), min(columns, column + 2))
                if counted[r * columns + c]
            ]
            around = torch.stack(near).mean(0) if near else torch.zeros_like(feature)
            new.append(feature + torch.nn.functional.gelu(layer(torch.cat([feature, around, everywhere]))))
        features = new
    return torch.cat([scout.head(feature) for feature in features])


@pytest.mark.parametrize("holes", [False, True])
def test_scores_are_those_of_the_slow_twin(holes):
    torch.manual_seed(0)
    scout, images = Scout((4, 8), channels=5, width=6), torch.randn(3, 5, 20, 24)
    valid = torch.rand(3, 15) > 0.4 if holes else None
    scores = scout(images, valid)
    for number, image in enumerate(images):
        expected = slowly(scout, image, None if valid is None else valid[number])
        torch.testing.assert_close(scores[number], expected, rtol=1e-4, atol=1e-6)


def test_patches_without_data_change_no_other_score():
    scout, images = Scout((8, 8), channels=3), torch.randn(1, 3, 32, 32)
    valid = torch.ones(1, 16, dtype=torch.bool)
    valid[0, 5] = False
    before = scout(images, valid)
    images[:, :, 8:16, 8:16] = 1e4
    after = scout(images, valid)
    torch.testing.assert_close(before[valid], after[valid])
    assert not torch.allclose(before, scout(images))


def test_it_learns_to_rank_patches_by_what_it_is_told():
    torch.manual_seed(0)
    scout = Scout((8, 8), channels=3)
    optimizer = torch.optim.AdamW(scout.parameters(), lr=SCOUT_LEARNING_RATE)
    for _ in range(150):
        images = torch.randn(16, 3, 32, 32) * torch.rand(16, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
        scores, hardness = scout(images), patch_variance(images, (8, 8))
        relative_loss(scores, hardness).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert rank_correlation(scores.detach(), hardness).mean() > 0.9


def created(**fields) -> HPM:
    torch.manual_seed(0)
    return HPM.create(
        "vit_tiny_patch16_224", image_size=(32, 32), patch_size=8, decoder_dim=32, decoder_depth=1, decoder_heads=2,
        predictor_depth=1, decoded_share=0.5, **fields,
    )  # fmt: skip


def test_its_loss_reaches_the_scout_and_nothing_else():
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    plain, scouted = created(mask="random"), created(guide="scout")
    state = {name: tensor for name, tensor in scouted.student.state_dict().items() if not name.startswith("scout.")}
    assert state.keys() == plain.student.state_dict().keys()
    plain.student.load_state_dict(state)
    for model in (plain, scouted):
        model.step(images, noise, num_hard=0).total.backward()
    for name, parameter in plain.student.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, scouted.student.get_parameter(name).grad), name
    assert all(
        parameter.grad.abs().sum() > 0 for parameter in scouted.student.scout.parameters() if parameter.dim() > 1
    )


def test_it_hides_what_it_finds_hard_and_no_teacher_is_kept():
    model = created(guide="scout")
    assert model.teacher is None
    assert not model.method.needs_teacher
    images = torch.randn(4, 3, 32, 32)
    hidden = model.method.mask(model.student, None, images, torch.rand(4, 16), num_hard=6).hidden
    hardest = model.predict_loss(images).topk(6, dim=1).indices
    assert hidden.gather(1, hardest).all()
    model.update_teacher(decay=0.9)


def test_a_target_of_the_teachers_features_keeps_the_teacher():
    model = created(guide="scout", target="ema_features")
    assert model.teacher is not None
    assert torch.isfinite(model.step(torch.randn(2, 3, 32, 32), share=0.5).total)


def test_variance_guides_without_learning():
    model = created(guide="variance", predicted_loss="none")
    images = torch.randn(4, 3, 32, 32) * torch.rand(4, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    batch = model.method.mask(model.student, None, images, torch.rand(4, 16), num_hard=6)
    assert batch.hidden.gather(1, patch_variance(images, (8, 8)).topk(6, dim=1).indices).all()
    assert model.student.scout is None
    assert model.teacher is None


def test_parts_of_a_batch_weigh_by_their_pairs():
    model = created(guide="scout")
    batch = model.method.mask(model.student, None, torch.randn(4, 3, 32, 32), torch.rand(4, 16), num_hard=6)
    counts = model.method.num_counted(batch)
    assert counts.tolist() == [4 * 6, 4 * 15, 4 * 15]
    torch.manual_seed(0)
    whole = model.method.learn(model.student, batch)
    half = model.method.learn(model.student, batch, torch.full((3,), 0.5))
    torch.testing.assert_close(half.total, whole.total / 2)


def test_its_learning_rate_is_its_own_and_constant():
    model = created(guide="scout")
    groups = build_optimizer(Config().optimisation, model.student).param_groups
    own = [group for group in groups if group.get("constant")]
    assert len(own) == 1
    assert own[0]["lr"] == SCOUT_LEARNING_RATE
    assert {id(p) for p in own[0]["params"]} == {id(p) for p in model.student.scout.parameters()}
    everything = [id(p) for group in groups for p in group["params"]]
    trained = [id(p) for p in model.student.parameters() if p.requires_grad]
    assert sorted(everything) == sorted(trained)


@pytest.mark.parametrize("mask", ["random", "block", "attention"])
def test_masks_that_no_scores_guide_refuse_a_guide(mask):
    with pytest.raises(InputError, match=r"guide: 'scout' goes with a mask that scores guide \('hard', 'easy'"):
        validated({"method": {"mask": mask, "guide": "scout"}})
    assert guide_of("hard", "scout") == "scout"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("scout") / "run"
    pretrain(out=out, **TINY | {"guide": "scout", "predicted_loss": "none", "figures": True})
    return out


def test_a_run_says_what_is_hard_without_a_teacher(run):
    assert "teacher" not in final_state(run)
    loaded, images = LoadedRun(run), torch.randn(2, 3, 32, 32)
    scores = load_teacher(run).predict_loss(images)
    assert torch.equal(scores, loaded.student.scout_scores(images))
    assert list((run / "figures").glob("hardness_*.png"))


def test_a_run_that_was_stopped_ends_as_one_that_was_not(run, tmp_path, monkeypatch):
    from hardpatch.runtime.errors import Interrupted
    from tiny import stop_after

    fields = TINY | {"guide": "scout", "predicted_loss": "none", "figures": True}
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted):
            pretrain(out=tmp_path / "run", **fields)
    pretrain(out=tmp_path / "run", **fields)
    assert_same_state(final_state(tmp_path / "run"), final_state(run))


def test_the_rest_of_the_student_starts_as_without_it():
    with_scout = build_hpm(with_fields(Config(), TINY | {"guide": "scout"})).student.state_dict()
    without = build_hpm(with_fields(Config(), TINY)).student.state_dict()
    assert all(torch.equal(tensor, with_scout[name]) for name, tensor in without.items())
