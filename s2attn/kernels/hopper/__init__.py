"""Kernels for Hopper in Gluon: a producer warp that loads by TMA, and two consumer warpgroups with products in flight."""
