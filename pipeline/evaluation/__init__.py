"""How good a segmentation is, as numbers and as a page."""
