"""Phi-3-small: a small native model that its published checkpoints load into, with S2-Attention where it was trained with it."""

from s2attn.integrations.phi3small.config import Phi3SmallConfig
from s2attn.integrations.phi3small.model import Phi3Small

__all__ = ["Phi3Small", "Phi3SmallConfig"]
