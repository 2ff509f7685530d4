"""Ratios of what whole processes took, within rounds in which the sides took turns."""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

MEASURES = ("wall_seconds", "cpu_seconds", "peak_bytes")
PEER_PACKAGES = ("nnunetv2", "batchgenerators", "batchgeneratorsv2", "dynamic-network-architectures", "monai", "torch")


def ratios_of(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Of each measure the median and the range of voxfit's over nnU-Net's, taken within a round."""
    found = {
        measure: sorted(each["voxfit"][measure] / each["nnunet"][measure] for each in rounds) for measure in MEASURES
    }
    return {
        measure: {"median": round(statistics.median(each), 3), "range": [round(each[0], 3), round(each[-1], 3)]}
        for measure, each in found.items()
    }


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
