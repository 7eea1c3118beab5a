"""Linear evaluation and its contenders: every encoder by its own rules, every label with its image."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from timm.models import save_for_hf

from hardpatch.config.evaluations import KnnConfig, LinearConfig
from hardpatch.data.loader.loading import Cover
from hardpatch.data.sources import open_source
from hardpatch.evaluate import contenders
from hardpatch.evaluate.classify import knn, linear
from hardpatch.evaluate.classify.knn import knn_votes
from hardpatch.evaluate.classify.labelled_images import LabelledImages, choose_per_class
from hardpatch.evaluate.contenders import Contender, open_contenders, standings
from hardpatch.evaluate.features import pool, split_features
from hardpatch.runs.load import LoadedRun, load_encoder
from hardpatch.runtime.errors import InputError
from hardpatch.training.pretrain import train
from tiny import tiny_config

torch.set_num_threads(1)
TRAIN, VAL = "shapes:80", "shapes:40@1"
OTHER_MEAN, OTHER_STD = (0.2, 0.3, 0.4), (0.1, 0.2, 0.3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs; the other one takes smaller images and normalises them in another way."""
    out = tmp_path_factory.mktemp("runs")
    train(tiny_config(epochs=1), out / "run")
    train(tiny_config(epochs=1, image_size=16, patch_size=4, mean=OTHER_MEAN, std=OTHER_STD, seed=5), out / "other")
    return out


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    """A timm ViT as timm saves it: of another size, normalising in another way, with a norm after pooling."""
    out = tmp_path_factory.mktemp("timm") / "vit"
    torch.manual_seed(3)
    sizes = {"img_size": 48, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, global_pool="avg", **sizes)
    torch.nn.init.normal_(model.fc_norm.weight)
    model.pretrained_cfg.update(mean=OTHER_STD, std=OTHER_MEAN, input_size=(3, 48, 48), num_classes=4)
    save_for_hf(model, out, model_args=sizes | {"global_pool": "avg"}, safe_serialization=True)
    return out


