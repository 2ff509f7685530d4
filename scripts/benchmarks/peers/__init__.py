"""The training steps of other toolkits, for comparisons: nnU-Net in an environment of its own, MONAI in this one."""
