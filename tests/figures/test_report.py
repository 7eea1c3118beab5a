"""The report answers in the order in which people ask, and its commands run as they stand."""

import json
import re
import shlex
from html import unescape

import pytest

from hardpatch.cli import main
from hardpatch.config.recipes import recipe
from hardpatch.config.values import to_yaml, with_fields
from hardpatch.figures.report import write_report
from hardpatch.runs.folder import RunFolder
from tiny import TINY, pretrain


@pytest.mark.parametrize("outcome", ["better", "no_better", "unproven"])
def test_verdict_images_features_what_next_and_then_details(tmp_path, outcome):
    folder = RunFolder(tmp_path)
    folder.config_file.write_text(to_yaml(with_fields(recipe("hpm"), {"data": "my photos", "val": "val"}), {}))
    records = [{"step": step, "reconstruction_loss": 1.0, "knn_top1": 10.0 + step} for step in range(5)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    result = {
        "verdict": outcome, "verdict_sentence": "a <sentence>", "verdict_advice": ["train longer"], "steps": 4,
        "knn_top1": 14.0, "knn_top1_untrained": 10.0,
    }  # fmt: skip
    folder.result_file.write_text(json.dumps(result))
    folder.figures.mkdir()
    folder.hardness_figure(0).write_bytes(b"first")
    folder.hardness_figure(4).write_bytes(b"last")
    write_report(folder)
    page = folder.report_file.read_text()
    order = [
        "a &lt;sentence&gt;",
        "train longer",
        "What is hard",
        "How good are the features",
        "What to do next",
        "Details",
    ]
    assert sorted(order, key=page.index) == order
    assert f'class="verdict {outcome}"' in page
    assert f'class="tile {outcome}"' in page
    assert page.index("hardness after step 4") < page.index("the 1 figures before") < page.index("before training")
    assert "--train 'my photos'" in unescape(page)


@pytest.mark.slow
def test_its_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrain("shapes:48", "a run", **{k: v for k, v in TINY.items() if k != "data"} | {"knn": True, "figures": True,
             "num_figure_images": 1, "val": "shapes:30@1"})  # fmt: skip
    commands = re.findall(r"<pre>(hardpatch .*?)</pre>", (tmp_path / "a run/report.html").read_text())
    assert [shlex.split(unescape(line))[1] for line in commands] == ["evaluate", "visualize", "embed", "export"]
    for line in commands:
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(unescape(line))[1:])
        assert ended.value.code == 0
