"""What may be seen: patterns are values without tensors, composed, printed, hashed, and carried as JSON."""

from s2attn.patterns.base import And, Head, Or, Pattern
from s2attn.patterns.cells import Cells, Shape, View
from s2attn.patterns.chosen import Blocks, Random
from s2attn.patterns.compose import ByRange, PerHead
from s2attn.patterns.grid import Dilated, Grid, Local, LongNet, Power, Stride
from s2attn.patterns.parse import parse_pattern
from s2attn.patterns.presets import PRESETS, preset
from s2attn.patterns.recipe import Recipe
from s2attn.patterns.runs import Runs
from s2attn.patterns.token import CAUSAL, Dense, Global, Sink, Window

__all__ = [
    "CAUSAL",
    "PRESETS",
    "And",
    "Blocks",
    "ByRange",
    "Cells",
    "Dense",
    "Dilated",
    "Global",
    "Grid",
    "Head",
    "Local",
    "LongNet",
    "Or",
    "Pattern",
    "PerHead",
    "Power",
    "Random",
    "Recipe",
    "Runs",
    "Shape",
    "Sink",
    "Stride",
    "View",
    "Window",
    "parse_pattern",
    "preset",
]
