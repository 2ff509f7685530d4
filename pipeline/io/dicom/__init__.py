"""DICOM series to `Volume`, structures and segmentations to labels, and labels back to DICOM segmentations."""
