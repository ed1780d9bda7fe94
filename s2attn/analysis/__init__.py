"""Judging a pattern: density, reach, pictures; and probing pretrained models."""
