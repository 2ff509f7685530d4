"""Options of `voxfit export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.checks import Checked

ExportFormat = Literal["onnx", "bundle"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Checked):
    """Write a trained run for other programs: ONNX, or a bundle that MONAI runs without voxfit."""

    run_dir: str
    """The run folder."""
    out: str
    """Where to: a file NAME.onnx, or for a bundle a folder or NAME.zip."""
    format: Literal["auto", "onnx", "bundle"] = "auto"
    """What is written; auto is onnx where out ends in .onnx, otherwise a bundle."""
    checkpoint: Literal["best", "last"] = "best"
    """Which weights; averaged ones (EMA) where the checkpoint has them."""
    overlap: float = 0.5
    """Share of the window that neighbouring windows of the bundle have in common."""
    overwrite: bool = False
    """Replace an earlier export."""

    @property
    def kind(self) -> ExportFormat:
        """The format with "auto" decided."""
        if self.format == "auto":
            return "onnx" if self.out.endswith(".onnx") else "bundle"
        return self.format

    def problems(self) -> list[str]:
        """What is wrong with these values, each as `key: problem`."""
        found = [] if 0 <= self.overlap < 1 else [f"overlap: must be from 0 to below 1, got {self.overlap}"]
        if (self.kind == "onnx") != self.out.endswith(".onnx"):
            expected = "must end in .onnx" if self.kind == "onnx" else "is a folder or ends in .zip"
            found.append(f"out: with format {self.format} it {expected}, got {self.out}")
        return found
