"""A stack of transformer layers with random weights, shaped like known models: what training and prefill are timed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from s2attn.core import bad_value, check_block, check_int
from s2attn.patterns import Recipe

STACK_OPS = ("train", "prefill", "inference")
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""out ``(B, T, H, D)`` of a layer's number, q ``(B, T, H, D)`` and k, v ``(B, S, G, D)``: queries sit at the end of the keys."""
Step = Callable[[int, int, Tensor, Tensor, Tensor], Tensor]
"""out ``(B, T, H, D)`` of a layer's number, the position of the first new token, and q, k, v of the new tokens ``(B, T, heads, D)``: the
keys and values are kept behind those that came before, and the queries attend over all of them."""


@dataclass(frozen=True)
class StackCase:
    """A stack of ``layers`` layers of a model that has ``model_layers``, one sequence, random inputs.

    Attributes:
        op: ``"train"``: forward and backward, every layer computed again in the backward; ``"prefill"``: ``chunk`` tokens after the
            other over a contiguous cache of keys and values.
        recipe: the pattern of each layer. The stack holds as many dense layers in proportion as the model would.
        width, hidden: of the stream, and of the SwiGLU network.
        chunk: new tokens per step of a prefill.
    """

    name: str
    op: str
    recipe: Recipe
    seqlen: int
    layers: int
    model_layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    block: int = 64
    dtype: str = "bfloat16"
    chunk: int = 8192
    base: float = 10000.0

    def __post_init__(self) -> None:
        if self.op not in STACK_OPS:
            raise bad_value("op", f"must be one of {', '.join(STACK_OPS)}", repr(self.op))
        for field in ("seqlen", "layers", "model_layers", "width", "hidden", "heads", "kv_heads", "head_dim", "chunk"):
            check_int(field, getattr(self, field), 1)
        if self.heads % self.kv_heads:
            raise bad_value("heads", f"must be a multiple of kv_heads ({self.kv_heads})", self.heads)
        check_block("block", self.block)

    @property
    def room(self) -> int:
        """Tokens that a sequence has in the end."""
        return self.seqlen

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """(first token, last token + 1) of every step: all at once in training."""
        size = self.seqlen if self.op == "train" else self.chunk
        return [(start, min(start + size, self.seqlen)) for start in range(0, self.seqlen, size)]

    def facts(self) -> dict[str, Any]:
        """The case as plain values for a record."""
        names = ("seqlen", "layers", "model_layers", "width", "hidden", "heads", "kv_heads", "head_dim", "block", "dtype")
        found = {"case": self.name, "op": self.op, "pattern": repr(self.recipe), **{name: getattr(self, name) for name in names}}
        said = (
            f"measured on {self.layers} layers of a model of {self.model_layers}, without embedding, head and optimiser; not extrapolated"
        )
        return {**found, "batch": 1, **({} if self.op == "train" else {"chunk": self.chunk}), "measured": said}


class Layer(nn.Module):
    """Attention and a SwiGLU network, each behind an RMSNorm, each added to the stream."""

    def __init__(self, case: StackCase, dtype: torch.dtype, device: str):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = case.heads, case.kv_heads, case.head_dim
        wide, made = (case.heads + 2 * case.kv_heads) * case.head_dim, {"bias": False, "dtype": dtype, "device": device}
        self.norm_attention = nn.RMSNorm(case.width, dtype=dtype, device=device)
        self.project_in = nn.Linear(case.width, wide, **made)
        self.project_out = nn.Linear(case.heads * case.head_dim, case.width, **made)
        self.norm_mlp = nn.RMSNorm(case.width, dtype=dtype, device=device)
        self.gate_up = nn.Linear(case.width, 2 * case.hidden, **made)
        self.down = nn.Linear(case.hidden, case.width, **made)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        qkv = self.project_in(self.norm_attention(x)).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        x = x + self.project_out(attend(rotate(q, rotation), rotate(k, rotation), v).flatten(2))
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Stack(nn.Module):
    """The layers of a case, and their two uses; the way to attend comes with the call, so that all peers share the weights."""

    def __init__(self, case: StackCase, device: str, seed: int = 0):
        super().__init__()
        self.case, dtype = case, getattr(torch, case.dtype)
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Layer(case, dtype, device) for _ in range(case.layers))
        self.cos_sin = rotations(case, device, dtype)

    def rotation(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        cos, sin = self.cos_sin
        return cos[start:end], sin[start:end]

    def train_step(self, x: Tensor, dout: Tensor, attend: Attention) -> list[Tensor]:
        """The gradients of all weights for an output gradient; each layer is computed again on the way back."""
        rotation = self.rotation(0, x.shape[1])
        for number, layer in enumerate(self.layers):
            own = lambda q, k, v, number=number: attend(number, q, k, v)  # noqa: E731
            x = checkpoint(layer, x, rotation, own, use_reentrant=False, preserve_rng_state=False)  # pyrefly: ignore
        return list(torch.autograd.grad(x, list(self.parameters()), dout))

    @torch.no_grad()
    def advance(self, x: Tensor, start: int, step: Step) -> Tensor:
        """The output for new tokens ``x (B, T, width)`` at positions from ``start`` on."""
        rotation = self.rotation(start, start + x.shape[1])
        for number, layer in enumerate(self.layers):
            own = lambda q, k, v, number=number: step(number, start, q, k, v)  # noqa: E731
            x = layer(x, rotation, own)
        return x

    def prefill(self, x: Tensor, step: Step) -> Tensor:
        """The output of the last chunk of ``x (B, S, width)``."""
        out = x
        for start, end in self.case.chunks:
            out = self.advance(x[:, start:end], start, step)
        return out


@dataclass(frozen=True)
class Contiguous:
    """A `Step` over keys and values one after another: ``cache`` is ``(layers, 2, B, S, G, D)``, and is filled as tokens come."""

    cache: Tensor
    attend: Attention

    def __call__(self, layer: int, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache[layer]
        end = start + k.shape[1]
        keys[:, start:end], values[:, start:end] = k, v
        return self.attend(layer, q, keys[:, :end], values[:, :end])


def rotations(case: StackCase, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``(S, 1, D / 2)`` of the rotary angles."""
    frequencies = case.base ** (-torch.arange(0, case.head_dim, 2, device=device, dtype=torch.float32) / case.head_dim)
    angles = torch.arange(case.room, device=device, dtype=torch.float32)[:, None, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the two halves of every head by the angles of its position."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
