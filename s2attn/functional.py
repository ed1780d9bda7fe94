"""The functions behind the modules of `s2attn.nn`, as torch.nn.functional stands behind torch.nn."""

from s2attn.ops import attention, merge

__all__ = ["attention", "merge"]
