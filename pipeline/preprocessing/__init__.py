"""From native images to the store: crop, resample, normalise."""
