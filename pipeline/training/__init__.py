"""The training loop, on top of Lightning."""
