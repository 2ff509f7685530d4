"""The modules of `scripts/benchmarks`, for tests."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.fixture(scope="module")
def load(project_root):
    """Imports a module of `scripts/benchmarks` as when it is run: with its folder on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(project_root / "scripts" / "benchmarks")
        before = set(sys.modules)
        yield importlib.import_module
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("peers", "places", "run_facts", "against_peers"):
                sys.modules.pop(name)
