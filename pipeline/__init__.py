"""voxfit: 3D segmentation training that fits dense MRI and CT volumes onto the GPU at hand."""
