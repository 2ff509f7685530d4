"""Where cases come from: layouts, splits, integrity, fingerprint."""
