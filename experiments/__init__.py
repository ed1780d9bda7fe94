"""Small training runs that show what a pattern is worth: the demo, ablations, studies of reach, evidence."""
