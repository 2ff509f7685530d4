"""Which patches a network sees, and how they are varied."""
