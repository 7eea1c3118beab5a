"""Tables of features and difficulty: every row belongs to its image, whatever happened on the way."""

import json
import os
import shutil
import signal
import socket
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from hardpatch.cli import main
from hardpatch.config.commands import EmbedConfig
from hardpatch.data.images.decode import Decoder
from hardpatch.data.loader.loading import Cover
from hardpatch.data.sources import open_source
from hardpatch.embed import embed
from hardpatch.embed.chunks import Parts
from hardpatch.embed.difficulty import mask_order, measure_difficulty, rank_agreement
from hardpatch.embed.sheet import Ranked, draw_sheet, ends
from hardpatch.figures.display import Display
from hardpatch.figures.hardness import NUM_MASKS
from hardpatch.method.losses import relative_loss
from hardpatch.method.vit import encode
from hardpatch.runs.build import build_normalise, choose_attention
from hardpatch.runs.load import LoadedRun
from hardpatch.runtime.errors import InputError
from random_run import random_run
from tiny import in_child, tiny_config

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("run") / "photos")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """21 images of several sizes in two classes; number 4 and 17 in the source are damaged."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(21):
        file = folder / "ab"[number // 10 % 2] / f"{number:02d}.png"
        file.parent.mkdir(exist_ok=True)
        size = (32, 32) if number % 3 else (40, 48)
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)
    names = [open_source(str(folder)).name(index) for index in (4, 17)]
    for name in names:
        with open(name, "wb") as file:  # noqa: PTH123
            file.write(b"scratched")
    return folder


def embedded(run, data, out, **options):
    values = {"batch_size": 4, "device": "cpu", "max_damaged": 0.2} | options
    return embed.run(EmbedConfig(str(run), str(data), str(out), **values))


def load_npz(path):
    with np.load(path, allow_pickle=False) as content:
        return {name: content[name] for name in content.files}


def load_parquet(path):
    table = parquet.read_table(path)
    return {name: np.array(table[name].to_pylist()) for name in table.column_names} | {
        "about": table.schema.metadata[b"hardpatch"].decode()
    }


def one_by_one(run, data):
    """Tokens of every readable image, each alone."""
    loaded, source = LoadedRun(run), open_source(str(data))
    choose_attention(loaded.student, loaded.device, bf16=False)
    tokens = {}
    for index in range(len(source)):
        if index not in (4, 17):
            image = Cover((32, 32))(source.read(index).image)[None]
            with torch.no_grad():
                tokens[index] = encode(loaded.student.encoder, loaded.normalise(image))[0].numpy()
    return tokens


@pytest.mark.parametrize(
    ("features", "suffix"), [("class", "npz"), ("mean", "parquet"), ("both", "npz"), ("tokens", "parquet")]
)
def test_every_image_keeps_its_features(features, suffix, trained, photos, tmp_path):
    """Seven parts of one batch, of which two have a damaged image."""
    out = tmp_path / f"table.{suffix}"
    result = embedded(trained, photos, out, features=features)
    table = (load_npz if suffix == "npz" else load_parquet)(out)
    truth, source = one_by_one(trained, photos), open_source(str(photos))
    assert table["position"].tolist() == list(truth)
    assert table["path"].tolist() == [source.name(index) for index in truth]
    assert table["label"].tolist() == [source.labels[index] for index in truth]
    wanted = {
        "class_token": np.stack([tokens[0] for tokens in truth.values()]),
        "patch_mean": np.stack([sum(tokens[1:]) / 16 for tokens in truth.values()]),
        "patch_tokens": np.stack([tokens[1:] for tokens in truth.values()]),
    }
    columns = {"class": ["class_token"], "mean": ["patch_mean"], "both": ["class_token", "patch_mean"]}
    columns = columns.get(features, ["patch_tokens"])
    assert set(table) == {"position", "path", "label", "about", *columns}
    assert list(result.columns) == columns
    for name in columns:
        np.testing.assert_allclose(table[name], wanted[name], rtol=0, atol=2e-5)
        assert result.columns[name] == wanted[name].shape[1:]
    assert (result.images, result.damaged) == (19, 2)
    assert json.loads(str(table["about"]))["step"] == 12
    assert [file.name for file in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_a_part_without_a_readable_image(suffix, trained, photos, tmp_path, monkeypatch):
    whole = embedded(trained, photos, tmp_path / "whole.npz")
    monkeypatch.setattr(embed, "PART_IMAGES", 1)
    result = embedded(trained, photos, tmp_path / f"parts.{suffix}", batch_size=1)
    assert (result.images, result.damaged) == (whole.images, whole.damaged) == (19, 2)
    table = (load_npz if suffix == "npz" else load_parquet)(tmp_path / f"parts.{suffix}")
    np.testing.assert_allclose(table["patch_mean"], load_npz(tmp_path / "whole.npz")["patch_mean"], rtol=0, atol=2e-5)


def test_both_files_hold_the_same(trained, photos, tmp_path):
    for name in ("a.npz", "a.parquet"):
        embedded(trained, photos, tmp_path / name, features="tokens", dtype="float16", hardness=True)
    a, b = load_npz(tmp_path / "a.npz"), load_parquet(tmp_path / "a.parquet")
    assert a.keys() == b.keys()
    assert a["patch_tokens"].dtype == np.float16
    for name in a.keys() - {"about"}:
        np.testing.assert_array_equal(a[name], b[name].astype(a[name].dtype))
    assert str(parquet.read_schema(tmp_path / "a.parquet").field("patch_tokens").type).count("halffloat") == 1


# ------------------------------------------------------------------------------------------------- stopping, sharing


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(embed, "PART_IMAGES", 8)


def test_a_stopped_job_goes_on_and_ends_with_the_same_bits(trained, photos, tmp_path, monkeypatch, small_parts):
    options = {"features": "both", "hardness": True}
    embedded(trained, photos, tmp_path / "whole.npz", **options)
    write, described, killed_at = Parts.write, [], 1

    def count(job):
        describe = DESCRIBER(job)
        return lambda batch: (described.append(batch.indices), describe(batch))[1]

    def write_or_die(parts, number, part):
        if number == killed_at:
            raise KeyboardInterrupt
        write(parts, number, part)

    DESCRIBER = embed._describer  # noqa: N806
    monkeypatch.setattr(embed, "_describer", count)
    monkeypatch.setattr(Parts, "write", write_or_die)
    out = tmp_path / "stopped.npz"
    for killed_at in (1, 2):  # noqa: B007
        with pytest.raises(KeyboardInterrupt):
            embedded(trained, photos, out, **options)
        assert not out.exists()
    (tmp_path / ".stopped.npz.123.tmp").write_bytes(b"half a table")  # of a process killed while it joined
    described.clear()
    monkeypatch.setattr(Parts, "write", write)
    embedded(trained, photos, out, **options)
    assert described == [[16, 18, 19], [20]]  # only the last part
    whole, resumed = load_npz(tmp_path / "whole.npz"), load_npz(out)
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["stopped.npz", "whole.npz"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_with_code_3_and_it_goes_on(number, trained, photos, tmp_path, monkeypatch, capsys):
    """Schedulers repeat themselves: the second one must not tear what the first began."""
    write = Parts.write

    def write_and_be_told(parts, which, part):
        write(parts, which, part)
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)

    monkeypatch.setattr(embed, "PART_IMAGES", 8)
    monkeypatch.setattr(Parts, "write", write_and_be_told)
    out = tmp_path / "stopped.npz"
    command = ["embed", "--checkpoint", str(trained), "--data", str(photos), "--out", str(out), "--max-damaged", "0.2"]
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left:
        main([*command, "--device", "cpu", "--workers", "0"])
    assert left.value.code == 3
    assert f"stopped by {signal.Signals(number).name}; what is done is kept" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    assert not out.exists()
    monkeypatch.setattr(Parts, "write", write)
    with pytest.raises(SystemExit) as left:
        main([*command, "--device", "cpu", "--workers", "0"])
    assert left.value.code == 0
    assert out.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "class"}, "features: 'mean' -> 'class'"),
        ({"batch_size": 8}, "batch_size: 4 -> 8"),
        ({"hardness": True}, "hardness: False -> True"),
        ({"data": "shapes:9"}, "images: '21 images, .*' -> '9 images, "),
    ],
)
def test_another_job_in_the_same_place_is_refused(changes, message, trained, photos, tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    values = {"data": photos, "out": tmp_path / "table.npz"}
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", die)
        with pytest.raises(KeyboardInterrupt):
            embedded(trained, **values)
    with pytest.raises(InputError, match=rf"out: .*table.npz.parts(.|\n)*{message}"):
        embedded(trained, **values | changes)
    embedded(trained, **values)


def test_another_checkpoint_in_the_same_place_is_refused(trained, photos, tmp_path):
    other = random_run(tmp_path / "other", encoder_heads=4)
    weights = LoadedRun(trained)
    with torch.no_grad():
        weights.student.encoder.norm.bias[0] += 1
    assert embed._digest([weights.student.encoder]) != embed._digest([LoadedRun(trained).student.encoder])
    parts = tmp_path / "table.npz.parts"
    parts.mkdir()
    (parts / "settings.json").write_text('{"weights": "0123"}')
    with pytest.raises(InputError, match="weights: '0123' ->"):
        embedded(other, photos, tmp_path / "table.npz")


def embed_as(rank, port, arguments, options):
    """Target of a child process: one of two."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    embed.PART_IMAGES = 8
    embedded(*arguments, **options)


