"""Layouts from data: what chooses blocks of keys by looking at q and k, all of it standing on the `score` ops and one `select`."""

from s2attn.ops.selector import Call, Selector
from s2attn.selectors.base import MassSelector
from s2attn.selectors.calibrate import calibrate
from s2attn.selectors.family import Gated, MeanPool, PageBounds
from s2attn.selectors.hyper import hyper_attention
from s2attn.selectors.lines import FlexPrefill, VerticalSlash
from s2attn.selectors.quest import KeyBounds
from s2attn.selectors.select import select
from s2attn.selectors.xattention import XAttention

__all__ = [
    "Call",
    "FlexPrefill",
    "Gated",
    "KeyBounds",
    "MassSelector",
    "MeanPool",
    "PageBounds",
    "Selector",
    "VerticalSlash",
    "XAttention",
    "calibrate",
    "hyper_attention",
    "select",
]
