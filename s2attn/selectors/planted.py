"""Queries and keys with planted structure, on which the right choice of blocks is known; plain noise has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from s2attn.core import bad_value, check_int

STRUCTURES = ("verticals", "slashes", "bands")


@dataclass(frozen=True, eq=False)
class Sample:
    """What goes into attention: q ``(B, T, H, D)``, k ``(B, S, G, D)``, v ``(B, S, G, Dv)``."""

    q: Tensor
    k: Tensor
    v: Tensor


def planted(
    structure: str,
    *,
    seqlen: int,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    lines: int = 4,
    width: int = 32,
    strength: float = 12.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Sample:
    """Noise in which every head also looks at some lines of keys.

    Args:
        structure: "verticals", keys at some places, for all queries; "slashes", keys at some distances; "bands", the keys just before.
        seqlen, heads, kv_heads, head_dim: shape.
        lines: how many places or distances; a band is so many widths long.
        width: tokens that a line is thick.
        strength: by how many nats the logit of a planted key lies above that of others.
        seed: of everything drawn; each kind of device draws its own numbers.
        device: where everything is drawn, and lies.

    Raises:
        ValueError: an unknown structure, or numbers that do not fit.

    >>> planted("slashes", seqlen=256).q.shape
    torch.Size([1, 256, 4, 64])
    """
    if structure not in STRUCTURES:
        raise bad_value("structure", f"must be one of {', '.join(STRUCTURES)}", repr(structure))
    sizes = {"seqlen": seqlen, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "lines": lines, "width": width}
    for name, size in sizes.items():
        check_int(name, size, 1)
    if heads % kv_heads:
        raise bad_value("kv_heads", f"must divide heads ({heads})", kv_heads)
    runs = -(-seqlen // width)
    if lines > runs:
        raise bad_value("lines", f"must be at most seqlen / width ({runs})", lines)
    rng = torch.Generator(device).manual_seed(seed)
    draw: dict[str, Any] = {"generator": rng, "device": device}
    q, k = torch.randn(heads, seqlen, head_dim, **draw), torch.randn(kv_heads, seqlen, head_dim, **draw)
    run = torch.arange(seqlen, device=device) // width
    # Twice the root: one for the scale of attention, one shared by query and key.
    size = (strength * head_dim**0.5) ** 0.5
    for g in range(kv_heads):
        group = slice(g * heads // kv_heads, (g + 1) * heads // kv_heads)
        if structure == "verticals":
            theme = size * normalize(torch.randn(head_dim, **draw), dim=0)
            chosen = torch.randperm(runs, **draw)[:lines]
            k[g] += theme * torch.isin(run, chosen).unsqueeze(1)
            q[group] += theme
        else:
            codes = size * normalize(torch.randn(runs, head_dim, **draw), dim=1)
            back = torch.arange(lines) if structure == "bands" else torch.randperm(runs, **draw)[:lines]
            k[g] += codes[run]
            for distance in back.tolist():
                there = run - distance
                q[group] += codes[there.clamp(min=0)] * (there >= 0).unsqueeze(1)
    v = torch.randn(kv_heads, seqlen, head_dim, **draw)
    return Sample(*(x.transpose(0, 1).unsqueeze(0).contiguous() for x in (q, k, v)))
