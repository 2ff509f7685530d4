"""From a trained run and a volume to a segmentation."""
