"""Timings that can be trusted: cases, peers in turn, an oracle before every number, and records that only the runner writes."""
