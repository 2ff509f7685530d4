"""Synthetic DICOM of known truth for tests, samples and benchmarks: series, other objects, and faults in them."""

from pipeline.synthetic_dicom.objects import (
    write_dose_report_screen,
    write_scout,
    write_secondary_capture,
    write_text_report,
)
from pipeline.synthetic_dicom.options import TRANSFER_SYNTAXES, PlantedIdentity, SeriesOptions, make_uid
from pipeline.synthetic_dicom.series import write_series
from pipeline.synthetic_dicom.stored import WrittenSeries
from pipeline.synthetic_dicom.structures import label_polygons, write_structures

__all__ = [
    "TRANSFER_SYNTAXES",
    "PlantedIdentity",
    "SeriesOptions",
    "WrittenSeries",
    "label_polygons",
    "make_uid",
    "write_dose_report_screen",
    "write_scout",
    "write_secondary_capture",
    "write_series",
    "write_structures",
    "write_text_report",
]
