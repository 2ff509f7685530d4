"""The 3D U-Net and what it is made of."""
