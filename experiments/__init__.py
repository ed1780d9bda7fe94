"""Judging patterns, and small training runs that show what a pattern is worth."""
