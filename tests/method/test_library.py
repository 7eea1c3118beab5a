"""The page on the parts is one program that runs, and does what it says."""

import re

import pytest
import timm
import torch

from hardpatch.method.choices import MASKS, TARGETS
from hardpatch.method.masks import MaskInput, hide_top
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
    tables = dict(MASKS), dict(TARGETS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile(program, "docs/library.md", "exec"), names)
    for table, before in zip((MASKS, TARGETS), tables):
        table.clear()
        table.update(before)
    return names


def test_every_loop_of_the_page_trains(page):
    assert torch.isfinite(page["losses"].total)
    assert page["scores"].shape == (8, 64)
    assert page["features"].shape == (8, 65, 192)


def test_what_it_saves_loads_in_timm(page):
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, depth=4 * 3, num_classes=0)
    backbone.load_state_dict(torch.load(page["folder"] / "backbone.pt", weights_only=True))
    images = page["batches"][0]
    with torch.no_grad():
        torch.testing.assert_close(backbone.eval()(images), page["backbone"].eval()(images))


def test_its_mask_hides_only_the_middle_for_being_hard(page):
    scores, noise = torch.arange(64.0).expand(2, 64), torch.rand(2, 64)
    priorities = page["hard_in_the_centre"](MaskInput(scores, noise, (8, 8), 48, 30))
    chosen = hide_top(priorities, 30).view(2, 8, 8)
    assert chosen[:, 1:7, 1:7].sum() == 2 * 30
