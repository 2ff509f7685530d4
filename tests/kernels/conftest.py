"""Kernels run on a GPU where there is one, and in Triton's interpreter on the CPU where there is none."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install -e '.[test]' on Linux")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
