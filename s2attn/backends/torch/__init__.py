"""Plain torch on any device: gather the listed key blocks, multiply in batches, and take a masked softmax."""

from s2attn.backends.torch.backend import Torch

__all__ = ["Torch"]
