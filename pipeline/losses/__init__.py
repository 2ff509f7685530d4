"""Losses of the segmentation step."""
