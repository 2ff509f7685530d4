"""Files on disk to `Volume` and back."""
