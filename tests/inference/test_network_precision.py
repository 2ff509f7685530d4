from __future__ import annotations

import pytest
import torch

from pipeline.errors import InputError
from pipeline.networks.precision import autocast, choose_device_type, choose_precision, cpu_has_bfloat16


def test_auto_follows_the_cpu() -> None:
    expected = "bf16-mixed" if cpu_has_bfloat16() else "32-true"
    choice = choose_precision("auto", device_type="cpu")
    assert choice.precision == expected
    assert "bfloat16" in choice.reason


def test_float32_is_kept_and_a_gpus_plan_serves_on_a_cpu() -> None:
    assert choose_precision("32-true", device_type="cpu").precision == "32-true"
    choice = choose_precision("16-mixed", device_type="cpu")
    assert choice.precision == choose_precision("auto", device_type="cpu").precision
    assert "not 16-mixed" in choice.reason


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
def test_autocast_computes_in_the_precision(precision: str, dtype: torch.dtype) -> None:
    with autocast(precision, "cpu"):  # type: ignore[arg-type]
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_a_gpu_that_is_not_there_is_named() -> None:
    assert choose_device_type("cpu") == "cpu"
    if torch.cuda.is_available():
        assert choose_device_type("gpu") == choose_device_type("auto") == "cuda"
        return
    with pytest.raises(InputError, match="accelerator: no GPU"):
        choose_device_type("gpu")
