"""What is built for a package index: every file of the package, and a page without links that lead nowhere."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes

import pytest

from places import ROOT

pytest.importorskip("setuptools", minversion="77", reason="setuptools builds the wheel")

FILES = ("src", "README.md", "LICENSE", "pyproject.toml", "setup.py")
BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"


def build(project):
    """Build the wheel of a project."""
    done = subprocess.run([sys.executable, "-c", BUILD, str(project)], check=False, cwd=project, capture_output=True,
                          text=True, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(project / done.stdout.splitlines()[-1])


def page(wheel):
    """The page on the index."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = message_from_bytes(wheel.read(name))
    assert metadata["Description-Content-Type"] == "text/markdown"
    return metadata.get_payload(decode=True).decode()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    copy = tmp_path_factory.mktemp("project")
    for name in FILES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(project):
    return build(project)


def test_every_file_of_the_package_is_in_it(wheel):
    there = {name for name in wheel.namelist() if ".dist-info/" not in name}
    ours = (file for file in (ROOT / "src" / "hardpatch").rglob("*") if file.is_file())
    assert there == {str(file.relative_to(ROOT / "src")) for file in ours if "__pycache__" not in file.parts}
    assert {"hardpatch/py.typed", "hardpatch/figures/templates/report.html.j2"} <= there


def test_its_command_and_its_licence(wheel):
    names = {name.split(".dist-info/")[-1]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert wheel.read(names["entry_points.txt"]).decode().split("\n")[1] == "hardpatch = hardpatch.cli:main"
    assert wheel.read(names["licenses/LICENSE"]) == (ROOT / "LICENSE").read_bytes()


def test_no_link_of_its_page_leads_nowhere(wheel):
    text = page(wheel)
    assert "# hardpatch" in text
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert all(link.startswith(("https://", "http://", "#")) for link in links)
    assert not re.search(r"<(img|a)\b", text)


def test_links_lead_to_the_repository_where_one_is_named(project, tmp_path):
    other = tmp_path / "project"
    shutil.copytree(project, other, ignore=shutil.ignore_patterns("build", "*.whl", "*.egg-info"))
    shutil.rmtree(other / "src")
    (other / "src" / "hardpatch").mkdir(parents=True)
    (other / "src" / "hardpatch" / "__init__.py").touch()
    settings = (other / "pyproject.toml").read_text()
    address = tomllib.loads(settings)["project"].get("urls", {}).get("Repository")
    if address is None:
        address = "https://git.example/hardpatch"
        named = f'[project.urls]\nRepository = "{address}"\n\n[project.scripts]'
        (other / "pyproject.toml").write_text(settings.replace("[project.scripts]", named))
    text = page(build(other))
    assert re.search(rf"!\[[^\]]+\]\({address}/raw/main/docs/\w+\.png\)", text)
    assert re.search(rf"[^!]\[[^\]]+\]\({address}/blob/main/docs/\w+\.md\)", text)
    assert not re.search(r"\]\(docs/", text)
