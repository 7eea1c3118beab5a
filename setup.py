"""The project's page on a package index: README.md, whose relative links would lead nowhere there.

They lead to the ``Repository`` of ``[project.urls]`` in pyproject.toml; without one, pictures are left out, and of
other links only the words stay.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT.get("urls", {}).get("Repository")


def link_outside(link: re.Match[str]) -> str:
    """A relative link or picture as it works on any page."""
    picture, words, path = link.groups()
    if REPOSITORY is None:
        return "" if picture else words
    return f"{picture}[{words}]({REPOSITORY}/{'raw' if picture else 'blob'}/main/{path})"


setup(
    long_description=re.sub(
        r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)", link_outside, Path("README.md").read_text()
    ),
    long_description_content_type="text/markdown",
)
