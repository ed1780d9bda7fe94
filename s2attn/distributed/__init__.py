"""Attention over several devices, on torch.distributed: context parallelism and tensor parallelism."""
