"""Ratios of what whole processes took, within rounds in which the sides took turns."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MEASURES = ("wall_seconds", "cpu_seconds", "peak_bytes")
PEER_PACKAGES = ("nnunetv2", "batchgenerators", "batchgeneratorsv2", "dynamic-network-architectures", "monai", "torch")


def ratios_of(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Of each measure the median and the range of voxfit's over nnU-Net's, taken within a round."""
    return {
        measure: median_and_range([each["voxfit"][measure] / each["nnunet"][measure] for each in rounds], digits=3)
        for measure in MEASURES
    }


def median_and_range(values: Sequence[float], *, digits: int) -> dict[str, Any]:
    """For a results file."""
    least, middle, most = (round(each, digits) for each in (min(values), statistics.median(values), max(values)))
    return {"median": middle, "range": [least, most]}


def describe_ratios(ratios: dict[str, dict[str, Any]]) -> str:
    """One line."""
    parts = [f"{measure} {found['median']:.2f}" for measure, found in ratios.items()]
    return f"of nnU-Net's: {', '.join(parts)}"


def peer_versions(environment: Path) -> dict[str, str]:
    """Versions of what the peers' environment holds."""
    code = """
import json, sys
from importlib.metadata import version
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""
    command = [environment / "bin" / "python", "-c", code, *PEER_PACKAGES]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
