"""Attention over several processes, on `torch.distributed`."""
