"""Layouts from data: what chooses blocks of keys by looking at q and k, all of it standing on the `score` ops and one `select`."""

from s2attn.ops.selector import Call, Selector
from s2attn.selectors.base import MassSelector
from s2attn.selectors.hyper import hyper_attention
from s2attn.selectors.select import select
from s2attn.selectors.xattention import XAttention

__all__ = ["Call", "MassSelector", "Selector", "XAttention", "hyper_attention", "select"]
