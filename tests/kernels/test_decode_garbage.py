"""Numbers that make no sense, given to the decode kernels unlooked at: clamped by rule, and no memory touched that is not theirs."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import s2attn
from s2attn import Sink, Window
from s2attn.backends import Requests
from s2attn.backends.triton import decode as launch
from s2attn.schedule import Cut
from tests.support import assert_close, dense_mask, eager, oracle

# The interpreter turns arrays of one element into scalars, which NumPy announces to refuse one day.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.usefixtures("triton_backend"),
]

FORMS = {"direct": Cut("direct"), "split": Cut("split", splits=3, least=32), "stream": Cut("stream", programs=4)}
PATTERN = Sink(3) | Window(25)
HEADS, PAGE, WIDTH, ENTRIES, PAGES, GUARD = 2, 16, 16, 4, 6, 512
ODD = [-1, -(2**31), 2**31 - 1, 99, PAGES]


def guarded(like: Tensor, fill: float) -> Tensor:
    """A copy in the middle of memory that holds something else."""
    whole = torch.full((like.numel() + 2 * GUARD,), fill, dtype=like.dtype)
    inside = whole[GUARD:-GUARD].view(like.shape)
    return inside.copy_(like)


class Fence:
    """Memory of results and workspaces with NaN around it, which must stay."""

    def __init__(self, monkeypatch):
        self.wholes: list[Tensor] = []
        plain = torch.Tensor.new_empty

        def fenced(like, *shape, **kinds):
            made = plain(like, *shape, **kinds)
            if not made.numel() or not made.is_floating_point():
                return made
            whole = torch.full((made.numel() + 2 * GUARD,), torch.nan, dtype=made.dtype)
            self.wholes.append(whole)
            return whole[GUARD:-GUARD].view(made.shape)

        monkeypatch.setattr(torch.Tensor, "new_empty", fenced)

    def check(self):
        assert self.wholes
        assert all(x[:GUARD].isnan().all() and x[-GUARD:].isnan().all() for x in self.wholes)


def some(count: int, sensible: list[int], odd: list[int]) -> Tensor:
    """Numbers of which about a third make no sense."""
    return torch.tensor([random.choice(odd if random.random() < 0.35 else sensible) for _ in range(count)], dtype=torch.int32)


def expected(q: Tensor, pools: list[Tensor], table: Tensor, lengths: list[int], cu: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """By the rules, eager and exact: out and lse with 0 and -inf for queries of no sequence."""
    sets = []
    for formula in (eager, oracle):
        out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full((HEADS, len(q)), -torch.inf, dtype=torch.float64)
        for line, length, (low, high) in zip(table.tolist(), lengths, pairwise(cu), strict=True):
            if high <= low or not length:
                continue
            there = torch.tensor([0 <= page < PAGES for page in line])
            k, v = (pool[[page if 0 <= page < PAGES else 1 for page in line]].flatten(0, 1)[:length] for pool in pools)
            mask = dense_mask(PATTERN, HEADS, 1, high - low, length) & there.repeat_interleave(PAGE)[:length]
            found = formula(q[None, low:high], k[None], v[None], mask)
            out[low:high], lse[:, low:high] = found[0][0].double(), found[1][0].double()
        sets.append((out, lse))
    return sets[0], sets[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [False, True], ids=["even", "packed"])
def test_garbage(form, packed, monkeypatch):
    monkeypatch.setattr(launch, "choose_cut", lambda *given, **more: FORMS[form])
    random.seed(form + str(packed))
    fence = Fence(monkeypatch)
    rising = 0
    for _ in range(8):
        batch, tokens = random.choice([1, 3]), random.choice([1, 5])
        total = tokens if packed else batch * tokens
        q = guarded(torch.randn(total, HEADS, WIDTH), torch.nan)
        pools = [guarded(torch.randn(PAGES, PAGE, 1, WIDTH), torch.nan) for _ in range(2)]
        for pool in pools:
            pool[0] = torch.nan  # what lies beside the table names page 0, and nothing else does
        table = guarded(some(batch * ENTRIES, [1, 2, 3, 4, 5], ODD).view(batch, ENTRIES), 0)
        lens = guarded(some(batch, [0, 1, 20, 63, 64], [-1, -(2**31), 65, 10**6, 2**31 - 1]), 40)
        call = {"block_table": table, "seq_lens": lens, "backend": "triton", "validate": False, "return_lse": True}
        lengths = lens.clamp(0, ENTRIES * PAGE).tolist()
        if packed:
            cu = guarded(some(batch + 1, list(range(total + 1)), [-7, -(2**31), total + 1, 2**31 - 1]), 1)
            if random.random() < 0.5:
                cu.copy_(cu.sort().values)
            out, lse = s2attn.decode(q, *pools, PATTERN, cu_seqlens_q=cu, **call)
            bounds = cu.clamp(0, total).tolist()
        else:
            out, lse = s2attn.decode(q.view(batch, tokens, HEADS, WIDTH), *pools, PATTERN, **call)
            out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
            bounds = [tokens * number for number in range(batch + 1)]
        assert out.isfinite().all() and not lse.isnan().any()
        if bounds == sorted(bounds):  # otherwise sequences overlap, and either may win
            rising += 1
            for name, got, plain, exact in zip(("out", "lse"), (out, lse), *expected(q, pools, table, lengths, bounds), strict=True):
                assert_close(name, got, plain, exact)
    assert rising
    fence.check()


def test_a_layout_that_is_shorter_than_the_table_and_spans_that_lie(triton_backend, monkeypatch):
    """Rows that a square layout does not have list nothing; query blocks of a packed one stay inside the queries and the sequences."""
    from s2attn import build_layout
    from s2attn.backends import Pages, Scoring

    fence = Fence(monkeypatch)
    pools = [guarded(torch.randn(PAGES, PAGE, 1, WIDTH), torch.nan) for _ in range(2)]
    pages = Pages(*pools, torch.arange(ENTRIES, dtype=torch.int32).view(1, 1, -1))
    q = guarded(torch.randn(1, 20, HEADS, WIDTH), torch.nan)
    short = build_layout(PATTERN, HEADS, 1, 32, block=16)
    out, lse = triton_backend.forward_paged(q, pages, Requests(torch.tensor([40]), None, False), short, Scoring(0.25))
    assert (out[0, 12:] == 0).all() and (lse[..., 12:] == -torch.inf).all() and lse[..., :12].isfinite().all()

    cu = torch.tensor([0, 20])
    packed = build_layout(PATTERN, HEADS, 1, block=16, cu_seqlens_q=cu, cu_seqlens_k=cu)
    for name, value in (("seq", 5), ("seq", -1), ("start", 10**6), ("start", -9), ("length", 10**6)):
        changed = getattr(packed.q_spans, name).clone()
        changed[1] = value
        layout = replace(packed, q_spans=replace(packed.q_spans, **{name: changed}), seqlen_q=20)
        out, lse = triton_backend.forward_paged(q, pages, Requests(torch.tensor([20]), cu, False), layout, Scoring(0.25))
        assert out.isfinite().all() and not lse.isnan().any()
    fence.check()
