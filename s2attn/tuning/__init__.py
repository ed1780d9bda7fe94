"""Measuring kernels on this machine: problems, clocks, records, and the table of the fastest tiles."""
