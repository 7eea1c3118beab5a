"""Python and the packages: read from what is installed, without importing any of it."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from importlib import metadata

from hardpatch.runtime.extras import install
from hardpatch.tools.doctor.findings import Finding

EXTRAS = {
    "datasets": "hf: sources",
    "http": "https:// sources",
    "s3": "s3:// sources",
    "dicom": "DICOM images",
    "dense": "hardpatch evaluate segment and detect",
    "hf": "hardpatch export --format hf",
    "onnx": "hardpatch export --format onnx",
    "bench": "hardpatch benchmark peers",
}
"""What each set of optional packages is for."""

CORE = ("hardpatch", "torch", "torchvision", "timm")
"""Their versions are told."""


def look_at_software() -> Iterator[Finding]:
    """Versions, packages that are missing or do not match, and what is not installed but could be."""
    there = ", ".join(f"{name} {value}" for name in CORE if (value := _version(name)))
    yield Finding("versions", "ok", f"{platform.platform()}, Python {platform.python_version()}, {there}")
    if _version("hardpatch") is None:
        yield Finding(
            "packages", "problem", "hardpatch runs from a folder without being installed: what it needs is not known",
            "pip install -c constraints.txt . in its folder",
        )  # fmt: skip
        return
    try:
        broken = [told for package in ("hardpatch", "torchvision") for told in _unmet(package, extra="")]
        absent = {extra: use for extra, use in EXTRAS.items() if any(_unmet("hardpatch", extra=extra))}
    except ImportError:
        yield Finding("packages", "problem", "packaging is not installed", "pip install packaging")
        return
    if broken:
        advice = "install what is named, or hardpatch anew into a fresh environment, by its constraints file"
        yield Finding("packages", "problem", "; ".join(broken), advice)
    else:
        yield Finding("packages", "ok", "all that hardpatch needs are there, in versions that match")
    if absent:
        uses = "; ".join(f"{use}: {install(extra)}" for extra, use in absent.items())
        yield Finding("optional packages", "note", f"not installed, or too old: {', '.join(absent)}", uses)
    else:
        yield Finding("optional packages", "ok", "all there")


def _unmet(package: str, *, extra: str) -> Iterator[str]:
    """What an installed package asks for, with or without an extra, and does not find.

    Raises:
        ImportError: packaging is missing.
    """
    from packaging.requirements import Requirement
    from packaging.version import InvalidVersion, Version

    for line in metadata.requires(package) or () if _version(package) else ():
        wanted = Requirement(line)
        named = re.findall(r"""extra\s*==\s*["']([^"']+)["']""", line)
        if (named != [extra] if extra else bool(named)) or wanted.name == package:
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
            continue
        version = _version(wanted.name)
        if version is None:
            yield f"{package} needs {wanted.name}{wanted.specifier}, which is not installed"
            continue
        try:  # of builds between two releases, as NVIDIA's containers have them, the release that they become counts
            met = wanted.specifier.contains(version, prereleases=True) or (
                Version(version).is_prerelease and wanted.specifier.contains(Version(version).base_version)
            )
        except InvalidVersion:
            continue  # of somebody's own making: nothing can be said of it
        if not met:
            yield f"{package} needs {wanted.name}{wanted.specifier}, here is {version}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
