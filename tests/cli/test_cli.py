"""What a user types and what comes back: exit codes, messages, tables, the JSON line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hardpatch.cli import main
from tiny import TINY, flags


def call(capsys, *words):
    """Exit code, standard output and standard error of ``hardpatch words``."""
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return left.value.code, captured.out, captured.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.raises(SystemExit) as left:
        main(
            ["pretrain", "--recipe", "hpm", "--out", str(out), *flags(TINY | {"figures": True, "num_figure_images": 2})]
        )
    assert left.value.code == 0
    return out


@pytest.mark.parametrize(("changes", "message"), [
    ({"data": ""}, "data: needs a folder"),
    ({"data": "{tmp}/nothing"}, "does not exist"),
    ({"data": "{tmp}/empty"}, "no images in"),
    ({"data": "{tmp}/file.bin"}, "must be a folder"),
    ({"data": "shapes:0"}, "at least one image"),
    ({"image_size": 30}, "divisible by the patch size 8x8, got 30x30"),
    ({"encoder": "vit_enormous"}, "no model named 'vit_enormous'"),
    ({"encoder": "resnet18"}, "resnet18"),
    ({"encoder": "swin_tiny_patch4_window7_224"}, "swin"),
    ({"mask_ratio": 0}, r"mask_ratio.*greater than 0, got 0"),
    ({"mask_ratio": 1}, r"mask_ratio.*less than 1, got 1"),
    ({"mask_ratio": 2}, r"mask_ratio.*less than 1, got 2"),
    ({"batch_size": 1000}, r"batch_size: must be at most the number of images \(48\), got 1000"),
    ({"micro_batch_size": 3}, "micro_batch_size: must divide the 8 images"),
    ({"micro_batch_size": 16}, "micro_batch_size: must be at most the 8 images per process and step, got 16"),
    ({"predicted_loss": "none"}, "mask: 'hard' chooses by predicted loss"),
    ({"decoder_heads": 5}, "decoder_heads: must divide"),
    ({"device": "cuda"}, "device: 'cuda' is not available"),
    ({"val": "{tmp}/unlabelled"}, "val: .* has no labels"),
    ({"channels": 13}, "shapes have 3 channels"),
    ({"init_from": "{tmp}/file.bin"}, "init_from: .*file.bin': damaged"),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_is_made(capsys, tmp_path, changes, message):
    from PIL import Image

    if changes.get("device") == "cuda":
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device here")
    (tmp_path / "empty").mkdir()
    (tmp_path / "unlabelled").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "unlabelled" / "a.png")
    (tmp_path / "file.bin").write_bytes(b"x")
    changes = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in changes.items()}
    code, _, err = call(capsys, "pretrain", "--recipe", "hpm", "--out", tmp_path / "run", *flags(TINY | changes))
    assert code == 2
    assert pytest.importorskip("re").search(message, err), err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("words", "message"), [
    (["pretrain", "--recipe", "hpm", "--out", "x", "--mask-ratoi", "0.5"], "mask-ratio"),
    (["pretrain", "--out", "x", "--lr", "0.5"], "--lr: there is no such flag; did you mean --base-learning-rate?"),
    (["pretrain", "--out", "x", "--bs=64"], "--bs: there is no such flag; did you mean --batch-size?"),
    (["plan", "--data", "x", "--model", "vit"], "--model: there is no such flag; did you mean --encoder?"),
    (["evaluate", "linear", "--checkpoint", "x", "--epoch", "3"], "--epoch: there is no such flag; did you mean"),
    (["pretrain", "--out", "x", "--recipe", "nothing"], "METHOD: mae"),
    (["pretrain", "--out", "x", "--config", "/nothing.yaml"], "cannot read /nothing.yaml"),
    (["pretrain", "--data", "shapes:9"], "--out"),
    (["pretrain", "--out", "x", "--recipe", "mae", "--config", "a.yaml"], "not both"),
    (["pretrian"], "did you mean pretrain"),
    (["evaluate", "everything"], "evaluate knn  "),
    (["evaluate", "kn"], "no evaluation 'kn'; did you mean knn?"),
    (["evaluate"], "evaluate foreground  how well"),
    (["evaluate", "--json", "knn"], "no evaluation '--json'"),
    (["evalaute", "knn"], "no command 'evalaute'"),
    (["convert", "--from", "/nothing", "--to", "a.pt"], "from: '/nothing': does not exist"),
    (["visualize", "--checkpoint", "/nothing", "--images", "shapes:3", "--out", "a.png"], "does not exist"),
    (["evaluate", "knn", "--checkpoint", "/nothing", "--train", "shapes:9", "--val", "shapes:9"], "does not exist"),
])  # fmt: skip
def test_mistyped_commands_are_explained(capsys, words, message):
    code, _, err = call(capsys, *words)
    assert code == 2
    assert message in err


def test_a_misspelt_yaml_key_is_explained(capsys, tmp_path):
    (tmp_path / "config.yaml").write_text("optimisation:\n  epohcs: 3\n")
    code, _, err = call(capsys, "pretrain", "--config", tmp_path / "config.yaml", "--out", tmp_path / "run")
    assert code == 2
    assert "epohcs" in err
    assert "did you mean epochs?" in err


def test_another_runs_folder_is_refused_with_the_difference(capsys, finished):
    code, _, err = call(capsys, "pretrain", "--recipe", "hpm", "--out", finished, *flags(TINY | {"mask_ratio": 0.5}))
    assert code == 2
    assert "mask_ratio: 0.75 -> 0.5" in err
    assert call(capsys, "pretrain", "--recipe", "hpm", "--out", finished, "--resume", "never", *flags(TINY))[0] == 2


def test_a_folder_with_other_things_is_refused(capsys, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    code, _, err = call(capsys, "pretrain", "--recipe", "hpm", "--out", tmp_path, *flags(TINY))
    assert code == 2
    assert "not empty" in err
    code, _, err = call(capsys, "pretrain", "--recipe", "hpm", "--out", tmp_path / "thesis.tex", *flags(TINY))
    assert code == 2
    assert "must be a folder" in err


def test_too_little_room_is_refused(capsys, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    code, _, err = call(capsys, "pretrain", "--recipe", "hpm", "--out", tmp_path / "run", *flags(TINY))
    assert code == 2
    assert "GB are free" in err


def test_pretrain_prints_a_table_the_next_command_and_json(capsys, finished):
    small = TINY | {"figures": True, "num_figure_images": 2}
    code, out, _ = call(capsys, "pretrain", "--recipe", "hpm", "--out", finished, "--json", *flags(small))
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert {"run", "steps", "samples_seen", "seconds", "images_per_second", "reconstruction_loss",
            "predictor_rank_correlation"} <= result.keys()  # fmt: skip
    assert "reconstruction_loss" in out
    assert "next:  hardpatch visualize" in out


def test_restart_starts_over(capsys, tmp_path):
    run = tmp_path / "run"
    assert call(capsys, "pretrain", "--recipe", "hpm", "--out", run, *flags(TINY | {"checkpoint_steps": 4}))[0] == 0
    for folder, name in (("figures", "hardness_00000004.png"), ("evaluate", "knn.json"), ("events", "old")):
        (run / folder).mkdir(exist_ok=True)
        (run / folder / name).write_text("of the run before")
    (run / "metrics.jsonl").write_text('{"step": 0, "knn_top1": 99.0}\n')
    other = flags(TINY | {"seed": 1, "epochs": 1, "checkpoint_steps": 3})
    assert call(capsys, "pretrain", "--recipe", "hpm", "--out", run, "--resume", "restart", *other)[0] == 0
    assert "seed: 1" in (run / "config.yaml").read_text()
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [3, 6]
    assert sorted(file.name for file in (run / "checkpoints").glob("*.pt")) == ["step_00000003.pt", "step_00000006.pt"]
    assert not [*run.glob("figures/*"), *run.glob("evaluate/*"), *run.glob("events/old")]


def test_evaluate_knn_prints_the_untrained_encoder_too(capsys, finished):
    code, out, _ = call(capsys, "evaluate", "knn", "--checkpoint", finished, "--train", "shapes:64", "--val",
                        "shapes:32@1", "--k", "5", "10", "--json")  # fmt: skip
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert {"top1", "top5", "untrained_top1", "num_train", "num_val"} <= result.keys()
    assert (result["num_train"], result["num_val"]) == (64, 32)
    assert json.loads((finished / "evaluate" / "knn.json").read_text())["top1"] == result["top1"]
    assert "k nearest neighbours" in (finished / "report.html").read_text()


def test_neighbours_by_predicted_loss_do_not_take_the_place_of_those_by_features(capsys, finished):
    command = ("evaluate", "knn", "--checkpoint", finished, "--train", "shapes:64", "--val", "shapes:32@1", "--k", "5")
    assert call(capsys, *command)[0] == 0
    features = json.loads((finished / "evaluate" / "knn.json").read_text())
    assert call(capsys, *command, "--pooling", "hardness")[0] == 0
    assert json.loads((finished / "evaluate" / "knn.json").read_text()) == features
    assert json.loads((finished / "evaluate" / "knn_hardness.json").read_text())["pooling"] == "hardness"
    assert features["pooling"] == "mean"


@pytest.mark.parametrize("command", ["evaluate knn", "data check", "benchmark step", "embed", "export", "pretrain"])
def test_help_tells_of_json(capsys, command):
    code, out, _ = call(capsys, *command.split(), "--help")
    assert code == 0
    assert "--json" in out


def labelled_folder(folder, *, damaged=()):
    """30 shapes below folders of their classes; some are no images."""
    from PIL import Image

    from hardpatch.data.sources.drawn_shapes import make_shape

    for number in range(30):
        file = folder / "abc"[number % 3] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        if number in damaged:
            file.write_bytes(b"no image")
        else:
            Image.fromarray(make_shape(5, number, 32, 32).image).save(file)
    return folder


def test_evaluate_knn_names_damaged_images_once_and_does_not_count_them(capsys, finished, tmp_path):
    train, val = labelled_folder(tmp_path / "train", damaged=(4, 7)), labelled_folder(tmp_path / "val", damaged=(9,))
    words = ["evaluate", "knn", "--checkpoint", finished, "--train", train, "--val", val, "--k", "5", "--json"]
    code, _, err = call(capsys, *words)
    assert code == 2
    assert "max_damaged: at most 1.0% of the images may be damaged, and 2 of the 30 of train are" in err
    code, out, err = call(capsys, *words, "--max-damaged", "0.1")
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert (result["num_train"], result["num_val"], result["damaged"]) == (28, 29, 3)
    for name in (train / "b" / "4.png", train / "b" / "7.png", val / "a" / "9.png"):
        assert err.count(f"damaged image left out: {name}: no image") == 1
    assert "28 neighbours, 29 images classified" in out


@pytest.mark.slow
def test_evaluate_knn_by_two_processes_gives_the_result_of_one_and_prints_it_once(capsys, finished, tmp_path):
    train, val = labelled_folder(tmp_path / "train", damaged=(4, 7)), labelled_folder(tmp_path / "val")
    words = [str(word) for word in ("evaluate", "knn", "--checkpoint", finished, "--train", train, "--val", val,
                                    "--k", "3", "7", "--max-damaged", "0.1", "--device", "cpu", "--json")]  # fmt: skip
    _, alone, _ = call(capsys, *words)
    done = subprocess.run(
        [*f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 -m hardpatch".split(), *words],
        check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=240, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == alone
    assert done.stderr.count("damaged image left out") == 2


def test_evaluate_foreground_reports_every_measure_by_level(capsys, finished, tmp_path):
    code, out, _ = call(capsys, "evaluate", "foreground", "--checkpoint", finished, "--images", "shapes:48@1", "--json")
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    for name in ("predicted_loss", "reconstruction_error", "patch_variance", "edge_density", "attention"):
        assert {"auroc", "average_precision", "pointing_game"} <= result[name].keys()
    assert list(result["by_group"]) == ["plain", "pattern", "camouflage"]
    assert result["by_group"]["plain"]["patch_variance"]["auroc"] > 0.8


def test_evaluate_foreground_with_a_folder_of_masks(capsys, finished, tmp_path):
    from PIL import Image

    from hardpatch.data.sources.drawn_shapes import make_shape

    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(4):
        shape = make_shape(5, number, 32, 32)
        Image.fromarray(shape.image).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(shape.mask).save(tmp_path / "masks" / f"{number}.png")
    words = ["evaluate", "foreground", "--checkpoint", finished, "--images", tmp_path / "images"]
    code, out, _ = call(capsys, *words, "--masks", tmp_path / "masks", "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["num_images"] == 4
    assert "no masks of their own" in call(capsys, *words)[2]
    (tmp_path / "masks" / "2.png").unlink()
    assert "no mask for the image" in call(capsys, *words, "--masks", tmp_path / "masks")[2]


def test_evaluate_foreground_names_damaged_images_once_and_does_not_count_them(capsys, finished, tmp_path):
    from PIL import Image

    from hardpatch.data.sources.drawn_shapes import make_shape

    images = labelled_folder(tmp_path / "images", damaged=(4, 7))
    (tmp_path / "masks").mkdir()
    for number in range(30):
        Image.fromarray(make_shape(5, number, 32, 32).mask).save(tmp_path / "masks" / f"{number}.png")
    words = ["evaluate", "foreground", "--checkpoint", finished, "--images", images, "--masks", tmp_path / "masks"]
    code, _, err = call(capsys, *words)
    assert code == 2
    assert "max_damaged: at most 1.0% of the images may be damaged, and 2 of the 30 of images are" in err
    code, out, err = call(capsys, *words, "--json", "--max-damaged", "0.1")
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert (result["num_images"], result["damaged"]) == (28, 2)
    assert err.count("damaged image left out") == 2
    for file in images.glob("*/*.png"):
        file.write_bytes(b"")
    assert "no readable image among 30" in call(capsys, *words, "--max-damaged", "1")[2]


def test_visualize_writes_the_figure(capsys, finished, tmp_path):
    code, out, _ = call(capsys, "visualize", "--checkpoint", finished, "--images", "shapes:9@3", "--count", "3",
                        "--out", tmp_path / "hard.png", "--json")  # fmt: skip
    assert code == 0
    assert (tmp_path / "hard.png").stat().st_size > 5000
    assert -1 <= json.loads(out.splitlines()[-1])["rank_correlation"] <= 1


def test_the_report_is_one_self_contained_page(finished):
    page = Path(finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 3
    assert "http://" not in page
    assert "https://" not in page
    assert "encoder_width: 32" in page


def test_help_and_version(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert "pretrain" in out
    code, out, _ = call(capsys, "pretrain", "--recipe", "mae-norm-pix", "--help-all")
    assert code == 0
    assert "norm_pix" in out
    assert "(default: random)" in out
    code, out, _ = call(capsys, "evaluate", "--help")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines() if line.startswith("  ")] == [
        ["evaluate", "knn"],
        ["evaluate", "linear"],
        ["evaluate", "finetune"],
        ["evaluate", "foreground"],
        ["evaluate", "segment"],
        ["evaluate", "detect"],
    ]
    code, out, _ = call(capsys, "--version")
    assert "torch" in out
    assert "timm" in out
    listed = call(capsys, "recipes")[1]
    assert all(part in listed for part in ("random+lpred", "norm-pix", "imagenet-800"))
    assert call(capsys, "recipes", "--help")[0] == 0
