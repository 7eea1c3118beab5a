"""The page on the parts is one program that runs, and does what it says."""

import re

import pytest
import timm
import torch

from hardpatch.method.masks import hide_hard, hide_random
from places import ROOT

torch.set_num_threads(1)
DOCUMENT = ROOT / "docs" / "library.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names that the page's program leaves behind."""
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    folder = tmp_path_factory.mktemp("library")
    names = {"folder": folder}
    program = "\n\n".join(blocks).replace('"backbone.pt")', 'folder / "backbone.pt")')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile(program, "docs/library.md", "exec"), names)
    return names


def test_every_loop_of_the_page_trains(page):
    assert torch.isfinite(page["losses"].total)
    assert page["scores"].shape == (8, 64)
    assert page["features"].shape == (8, 65, 192)


def test_what_it_saves_loads_in_timm(page):
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, depth=4, num_classes=0)
    backbone.load_state_dict(torch.load(page["folder"] / "backbone.pt", weights_only=True))
    images = page["batches"][0]
    with torch.no_grad():
        torch.testing.assert_close(backbone.eval()(images), page["backbone"].eval()(images))


def test_its_masks_are_what_their_docstrings_say(page):
    scores, noise = torch.rand(3, 64), torch.rand(3, 64)
    hidden = page["hide_hard_centre"](scores, noise, num_hidden=48, num_hard=30)
    middle = torch.zeros(8, 8, dtype=torch.bool)
    middle[1:7, 1:7] = True
    hardest = scores.masked_fill(~middle.flatten(), -1).topk(30, dim=1).indices
    assert hidden.sum(dim=1).tolist() == [48] * 3
    assert hidden.gather(1, hardest).all()
    varied = page["hide_what_varies"](8 * scores, noise, num_hidden=48, num_hard=0)
    assert varied.sum(dim=1).tolist() == [48] * 3
    assert scores[varied].mean() > scores[~varied].mean() + 0.05


def test_its_target_finds_edges(page):
    images = torch.zeros(1, 3, 64, 64)
    images[..., 20:] = 1
    edges = page["EdgeTarget"]()(images).reshape(8, 8, 64)
    assert edges.sum(dim=-1)[:, 2].tolist() == pytest.approx([8.0] * 8)
    assert edges.sum() == pytest.approx(64)


def test_the_page_names_what_exists(page):
    assert page["hide_hard"] is hide_hard
    assert page["hide_random"] is hide_random
