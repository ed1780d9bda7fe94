"""What Phi-3-small's configuration says about attention, as patterns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2attn.core import bad_kind, bad_value, check_block, check_int
from s2attn.patterns.base import Pattern
from s2attn.patterns.grid import Local, Stride

MODEL_TYPE = "phi3small"


def sparse_pattern(config: Any) -> Pattern:
    """The pattern of the layers that are not dense: local blocks, and one stripe in ``stride`` with an offset for each query head.

    Head h lists key blocks j with ``(j + h * step + 1) % stride == 0``, where ``step = max(1, stride // heads)``, or 0 where
    ``blocksparse_homo_head_pattern`` says that all heads are alike.
    """
    heads = check_int("num_attention_heads", field(config, "num_attention_heads"), 1)
    groups = check_int("num_key_value_heads", field(config, "num_key_value_heads"), 1)
    if heads % groups:
        raise bad_value("num_key_value_heads", f"must divide num_attention_heads ({heads})", groups)
    block = check_block("blocksparse_block_size", field(config, "blocksparse_block_size"))
    local = Local(check_int("blocksparse_num_local_blocks", field(config, "blocksparse_num_local_blocks"), 1), block)
    stride = check_int("blocksparse_vert_stride", field(config, "blocksparse_vert_stride"), 1)
    alike = field(config, "blocksparse_homo_head_pattern")
    if not isinstance(alike, bool):
        raise bad_kind("blocksparse_homo_head_pattern", "must be True or False", alike)
    if alike:
        return local | Stride(stride, offset=1, block=block)
    return local | Stride(stride, offset="spread", shift=1, block=block, heads="query")


def dense_every(config: Any) -> int | None:
    """n, where layer i sees everything if ``(i + 1) % n == 0``; None where no layer does."""
    every = field(config, "dense_attention_every_n_layers")
    return None if every is None or every == 0 else check_int("dense_attention_every_n_layers", every, 1)


def field(config: Any, name: str) -> Any:
    """A field of a mapping, or an attribute of any other object."""
    missing = object()
    value = config.get(name, missing) if isinstance(config, Mapping) else getattr(config, name, missing)
    if value is missing:
        raise bad_value("config", f"must be a Phi-3-small configuration with {name}", _name(config))
    return value


def check_model_type(config: Any) -> None:
    """Refuse the configuration of another model; one that does not say what it is for is taken by its fields."""
    kind = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
    if kind is not None and kind != MODEL_TYPE:
        raise bad_value("config", f"must have the model_type {MODEL_TYPE!r}", repr(kind))


def _name(config: Any) -> str:
    if not isinstance(config, Mapping):
        return type(config).__name__
    return f"an object with {', '.join(sorted(map(str, config)))[:120] or 'nothing'}"
