"""voxfit: 3D segmentation training that fits dense MRI and CT volumes onto the GPU at hand."""

__version__ = "0.1.0"
