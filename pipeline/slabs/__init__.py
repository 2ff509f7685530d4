"""Stages of a network that never hold a whole activation: rows of planes are computed, used and dropped."""
