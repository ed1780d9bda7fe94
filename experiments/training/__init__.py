"""`python -m experiments train`, a run from a file: text, tokens, packed batches, devices, checkpoints, and the job that joins them."""
