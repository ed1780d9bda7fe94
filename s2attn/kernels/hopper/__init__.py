"""Kernels for Hopper (sm_90) in Gluon, Triton's lower language, where warps, barriers and copies are written out.

A program has three partitions: a producer warp, which walks the lists and feeds rings of tiles through the tensor memory accelerator, and
two consumer warp groups with 64 lines each. Gluon has no interpreter; `tests.support.gluon` runs this source on a CPU.
"""
