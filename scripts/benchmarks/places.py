"""Where the project and its benchmarks lie."""

from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
PROJECT = BENCHMARKS.parents[1]
RESULTS = BENCHMARKS / "results"