def test_two_processes_share_the_work(trained, photos, tmp_path, small_parts):
    options = {"features": "both", "hardness": True}
    embedded(trained, photos, tmp_path / "one.npz", **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (str(trained), str(photos), str(tmp_path / "two.npz"))
    processes = [in_child(embed_as, rank, port, arguments, options) for rank in range(2)]
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = load_npz(tmp_path / "one.npz"), load_npz(tmp_path / "two.npz")
    assert all(np.array_equal(one[name], two[name]) for name in one)


# ------------------------------------------------------------------------------------------------- difficulty


def by_hand(run, image, order):
    """Slow twin: mask by mask and patch by patch."""
    target = run.method.target(image[None], None)[0]
    errors = [[] for _ in range(16)]
    for number in range(NUM_MASKS):
        hidden = torch.tensor([(place + number * 16 // NUM_MASKS) % 16 < 12 for place in order.tolist()])
        prediction = run.student(image[None], hidden[None], num_hidden=12).prediction[0]
        for row, patch in enumerate(hidden.nonzero().flatten().tolist()):
            errors[patch].append((prediction[row] - target[patch]).square().mean())
    assert {len(error) for error in errors} <= {7, 8}
    return torch.stack([torch.stack(error).mean() for error in errors])


@torch.no_grad()
def test_difficulty_by_hand(trained):
    run, order = LoadedRun(trained), mask_order(0, 16)
    images = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = measure_difficulty(run, images, order)
    for row, image in enumerate(run.normalise(images)):
        error = by_hand(run, image, order)
        torch.testing.assert_close(found.reconstruction_error[row], error, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.difficulty[row], error.mean(), rtol=1e-4, atol=1e-5)
        spread = [
            images[row][:, y : y + 8, x : x + 8].flatten(1) / 255 for y in range(0, 32, 8) for x in range(0, 32, 8)
        ]
        contrast = torch.stack([patch.var(dim=1).mean() for patch in spread]).mean().sqrt()
        torch.testing.assert_close(found.contrast[row], contrast)
    torch.testing.assert_close(found.predicted_loss, run.teacher.predict_loss(run.normalise(images)))


def test_difficulty_of_an_image_depends_on_nothing_beside_it(trained):
    run, order = LoadedRun(trained), mask_order(0, 16)
    with torch.no_grad():
        for parameter in run.student.parameters():
            parameter *= 5  # so that it matters what is hidden
    image = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    copies = measure_difficulty(run, image.repeat(3, 1, 1, 1), order).difficulty
    alone = measure_difficulty(run, image, order).difficulty
    torch.testing.assert_close(copies, alone.repeat(3), rtol=1e-5, atol=0)
    other = measure_difficulty(run, image, (order + 1) % 16).difficulty
    assert (other - alone).abs() > 1e-3 * alone


def test_the_relative_loss_does_not_see_what_a_mean_score_would_rank_by():
    """Why images are not ranked by predicted loss: a shift of an image's scores costs nothing."""
    generator = torch.Generator().manual_seed(0)
    scores, losses = torch.randn(4, 12, generator=generator), torch.rand(4, 12, generator=generator)
    shifted = scores + 8 * torch.arange(4).view(-1, 1)
    torch.testing.assert_close(relative_loss(scores, losses), relative_loss(shifted, losses), rtol=1e-5, atol=1e-6)
    assert scores.mean(1).argsort().tolist() != shifted.mean(1).argsort().tolist()


def test_hardness_in_the_table(trained, tmp_path):
    result = embedded(
        trained,
        "shapes:20",
        tmp_path / "a.npz",
        hardness=True,
        contact_sheet=str(tmp_path / "sheet.png"),
        sheet_images=9,
    )
    table = load_npz(tmp_path / "a.npz")
    assert table["reconstruction_error"].shape == table["predicted_loss"].shape == (20, 4, 4)
    np.testing.assert_allclose(table["difficulty"], table["reconstruction_error"].mean((1, 2)), rtol=1e-5)
    order = np.argsort(table["difficulty"])
    assert [item.position for item in result.easiest] == order[:9].tolist()
    assert [item.position for item in result.hardest] == order[::-1][:9].tolist()
    assert result.hardest[0].path == table["path"][order[-1]]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.height > sheet.width / 2
    run = LoadedRun(trained)
    image = open_source("shapes:20", image_size=(32, 32)).read(7).image[None]
    scores = run.teacher.predict_loss(run.normalise(image)).reshape(4, 4).numpy()
    np.testing.assert_allclose(table["predicted_loss"][7], scores, rtol=0, atol=1e-5)


def test_a_run_without_a_loss_predictor(tmp_path, capsys):
    run = random_run(tmp_path / "mae", predicted_loss="none", mask="random")
    embedded(run, "shapes:6", tmp_path / "a.npz", hardness=True)
    assert "predicted_loss" not in load_npz(tmp_path / "a.npz")
    assert "no loss predictor" in capsys.readouterr().err


@pytest.mark.parametrize(("num", "count", "each"), [(7, 3, 3), (7, 10, 3), (1, 5, 0), (6, 2, 2)])
def test_ends(num, count, each):
    difficulty = np.array([3.0, 1.0, 2.0, 1.0, 9.0, 0.5, 4.0])[:num]
    easiest, hardest = ends(difficulty, list(range(10, 10 + num)), [str(n) for n in range(20)], count)
    assert len(easiest) == len(hardest) == each
    assert not {item.position for item in easiest} & {item.position for item in hardest}
    values = [item.difficulty for item in easiest]
    assert values == sorted(difficulty.tolist())[:each]
    assert [item.difficulty for item in hardest] == sorted(difficulty.tolist(), reverse=True)[:each]
    assert all(item == Ranked(item.position, str(item.position), difficulty[item.position - 10]) for item in easiest)


def test_rank_agreement():
    a = np.array([0.1, 0.5, 0.3, 0.9])
    assert rank_agreement(a, a**3) == pytest.approx(1)
    assert np.isnan(rank_agreement(a, np.ones(4)))
    assert np.isnan(rank_agreement(a[:1], a[:1]))


# ------------------------------------------------------------------------------------------------- what may go wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "table.csv"}, r"out: must end in \.parquet or \.npz"),
        ({"out": "there.npz"}, "out: .*there.npz.* exists"),
        ({"out": "there.npz/table.npz"}, "out: cannot use"),
        ({"contact_sheet": "sheet.png"}, "contact_sheet: .*add --hardness"),
        ({"contact_sheet": "sheet.jpg", "hardness": True}, "contact_sheet: must end in .png"),
        ({"max_damaged": 0.05}, "max_damaged: at most 5.0%"),
        ({"data": "nowhere"}, "data: 'nowhere' does not exist"),
        ({"run": "nowhere"}, "checkpoint: 'nowhere' does not exist"),
    ],
)
def test_wrong_inputs(options, message, trained, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.npz").touch()
    with pytest.raises(InputError, match=message):
        embedded(**({"run": trained, "data": photos, "out": "table.npz"} | options))


def test_images_of_another_number_of_channels(photos, tmp_path):
    run = random_run(tmp_path / "run", channels=5, mean=(0.5,) * 5, std=(0.2,) * 5, data="x")
    with pytest.raises(InputError, match="channels"):
        embedded(run, photos, tmp_path / "a.npz")


def test_a_class_token_that_is_not_there(photos, tmp_path):
    run = random_run(tmp_path / "run", encoder="vit_wee_patch16_reg1_gap_256")
    with pytest.raises(InputError, match="features: 'both' needs a class token"):
        embedded(run, photos, tmp_path / "a.npz", features="both")


def test_a_disk_that_is_too_small(trained, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"out: needs 0\.0 GB .*are free"):
        embedded(trained, photos, tmp_path / "a.npz")


def test_a_feature_that_float16_cannot_hold(tmp_path):
    run = random_run(tmp_path / "run")
    file = run / "checkpoints" / "step_00000012.pt"
    state = torch.load(file, weights_only=True)
    state["student"]["encoder.norm.bias"][3] = 1e6
    other = tmp_path / "large.pt"
    torch.save(state, other)
    with pytest.raises(InputError, match="dtype: a feature does not fit into float16"):
        embedded(other, "shapes:4", tmp_path / "a.npz", dtype="float16")


def test_command(trained, photos, tmp_path, capsys):
    out = tmp_path / "a.parquet"
    words = ["embed", "--checkpoint", str(trained), "--data", str(photos), "--out", str(out)]
    words += ["--hardness", "--max-damaged", "0.2", "--device", "cpu", "--json"]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0
    printed = capsys.readouterr()
    figures = json.loads(printed.out.splitlines()[-1])
    assert (figures["images"], figures["damaged"]) == (19, 2)
    assert figures["columns"]["predicted_loss"] == [4, 4]
    assert figures["hardest"][0]["difficulty"] >= figures["easiest"][0]["difficulty"]
    assert printed.err.count("damaged image left out") == 2
    assert "19 rows" in printed.out
    lines = printed.out[printed.out.index("use:") + 4 :].splitlines()[:3]
    scope = {}
    exec("\n".join(line.strip() for line in lines), scope)
    assert scope["features"].shape == (19, 32)
    assert scope["paths"][0].endswith("00.png")


@pytest.mark.parametrize("no_data", [None, 0])
def test_contact_sheet_hatches_what_is_no_data_and_says_so(tmp_path, no_data):
    for number in range(4):
        values = np.random.default_rng(number).integers(1, 255, (16, 16, 3), dtype=np.uint8)
        values[:, 8:] = 0
        np.save(tmp_path / f"{number}.npy", values)
    source = open_source(str(tmp_path), decoder=Decoder(no_data=no_data), image_size=(16, 16))
    ranked = [Ranked(number, f"{number}.npy", float(number)) for number in range(4)]
    figure = draw_sheet(
        source, ranked[:2], ranked[2:], np.arange(4.0), display=Display(build_normalise(tiny_config())), size=(16, 16),
        title="four images",
    )  # fmt: skip
    told = [text.get_text() for text in figure.texts]
    assert ("four images; hatched: no data" in told) == (no_data == 0)
    assert ("four images" in told) == (no_data is None)
    pictures = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert len(pictures) == 4
    assert all(({120, 190} == set(np.unique(picture[:, 8:]))) == (no_data == 0) for picture in pictures)
