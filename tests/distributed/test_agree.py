"""Ranks that call differently: an error that names what differs, on every rank, and the next call works."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import s2attn
from s2attn import HeadRange, Local, Window
from s2attn.distributed.context import context_attention
from s2attn.distributed.projection import overlapped_attention, overlapped_projection
from s2attn.distributed.traffic import WAYS
from s2attn.distributed.ulysses import ulysses_attention
from tests.support.ranks import Ended, run_here, run_ranks, values

RANKS, H, G, D, T, E = 2, 4, 2, 8, 32, 12
Call = Callable[..., Any]


def tensors(tokens: int = T, dtype: torch.dtype = torch.float32, grad: bool = False) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(3)
    shapes = ((1, tokens, H, D), (1, tokens, G, D), (1, tokens, G, D))
    return [torch.randn(shape, generator=made).to(dtype).requires_grad_(grad) for shape in shapes]


def context(way: str) -> Call:
    def call(pattern: Any, tokens: int = T, dtype: Any = torch.float32, grad: bool = False, **how: Any) -> Any:
        return context_attention(*tensors(tokens, dtype, grad), pattern, way=way, **how)

    return call


def ulysses(pattern: Any, tokens: int = T, dtype: Any = torch.float32, grad: bool = False, **how: Any) -> Any:
    batch = tokens // T  # tokens may differ between processes, the batch may not
    q, k, v = (x.expand(batch, -1, -1, -1) for x in tensors(T, dtype, grad))
    return ulysses_attention(q, k, v, pattern, **how)


def projection(pattern: Any, tokens: int = T, dtype: Any = torch.float32, grad: bool = False, **how: Any) -> Any:
    weight = torch.ones(E, H * D, dtype=dtype)
    return overlapped_projection(*tensors(tokens, dtype, grad), pattern, weight, rows=16, **how)


def block(pattern: Any, tokens: int = T, dtype: Any = torch.float32, grad: bool = False, **how: Any) -> Any:
    x = torch.ones(1, tokens, E, dtype=dtype, requires_grad=grad)
    into = torch.ones(H * D, E, dtype=dtype)

    def project(rows: torch.Tensor, begin: int) -> Any:
        q = (rows @ into.T).unflatten(-1, (H, D))
        return q, q[:, :, :G], q[:, :, :G]

    return overlapped_attention(x, project, pattern, torch.ones(E, H * D, dtype=dtype), rows=16, **how)


FUNCTIONS: dict[str, Call] = {
    **{f"context, {way}": context(way) for way in (*WAYS, "auto")},
    "ulysses": ulysses,
    "projection": projection,
    "block": block,
}
NAMES = {"ulysses": "ulysses_attention", "projection": "overlapped_projection", "block": "overlapped_attention"}


def one_against_all(name: str, call: Call, second: bool) -> dict[str, Callable[[], Any]]:
    """Calls in which the second rank differs; those that do not fit the function are left out."""
    own: dict[str, Callable[[], Any]] = {
        "scale": lambda: call(Window(8), scale=0.5 if second else 0.25),
        "softcap": lambda: call(Window(8), softcap=2.0 if second else None),
        "pattern": lambda: call(Window(9 if second else 8)),
        "layer": lambda: call(Window(8), layer=int(second)),
        "dtype": lambda: call(Window(8), dtype=torch.float64 if second else torch.float32),
        "shape": lambda: call(Window(8), tokens=2 * T if second else T),
        "refused here": lambda: call(Window(8), softcap=-1.0 if second else None),
        "function": lambda: ulysses(Window(8)) if second and name != "ulysses" else (projection if second else call)(Window(8)),
    }
    if name not in ("projection", "block"):
        own["causal"] = lambda: call(Window(8), causal=not second)
    if name != "projection":
        own["requires_grad"] = lambda: call(Window(8), grad=second)
    if name.startswith("context"):
        own["way"] = lambda: context("exchange" if second else "ring")(Window(8))
    return own


def said(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def swapped(call: Call, second: bool) -> str:
    """Two calls of one shape in two orders: without a comparison, keys of one would be read with the pattern of the other."""
    first, then = (Window(8), Local(1, block=16)) if not second else (Local(1, block=16), Window(8))
    return said(lambda: (call(first), call(then)))


def swapped_backward(call: Call, second: bool) -> str:
    outs = [call(Window(8), grad=True), call(Window(8), grad=True)]
    return said(lambda: [out.sum().backward() for out in (reversed(outs) if second else outs)])


def everything() -> dict[str, Any]:
    second = dist.get_rank() == 1
    began, found = time.monotonic(), {}
    for name, call in FUNCTIONS.items():
        for what, work in one_against_all(name, call, second).items():
            found[name, what] = said(work)
        found[name, "swapped"] = swapped(call, second)
        if name != "projection":
            found[name, "swapped backward"] = swapped_backward(call, second)
        # Disagreement leaves the group usable.
        found[name, "after"] = said(lambda call=call: call(Window(8)).sum())
    x = tensors()[0]
    found["validate"] = said(lambda: context_attention(x, x, x, Window(8), validate=1))  # pyrefly: ignore
    return {"found": found, "seconds": time.monotonic() - began, "right": right(), "unchecked": unchecked()}


def right() -> float:
    """The value of a call after all those errors."""
    q, k, v = tensors(RANKS * T)
    part = slice(dist.get_rank() * T, (dist.get_rank() + 1) * T)
    out = context_attention(q[:, part], k[:, part], v[:, part], Window(8))
    return float((out - s2attn.attention(q, k, v, Window(8))[:, part]).abs().max())


def unchecked() -> tuple[int, int]:
    """Collectives of a forward and backward with and without the comparison."""
    renamed = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    plain, sent = getattr(dist, renamed), []
    setattr(dist, renamed, lambda *args, **kwargs: (sent.append(1), plain(*args, **kwargs)))
    counts = []
    try:
        for validate in (True, False):
            context("exchange")(Window(8), grad=True, validate=validate).sum().backward()
            counts.append(len(sent))
            sent.clear()
    finally:
        setattr(dist, renamed, plain)
    return counts[0], counts[1]


@pytest.fixture(scope="module")
def ended() -> list[Ended]:
    return run_ranks(__file__, "everything", RANKS, seconds=150)


def test_every_difference_is_an_error_on_every_rank_that_names_it(ended: list[Ended]) -> None:
    first, second = (one["found"] for one in values(ended))
    expected = {
        "scale": "; got scale 0.25 on rank 0 and 0.5 on rank 1",
        "softcap": "; got softcap None on rank 0 and 2.0 on rank 1",
        "causal": "; got causal True on rank 0 and False on rank 1",
        "layer": "; got layer 0 on rank 0 and 1 on rank 1",
        "way": "way ring on rank 0 and exchange on rank 1",
        "pattern": '; got pattern {"pattern":{"n":8,"type":"Window"},"version":1} on rank 0 and {"pattern":{"n":9,',
        "requires_grad": "; got requires_grad of ",
    }
    for (name, what), text in ((key, text) for key, text in first.items() if isinstance(key, tuple)):
        function = NAMES.get(name, "context_attention")
        if what == "after":
            assert (text, second[name, what]) == ("nothing", "nothing")
            continue
        if what == "refused here":
            reason = "ValueError: softcap must be positive and finite; got -1.0"
            rule = f"ValueError: {function} must be called alike on all ranks; got "
            assert (text, second[name, what]) == (f"{rule}{reason} on rank 1", reason), (name, text)
            continue
        if what == "function":
            other = "ulysses_attention" if name != "ulysses" else "overlapped_projection"
            rule = "must be called alike on all ranks; got function"
            assert text == f"ValueError: {function} {rule} {function} on rank 0 and {other} on rank 1"
            assert second[name, what].startswith(f"ValueError: {other} {rule}")
            continue
        assert text == second[name, what], (name, what)
        if what == "swapped backward":
            assert text.startswith("ValueError: the backward of"), (name, text)
            assert "number of the forward call" in text
        else:
            assert text.startswith(f"ValueError: {function} must be called alike on all ranks; got "), (name, what, text)
        if what in expected:
            assert expected[what] in text, (name, what, text)
        if what == "dtype":
            assert "dtype torch.float32 on rank 0 and torch.float64 on rank 1" in text
        if what == "shape":
            assert "(1, " in text and " on rank 0 and " in text, text


def test_nobody_waits_for_the_timeout_of_the_group(ended: list[Ended]) -> None:
    assert all(found["seconds"] < 50 for found in values(ended))


def test_the_next_call_is_right(ended: list[Ended]) -> None:
    assert all(found["right"] < 1e-5 for found in values(ended))


def test_without_validation_nothing_is_compared(ended: list[Ended]) -> None:
    assert all(found["unchecked"] == (2, 0) for found in values(ended))
    assert all(found["found"]["validate"] == "TypeError: validate must be a bool; got int" for found in values(ended))


def three() -> str:
    scale = {0: 0.5, 1: 0.25, 2: 0.5}[dist.get_rank()]
    return said(lambda: context("all-gather")(Window(8), scale=scale, heads=HeadRange(0, H, H, G)))


def test_the_ranks_that_differ_are_named() -> None:
    text = "ValueError: context_attention must be called alike on all ranks; got scale 0.5 on ranks 0, 2 and 0.25 on rank 1"
    assert values(run_ranks(__file__, "three", 3, seconds=90)) == [text] * 3


if __name__ == "__main__":
    run_here(globals())
