"""What `docs/numerics.md` says of errors, measured against float64 over random calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import s2attn
from s2attn import Dense, Local, Sink, Stride, Window, build_layout

PATTERNS = [Dense(), Local(2, block=16) | Stride(3, block=16), Sink(4) | Window(40)]
WIDTHS = [16, 32, 64, 80, 128]
HEADS = [(4, 2), (2, 2), (4, 1)]
NAMES = ("out", "dq", "dk", "dv")


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Plain attention, every step in the dtype of its inputs."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    logits = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhts,bshd->bthd", torch.softmax(logits.masked_fill(~mask, -torch.inf), dim=-1), v)


def results(call: Callable[..., Tensor], given: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    q, k, v = (x.to(dtype).requires_grad_() for x in given[:3])
    out = call(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), given[3].to(dtype))]


def error_ratios(seed: int, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Our error over eager's against float64, for a random call: of the root mean square, and of the largest."""
    made = torch.Generator().manual_seed(seed)
    tokens = int(torch.randint(17, 300, (1,), generator=made))
    dim, (heads, kv_heads), pattern = WIDTHS[seed % 5], HEADS[seed % 3], PATTERNS[seed // 2 % 3]
    shapes = [(1, tokens, h, dim) for h in (heads, kv_heads, kv_heads, heads)]
    given = [torch.randn(shape, generator=made).to(dtype) for shape in shapes]
    layout = build_layout(pattern, heads, kv_heads, tokens)
    mask = layout.to_dense().repeat_interleave(heads // layout.heads, dim=0)
    exact = results(lambda *x: eager(*x, mask), given, torch.float64)
    plain = results(lambda *x: eager(*x, mask), given, dtype)
    ours = results(lambda *x: s2attn.attention(*x, pattern), given, dtype)
    ratios = {}
    for name, true, theirs, mine in zip(NAMES, exact, plain, ours, strict=True):
        off, allowed = (mine - true).abs(), (theirs - true).abs()
        ratios[name] = (float(off.norm() / allowed.norm()), float(off.max() / allowed.max()))
    return ratios


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_those_that_the_page_names(dtype):
    trials = [error_ratios(seed, dtype) for seed in range(30)]
    for name in NAMES:
        assert max(trial[name][0] for trial in trials) <= (2.0 if dtype == torch.float32 else 1.0), name
        assert max(trial[name][1] for trial in trials) <= (4.0 if dtype == torch.float32 else 2.0), name
