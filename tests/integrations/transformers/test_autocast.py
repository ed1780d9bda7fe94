"""Autocast over every family: rotary leaves q and k in float32 and v in bfloat16, as in mixed-precision training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import s2attn
from s2attn import Local, Recipe, Sink, Stride, Window
from s2attn.integrations.transformers import CACHE_ARGUMENT, PastKeyValues
from tests.integrations.transformers.models import FAMILIES, oracle, text, tiny

SPARSE = Recipe(Local(2, block=16) | Stride(3, block=16), layers={0: Sink(3) | Window(20)})


def loss_and_grads(model: Any, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.detach(), [weight.grad.float() for weight in model.parameters()]


def distance(got: list[Tensor], expected: list[Tensor]) -> float:
    """Relative Frobenius norm of the difference over all tensors."""
    wrong = sum(float((a - b).double().square().sum()) for a, b in zip(got, expected, strict=True))
    return (wrong / sum(float(b.double().square().sum()) for b in expected)) ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_training_under_autocast(family: str) -> None:
    model, tokens = tiny(family), text(2, 60)
    with oracle(model, SPARSE):
        exact = loss_and_grads(model, tokens)
        with torch.autocast("cpu", torch.bfloat16):
            plain = loss_and_grads(model, tokens)
    with s2attn.patched(model, SPARSE), torch.autocast("cpu", torch.bfloat16):
        got = loss_and_grads(model, tokens)
    assert abs(got[0] - exact[0]) <= 2 * abs(plain[0] - exact[0]) + 1e-3
    assert distance(got[1], exact[1]) <= 2 * distance(plain[1], exact[1])


@pytest.mark.parametrize("cache", ["none", "dynamic", "static", "sparse"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_cache_under_autocast(family: str, cache: str) -> None:
    model, tokens = tiny(family), text(2, 60)
    with oracle(model, SPARSE):
        exact = model(tokens, use_cache=False).logits
        with torch.autocast("cpu", torch.bfloat16):
            plain = model(tokens, use_cache=False).logits
    s2attn.patch(model, SPARSE)
    with torch.autocast("cpu", torch.bfloat16):
        if cache == "none":
            got = model(tokens, use_cache=False).logits
        else:
            past = {
                "dynamic": transformers.DynamicCache,
                "static": lambda: transformers.StaticCache(config=model.config, max_cache_len=64),
                "sparse": lambda: PastKeyValues.for_model(model, max_tokens=64, sequences=2),
            }[cache]()
            parts = []
            for begin, end in ((0, 50), (50, 59), (59, 60)):
                where: dict[str, Any] = {
                    "position_ids": torch.arange(begin, end)[None],
                    CACHE_ARGUMENT: past,
                }
                if transformers.__version__.startswith("4."):
                    where["cache_position"] = torch.arange(begin, end)
                parts.append(model(tokens[:, begin:end], use_cache=True, **where).logits)
            got = torch.cat(parts, 1)
    assert distance([got.float()], [exact]) <= 2 * distance([plain.float()], [exact])
