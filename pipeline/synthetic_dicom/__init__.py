"""Synthetic DICOM of known truth for tests, samples and benchmarks: series, other objects, and faults in them."""

from pipeline.synthetic_dicom.options import TRANSFER_SYNTAXES, PlantedIdentity, SeriesOptions
from pipeline.synthetic_dicom.series import write_series
from pipeline.synthetic_dicom.stored import WrittenSeries

__all__ = ["TRANSFER_SYNTAXES", "PlantedIdentity", "SeriesOptions", "WrittenSeries", "write_series"]