def timm_model(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def setting(runs, **changes):
    return LinearConfig(**{"checkpoint": str(runs / "run"), "train": TRAIN, "val": VAL, "device": "cpu", **changes})


def features_by_hand(model, spec, size, mean, std):
    """Patch means of every image, one by one, through the model's own forward_features."""
    source, rows = open_source(spec, image_size=(32, 32)), []
    for index in range(len(source)):
        image = Cover(size)(source.read(index).image).float() / 255
        image = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        with torch.no_grad():
            rows.append(model.eval().forward_features(image[None])[0, model.num_prefix_tokens :].mean(0))
    return model.fc_norm(torch.stack(rows)).detach(), np.array(source.labels)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_logistic_accuracy_equals_scikit_learn_on_features_made_by_hand(runs):
    result = linear.run(setting(runs, mode="logistic", inverse_penalties=(0.1,)))
    model = load_encoder(runs / "run")
    (bank, labels), (queries, truth) = (features_by_hand(model, spec, (32, 32), *IMAGENET) for spec in (TRAIN, VAL))
    scaler = StandardScaler().fit(bank.numpy())
    oracle = LogisticRegression(C=0.1, max_iter=1000).fit(scaler.transform(bank.numpy()), labels)
    right = oracle.predict(scaler.transform(queries.numpy())) == truth
    assert result.top1 == pytest.approx(
        100 * right.mean(), abs=100 / 40 + 1e-6
    )  # one image may lie on the fence (bf16)
    assert (result.num_train, result.num_val, result.num_classes, result.damaged) == (80, 40, 8, 0)
    assert result.chosen.keys() == {"this run", "untrained"}
    assert result.held_out_top1 is None
    assert sum(item.num_images for item in result.per_class) == 40
    hits = sum(item.top1 * item.num_images / 100 for item in result.per_class)
    assert hits / 40 * 100 == pytest.approx(result.top1)
    assert result.top1_interval.low < result.top1 < result.top1_interval.high
    assert result.standings[1].top1 == result.untrained_top1


def test_every_encoder_is_asked_by_its_own_rules(runs, timm_folder):
    against = (str(runs / "other"), f"timm:local-dir:{timm_folder}")
    result = knn.run(KnnConfig(str(runs / "run"), TRAIN, VAL, k=(5,), against=against, device="cpu"))
    assert [row.kind for row in result.standings] == ["run", "untrained", "against", "against"]
    assert [row.name for row in result.standings[2:]] == list(against)
    for row, model, size, mean, std in (
        (result.standings[0], load_encoder(runs / "run"), (32, 32), *IMAGENET),
        (result.standings[2], load_encoder(runs / "other"), (16, 16), OTHER_MEAN, OTHER_STD),
        (result.standings[3], timm_model(timm_folder), (48, 48), OTHER_STD, OTHER_MEAN),
    ):  # fmt: skip
        (bank, labels), (queries, truth) = (features_by_hand(model, spec, size, mean, std) for spec in (TRAIN, VAL))
        names = sorted(set(labels))
        where = torch.tensor([names.index(label) for label in labels])
        votes = knn_votes(bank, where, queries, k=5, temperature=0.07, num_classes=len(names))
        right = np.array(names)[votes.argmax(dim=1)] == truth
        assert row.top1 == pytest.approx(100 * right.mean(), abs=100 / 40 + 1e-6), row.name


def test_a_weights_file_and_a_run_are_the_same_contender(runs):
    files = (
        str(runs / "other"),
        str(runs / "other/checkpoints/weights.safetensors"),
        str(runs / "other/checkpoints/last"),
    )
    result = knn.run(KnnConfig(str(runs / "run"), TRAIN, VAL, k=(5,), against=files, device="cpu"))
    assert len({row.top1 for row in result.standings[2:]}) == 1
    loaded = LoadedRun(runs / "run")
    found = open_contenders(loaded, files)
    assert {contender.size for contender in found[2:]} == {(16, 16)}
    for contender in found[2:]:
        torch.testing.assert_close(contender.normalise.mean.flatten(), torch.tensor(OTHER_MEAN) * 255)
        assert not contender.encoder.training


def test_leads_are_paired():
    """By counts of the images that only one of the two gets right (McNemar's)."""
    truth = torch.arange(60) % 3
    generator = torch.Generator().manual_seed(0)
    mine, other = (torch.rand(60, 3, generator=generator) for _ in range(2))
    mine[:30, :] += 2 * torch.nn.functional.one_hot(truth[:30], 3)
    contenders = [Contender(name, kind, None, None, (1, 1), {}) for name, kind in (("a", "run"), ("b", "against"))]
    first, second = standings(contenders, [mine, other], truth)
    only_mine = int(((mine.argmax(1) == truth) & (other.argmax(1) != truth)).sum())
    only_other = int(((mine.argmax(1) != truth) & (other.argmax(1) == truth)).sum())
    lead = (only_mine - only_other) / 60
    half = 1.96 * math.sqrt(((only_mine + only_other) / 60 - lead**2) / 60)
    assert first.lead is None
    assert second.lead == pytest.approx(100 * lead)
    assert second.lead_interval == pytest.approx((100 * (lead - half), 100 * (lead + half)))
    assert second.lead == pytest.approx(first.top1 - second.top1)


def test_few_labels_are_those_that_every_evaluation_draws(runs, monkeypatch):
    seen = []
    real = linear.probe

    def spy(features, labels, *given, **rest):
        seen.append((features, labels, rest["seed"]))
        return real(features, labels, *given, **rest)

    monkeypatch.setattr(linear, "probe", spy)
    result = linear.run(setting(runs, labels_per_class=(2, 4), draws=3, learning_rates=(0.3,), seed=7))
    assert [(item.labels_per_class, item.name) for item in result.few_labels] == [
        (2, "this run"), (4, "this run"), (2, "untrained"), (4, "untrained"),
    ]  # fmt: skip
    whole, all_labels, _ = seen[0]
    assert len(whole) == 80
    labels = open_source(TRAIN, image_size=(32, 32)).labels
    for number, (count, draw) in enumerate((c, d) for c in (2, 4) for d in range(3)):
        features, their_labels, seed = seen[1 + number]
        chosen = choose_per_class(labels, count, seed=7 + draw)
        assert seed == 7 + draw
        assert torch.equal(features, whole[chosen])
        assert torch.equal(their_labels, all_labels[chosen])
    for item in result.few_labels:
        assert len(item.draws) == 3
        assert item.top1 == pytest.approx(np.mean(item.draws))
        assert item.deviation == pytest.approx(np.std(item.draws, ddof=1))


def test_the_encoder_runs_over_every_image_once_whatever_is_asked(runs, monkeypatch):
    calls = []
    real = contenders.split_features
    monkeypatch.setattr(contenders, "split_features", lambda *a, **k: calls.append(a[0]) or real(*a, **k))
    linear.run(setting(runs, labels_per_class=(2,), draws=2, epochs=2))
    assert len(calls) == 2


def pictures(folder, count, damaged=()):
    """Dark pictures of class a, bright ones of class b."""
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = np.random.default_rng(number).integers(0, 80, (40, 40, 3)) + 150 * (number % 2)
        Image.fromarray(shade.astype(np.uint8)).save(path)
        if number in damaged:
            path.write_bytes(b"scratched")
    return str(folder)


@pytest.mark.parametrize("mode", ["sgd", "logistic"])
def test_damaged_images_are_left_out_and_labels_stay_with_their_images(runs, tmp_path, mode):
    train_folder, val = pictures(tmp_path / "t", 60, damaged=(0, 5, 6)), pictures(tmp_path / "v", 20, damaged=(4,))
    result = linear.run(
        setting(runs, train=train_folder, val=val, mode=mode, max_damaged=0.1, out=str(tmp_path / "out"))
    )
    assert (result.num_train, result.num_val, result.damaged) == (57, 19, 4)
    assert result.top1 == result.untrained_top1 == 100
    assert [item.num_images for item in result.per_class] == [9, 10]
    assert (tmp_path / "out" / f"{'linear' if mode == 'sgd' else mode}_confusion.png").stat().st_size > 1000
    with pytest.raises(InputError, match="max_damaged"):
        linear.run(setting(runs, train=train_folder, val=val, mode=mode))


def test_a_setting_at_the_edge_of_the_sweep_is_pointed_out(runs, tmp_path, capsys):
    folder = pictures(tmp_path / "t", 40)
    linear.run(setting(runs, train=folder, val="", learning_rates=(1e-9, 1e-8), epochs=1))
    assert "a better one may lie beyond" in capsys.readouterr().err


def test_pooling_of_models_that_normalise_last(timm_folder):
    model = timm_model(timm_folder).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        tokens = model.forward_features(images)
        torch.testing.assert_close(pool(tokens, model, "mean"), model.forward_head(tokens, pre_logits=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": ()}, "learning_rates: .* at least 1 item"),
        ({"learning_rates": (0.1, 0.1)}, "learning_rates: must be different"),
        ({"inverse_penalties": (0.0,)}, r"inverse_penalties\.0: .* greater than 0, got 0"),
        ({"labels_per_class": (11,)}, "labels_per_class: must be between 1 and 10"),
        ({"labels_per_class": (1,)}, "labels_per_class: 1 leaves no image"),
        ({"labels_per_class": (2, 2)}, "labels_per_class: must be different"),
        ({"against": ("{runs}/other", "{runs}/other")}, "against: must be different"),
        ({"against": ("{runs}/nothing",)}, "against: '.*nothing': .*does not exist"),
        ({"against": ("timm:vit_enormous",)}, "against: 'timm:vit_enormous': timm cannot load it"),
        ({"against": ("timm:local-dir:{runs}",)}, "against: 'timm:local-dir:.*timm cannot load it"),
        ({"against": ("{runs}/grey",)}, r"grey' takes images of 1 channel\(s\), and this run's have 3"),
        ({"against": ("{runs}/reg",), "pooling": "class"}, "pooling: 'class' needs a class token, and .*reg has none"),
        ({"checkpoint": "{runs}/reg", "pooling": "class"}, "needs a class token, and this encoder has none"),
        ({"val": "shapes:0"}, "val: needs at least one image"),
        ({"checkpoint": "{runs}/nothing"}, "checkpoint: .* does not exist"),
    ],
)
def test_wrong_input_is_refused_before_the_encoder_runs(runs, monkeypatch, changes, message):
    for name, different in (("grey", {"channels": 1}), ("reg", {"encoder": "vit_wee_patch16_reg1_gap_256"})):
        if not (runs / name).exists() and name in str(changes):
            data = pictures(runs / "pictures", 16) if name == "grey" else "shapes:48"
            train(tiny_config(epochs=1, data=data, **different), runs / name)
    monkeypatch.setattr(contenders, "split_features", None)
    filled = {
        key: value.format(runs=runs) if isinstance(value, str)
        else tuple(v.format(runs=runs) if isinstance(v, str) else v for v in value) if isinstance(value, tuple)
        else value
        for key, value in changes.items()
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        linear.run(setting(runs, **filled))


def test_the_command_prints_tables_keeps_the_figures_and_draws(runs, capsys):
    from hardpatch.cli import main

    words = ["evaluate", "linear", "--checkpoint", str(runs / "run"), "--train", TRAIN, "--val", VAL, "--device", "cpu",
             "--labels-per-class", "2", "--draws", "2", "--against", str(runs / "other"), "--json"]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert {"top1", "top5", "untrained_top1", "num_train", "num_val"} <= result.keys()
    assert result["standings"][2]["lead_interval"]["low"] <= result["standings"][2]["lead"]
    assert "this run is ahead by" in printed
    assert "labels per class" in printed
    assert "mistaken for" in printed
    kept = json.loads((runs / "run/evaluate/linear.json").read_text())
    assert kept == result
    assert (runs / "run/evaluate/linear_confusion.png").stat().st_size > 1000
    page = (runs / "run/report.html").read_text()
    assert "Linear probe" in page
    assert f"{result['top1']:.2f}" in page


# The predicted loss as a feature


def test_hardness_is_the_predicted_loss_standardised_within_each_image(runs):
    loaded, source = LoadedRun(runs / "run"), open_source(TRAIN, image_size=(32, 32))
    split = LabelledImages(source, source, [])
    (contender, untrained) = open_contenders(loaded, (), pooling="hardness")
    made = [
        split_features(
            c.encoder, split, c.normalise, size=(32, 32), pooling="hardness", device=loaded.device, bf16=False,
            teacher=c.teacher,
        ).train.values
        for c in (contender, untrained)
    ]  # fmt: skip
    image = loaded.normalise(source.read(7).image[None])
    scores = loaded.teacher.predict_loss(image)[0]
    torch.testing.assert_close(made[0][7], (scores - scores.mean()) / scores.std(), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(made[0], made[1], atol=0.1), "the control predicts something else"


def test_neighbours_by_what_is_hard(runs, timm_folder):
    config = KnnConfig(str(runs / "run"), TRAIN, VAL, k=(5,), device="cpu", pooling="hardness",
                       against=(str(runs / "other"),))  # fmt: skip
    result = knn.run(config)
    assert [row.kind for row in result.standings] == ["run", "untrained", "against"]
    with pytest.raises(InputError, match="pooling: 'hardness' needs a loss predictor, and timm:local-dir"):
        knn.run(replace(config, against=(f"timm:local-dir:{timm_folder}",)))
