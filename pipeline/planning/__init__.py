"""From a fingerprint and a memory budget to a plan."""
