"""Versions of what this stands on, and the compressed kinds of DICOM that can be read."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from pipeline import __version__
from pipeline.doctor.facts import Fact

DISTRIBUTION = "voxfit"
# Compressed transfer syntaxes by pydicom's names of them.
SYNTAXES = {
    "JPEG": "JPEGBaseline8Bit",
    "JPEG 12 bit": "JPEGExtended12Bit",
    "JPEG lossless": "JPEGLosslessSV1",
    "JPEG-LS": "JPEGLSLossless",
    "JPEG 2000": "JPEG2000Lossless",
    "HTJ2K": "HTJ2KLossless",
    "RLE": "RLELossless",
}


def find_versions() -> Iterator[Fact]:
    """Python, this package, and the packages that it requires; each that is missing or too old on its own."""
    python = f"{platform.python_version()} on {platform.platform()}"
    yield Fact(name="Python", text=python, value=platform.python_version())
    required = {_name_of(line): line for line in _requirements()}
    versions = {DISTRIBUTION: __version__, **{name: _version(name) for name in required}}
    shown = ", ".join(f"{name} {found or 'missing'}" for name, found in versions.items())
    advice = "" if required else f"{DISTRIBUTION} is not installed, and what it requires is not known; pip install -e ."
    yield Fact(name="packages", text=shown, value=versions, advice=advice)
    for name, requirement in required.items():
        if not _satisfies(versions[name], requirement):
            there = f"{name} {versions[name]} is installed" if versions[name] else f"{name} is not installed"
            advice = f'{there}, and {requirement} is required; pip install "{requirement}"'
            yield Fact(name=name, text=versions[name] or "not installed", value=versions[name], advice=advice)


def _requirements() -> list[str]:
    """Those that are not for an extra; none where the package runs from a folder and is not installed."""
    try:
        return [line for line in requires(DISTRIBUTION) or [] if "extra ==" not in line]
    except PackageNotFoundError:
        return []


def _name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _satisfies(found: str | None, requirement: str) -> bool:
    if found is None:
        return False
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return True
    return bool(Requirement(requirement).specifier.contains(found, prereleases=True))


def find_decoders() -> Iterator[Fact]:
    """Which compressed DICOM can be read, and by what."""
    from pydicom import uid
    from pydicom.pixels.decoders.base import get_decoder

    by = {name: list(get_decoder(getattr(uid, syntax)).available_plugins) for name, syntax in SYNTAXES.items()}
    missing = [name for name, plugins in by.items() if not plugins]
    advice = f"no decoder for DICOM compressed as {', '.join(missing)}; install what voxfit requires" if missing else ""
    shown = ", ".join(f"{name} ({', '.join(plugins) or 'none'})" for name, plugins in by.items())
    yield Fact(name="DICOM decoders", text=shown, value=by, advice=advice)
