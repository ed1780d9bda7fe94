"""Plans of context parallelism, on no network at all: exact by brute force, refused when they are garbage, quick at any size."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import s2attn
from s2attn import ByRange, Dense, Local, Pattern, Sink, Stride, Window, balanced_shards, build_layout, context_traffic, describe, preset
from s2attn.distributed.plan import RankPlans, plans_of
from s2attn.distributed.shards import Shards
from s2attn.distributed.traffic import WAYS, Traffic, ask, traffic_of
from tests.support.strategies import patterns

H, G = 4, 2


@dataclass(frozen=True)
class Case:
    """A sharded call: ``cuts`` parts dealt by a seed, and packed sequences or one."""

    ranks: int
    tokens: int
    parts: int
    seed: int
    lengths: tuple[int, ...] | None
    block: int
    causal: bool

    @property
    def shards(self) -> Shards:
        order = np.random.default_rng(self.seed).permutation(self.ranks * self.parts)
        return Shards.of_chunks(self.ranks * self.tokens * self.parts, order.reshape(self.ranks, self.parts).tolist())

    @property
    def sequences(self) -> tuple[int, ...]:
        """Lengths that add up to the tokens of all ranks."""
        total = self.shards.seqlen
        if self.lengths is None:
            return (total,)
        ends = np.minimum(np.cumsum(self.lengths), total).tolist()
        return tuple(np.diff([0, *ends, total]).tolist())


cases = st.builds(
    Case,
    st.integers(1, 5),
    st.integers(1, 60),
    st.integers(1, 3),
    st.integers(0, 99),
    st.one_of(st.none(), st.lists(st.integers(0, 120), min_size=1, max_size=4).map(tuple)),
    st.sampled_from([16, 32]),
    st.booleans(),
)


def needed(pattern: Pattern, case: Case) -> np.ndarray:
    """Token by token, from the dense mask: which keys each rank needs for each KV head, whole blocks of them, ``(ranks, G, tokens)``."""
    cu = torch.tensor([0, *case.sequences]).cumsum(0)
    layout = build_layout(pattern, H, G, block=case.block, causal=case.causal, cu_seqlens_q=cu, cu_seqlens_k=cu)
    masks = layout.to_dense().numpy()
    block = np.repeat(np.arange(len(layout.k_spans)), layout.k_spans.length.numpy())
    found = np.zeros((case.ranks, G, len(block)), dtype=bool)
    for rank in range(case.ranks):
        mine = case.shards.positions(rank).numpy()
        for head, mask in enumerate(masks):
            read = np.bincount(block[mask[mine].any(0)], minlength=len(layout.k_spans)) > 0
            for kv in range(head * G // len(masks), max(head * G // len(masks) + 1, (head + 1) * G // len(masks))):
                found[rank, kv] |= read[block]
    return found


@settings(max_examples=60)
@given(patterns(), cases)
@example(Stride(2, block=16) | Stride(3, block=32), Case(3, 40, 2, 1, (33, 0, 50), 16, True))
def test_each_rank_gets_what_its_rows_list_and_nothing_else(pattern: Pattern, case: Case) -> None:
    shards, read = case.shards, needed(pattern, case)
    traffic = traffic_of(ask(pattern, H, G, shards, lengths=case.sequences, block=case.block, causal=case.causal))
    own = np.stack([np.isin(np.arange(shards.seqlen), shards.positions(rank).numpy()) for rank in range(shards.ranks)])
    foreign = read & ~own[:, None, :]
    assert traffic.read.tolist() == read.sum((1, 2)).tolist()
    assert traffic.received.tolist() == foreign.sum((1, 2)).tolist()
    assert traffic.sent.tolist() == [(foreign.sum((0, 1)) * held).sum() for held in own]


def brought(plans: list[RankPlans], rank: int, parts: list[Tensor]) -> Tensor:
    """The slots of a rank, filled as the exchange fills them; ``parts`` are all ranks' keys."""
    plan = plans[rank].exchange
    rows = [part.flatten(1, 2) for part in parts]
    arrived = [rows[peer][:, plans[peer].exchange.send.split(plans[peer].exchange.send_splits)[rank]] for peer in range(len(plans))]
    assert [part.shape[1] for part in arrived] == plan.place_splits
    slots = rows[0].new_zeros(rows[0].shape[0], plan.layout.seqlen_k * G, rows[0].shape[-1])
    slots[:, plan.place], slots[:, plan.own_place] = torch.cat(arrived, 1), rows[rank][:, plan.own]
    return slots.unflatten(1, (-1, G))


@settings(max_examples=40)
@given(patterns(), cases)
def test_local_layouts_hold_their_invariants_and_give_the_rows_of_the_whole(pattern: Pattern, case: Case) -> None:
    shards = case.shards
    made = torch.Generator().manual_seed(case.seed)
    q, k, v = (torch.randn(1, shards.seqlen, heads, 8, generator=made, dtype=torch.float64) for heads in (H, G, G))
    cu = torch.tensor([0, *case.sequences]).cumsum(0)
    packing: Any = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "causal": case.causal, "block": case.block, "return_lse": True}
    expected = s2attn.attention(q[0], k[0], v[0], pattern, **packing)
    asked = ask(pattern, H, G, shards, lengths=case.sequences, block=case.block, causal=case.causal)
    plans = [plans_of(asked, rank) for rank in range(shards.ranks)]
    keys, values = ([shards.split(x, rank) for rank in range(shards.ranks)] for x in (k, v))
    rank = case.seed % shards.ranks
    mine, plan = shards.split(q, rank), plans[rank]
    found = [_attend(mine, brought(plans, rank, keys), brought(plans, rank, values), plan.exchange.layout)]
    gathered = (_placed(torch.cat(x, 1), plan.gather.place, plan.gather.layout.seqlen_k) for x in (keys, values))
    found.append(_attend(mine, *gathered, plan.gather.layout))
    parts = []
    for holder, layout in enumerate(plan.ring.layouts):
        if layout is not None:
            chunk = (_placed(x[holder], plan.ring.places[holder], plan.ring.slots[holder]) for x in (keys, values))
            parts.append(_attend(mine, *chunk, layout))
    if parts:
        found.append(s2attn.merge(parts))
    for out, lse in found:
        torch.testing.assert_close(out[0], shards.split(expected[0], rank, 0), atol=1e-12, rtol=0)
        torch.testing.assert_close(lse[0], shards.split(expected[1], rank, 1), atol=1e-12, rtol=0)


def _placed(x: Tensor, place: Tensor, slots: int) -> Tensor:
    return x.new_zeros(1, slots, *x.shape[2:]).index_copy_(1, place, x)


def _attend(q: Tensor, k: Tensor, v: Tensor, layout: Any) -> tuple[Tensor, Tensor]:
    return s2attn.attention(q, k, v, layout.validate(), causal=False, return_lse=True)


def test_128k_on_8_ranks_sends_no_more_than_what_is_listed() -> None:
    """S2 at about 6 % density: the union of the listed blocks, read off the lists one by one, and nothing beside it."""
    seqlen, ranks, pattern = 131072, 8, Local(16) | Stride(24)
    assert 0.055 < describe(pattern, 24, 24, seqlen).density < 0.065
    layout = build_layout(pattern, 24, 24, seqlen)
    shards = Shards.zigzag(seqlen, ranks)
    traffic = context_traffic(pattern, 24, shards=shards)
    line_rank = np.empty(seqlen // 64, dtype=np.int64)
    for rank in range(ranks):
        line_rank[shards.positions(rank).numpy()[::64] // 64] = rank
    union = np.zeros(ranks, dtype=np.int64)
    for head in range(24):
        begin, end = int(layout.rows.ptr[head, 0]), int(layout.rows.ptr[head, -1])
        row = np.repeat(np.arange(len(line_rank)), layout.rows.counts[head].numpy())
        seen = np.zeros((ranks, len(line_rank)), dtype=bool)
        seen[line_rank[row], layout.rows.idx[begin:end].numpy()] = True
        seen[line_rank, np.arange(len(line_rank))] = False  # its own
        union += seen.sum(1) * 64
    assert (traffic.received <= 1.1 * union).all() and traffic.received.tolist() == union.tolist()
    pair = 2 * 128 * 2
    exchange, gather = (traffic.busiest(way, pair, 2 * pair, backward=True) for way in ("exchange", "all-gather"))
    assert exchange < 0.1 * gather and traffic.fewest(pair, 2 * pair, backward=True) == "exchange"


@pytest.mark.parametrize("name", ["s2", "power_attention", "bigbird", "longnet", "streaming_llm"])
def test_ten_million_tokens_on_1024_ranks_are_planned_in_seconds(name: str) -> None:
    """Processor time, which a busy machine changes little."""
    pattern, seqlen = preset(name), 10 << 20
    assert isinstance(pattern, Pattern)
    start = time.process_time()
    traffic = context_traffic(pattern, 32, 8, seqlen, shards=("zigzag", 1024))
    assert time.process_time() - start < 10
    assert traffic.received.sum() == traffic.sent.sum() > 0
    assert traffic.received.max() < seqlen * 8


def test_bytes_of_ways_are_those_of_their_collectives() -> None:
    traffic = context_traffic(Dense(), 2, 2, 64, shards=("contiguous", 4), block=16)
    forward = {way: [part.tolist() for part in traffic.moved(way, 10, 20)] for way in WAYS}
    assert forward["all-gather"] == forward["ring"] == [[3 * 32 * 10] * 4] * 2
    assert forward["exchange"] == [[32 * 10 * n for n in (3, 2, 1, 0)], [32 * 10 * n for n in (0, 1, 2, 3)]]
    backward = {way: [part.tolist() for part in traffic.moved(way, 10, 20, backward=True)] for way in WAYS}
    assert backward["all-gather"][0] == [3 * 32 * 20] * 4
    assert backward["ring"][0] == [3 * 32 * 10 + 4 * 32 * 20] * 4
    assert backward["exchange"] == forward["exchange"][::-1]
    assert context_traffic(Dense(), 2, 2, 64, shards=("contiguous", 1)).busiest("ring", 10, 20, backward=True) == 0


def test_equal_bytes_are_gathered() -> None:
    """Everybody needs everything: the plain collective, without gathering and scattering rows."""
    assert context_traffic(Dense(), 2, 2, 64, shards=("contiguous", 4), causal=False).fewest(4, 4, backward=True) == "all-gather"


@pytest.mark.parametrize("pattern", [preset("s2"), preset("power_attention"), Dense(), preset("bigbird"), Sink(64) | Window(700)])
def test_balanced_shards_are_even(pattern: Pattern) -> None:
    seqlen, ranks = 65536, 8
    shards = balanced_shards(pattern, 8, 8, seqlen, ranks=ranks)
    traffic = context_traffic(pattern, 8, 8, shards=shards)
    assert shards.tokens == seqlen // ranks
    assert traffic.imbalance <= 1.03
    assert traffic.imbalance <= context_traffic(pattern, 8, 8, seqlen, shards=("contiguous", ranks)).imbalance


def test_layers_of_a_recipe_are_evened_together() -> None:
    recipe = s2attn.Recipe(Window(128), dense_layers=[1])
    assert balanced_shards(recipe, 2, 2, 16384, ranks=4, layers=2) == Shards.zigzag(16384, 4)
    assert balanced_shards(recipe, 2, 2, 65536, ranks=4, layers=1) == Shards.contiguous(65536, 4)
    packed = balanced_shards(Dense(), 2, 2, ranks=2, lengths=(256, 256, 256, 256))
    assert packed == Shards.contiguous(1024, 2)


def test_shards_split_and_join() -> None:
    shards = Shards.zigzag(48, 4)
    x = torch.randn(2, 48, 3)
    assert torch.equal(shards.join([shards.split(x, rank) for rank in range(4)]), x)
    assert shards == Shards.zigzag(48, 4) != Shards.contiguous(48, 4)
    assert hash(shards) == hash(Shards.zigzag(48, 4)) and shards.digest != Shards.contiguous(48, 4).digest


GARBAGE = {
    "must be a multiple of the number of ranks": lambda: Shards(10, 4, *np.zeros((3, 1), dtype=np.int64)),
    "one rank, start and length for each": lambda: Shards(8, 2, np.array([0, 1]), np.array([0, 4]), np.array([8])),
    "each of the 8 tokens once; got a gap or an overlap at 0": lambda: Shards(8, 2, np.array([0, 1]), np.array([0, 3]), np.array([4, 5])),
    "each of the 8 tokens once; got a gap or an overlap at 4": lambda: Shards(8, 2, np.array([0, 1]), np.array([0, 4]), np.array([4, 5])),
    "rank must ascend from 0 to 1": lambda: Shards(8, 2, np.array([1, 0]), np.array([0, 4]), np.array([4, 4])),
    "every rank 4 tokens; got 3 for rank 0": lambda: Shards(8, 2, np.array([0, 1]), np.array([0, 3]), np.array([3, 5])),
    "seqlen must be a multiple of 6": lambda: Shards.zigzag(16, 3),
    "rank must be in 0 .. 1": lambda: Shards.contiguous(8, 2).positions(2),
    "x must have 8 tokens on axis 1": lambda: Shards.contiguous(8, 2).split(torch.zeros(1, 7), 0),
    "parts must be one tensor for each of the 2 ranks": lambda: Shards.contiguous(8, 2).join([torch.zeros(1, 4)]),
    "must be a multiple of ranks \\* block": lambda: balanced_shards(Window(3), 1, 1, 100, ranks=2),
    "cu_seqlens must end at": lambda: context_traffic(Window(3), 1, 1, 8, shards=("contiguous", 2), lengths=(3, 4)),
    "seqlen must be that of the shards": lambda: context_traffic(Window(3), 1, 1, 16, shards=Shards.contiguous(8, 2)),
    "num_kv_heads must divide": lambda: context_traffic(Window(3), 3, 2, 8, shards=("contiguous", 2)),
    "way must be one of": lambda: context_traffic(Window(3), 1, 1, 8, shards=("contiguous", 2)).moved("post", 1, 1),
}


@pytest.mark.parametrize("said", GARBAGE)
def test_garbage_shards_are_refused(said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GARBAGE[said]()


def test_garbage_plans_are_refused() -> None:
    plan = plans_of(ask(ByRange([(0, 20, Dense()), (20, None, Stride(2, block=16))]), H, G, Shards.zigzag(128, 4)), 1).exchange
    broken = {
        "X1": {"send_splits": [plan.send_splits[0] + 1, *plan.send_splits[1:]]},
        "X1 splits": {"place_splits": plan.place_splits[:-1]},
        "X2": {"send": plan.send + plan.rows},
        "X2 rows": {"place": plan.place - 10_000},
        "X3": {"own_place": torch.cat([plan.own_place[:1], plan.own_place[:-1]])},
        "X3 no row": {"own": plan.own[:1].expand(len(plan.own))},
    }
    assert plan.validate(G) is plan
    for said, change in broken.items():
        with pytest.raises(ValueError, match=f"plan must hold its invariants \\({said}"):
            dataclasses.replace(plan, **change).validate(G)


def test_traffic_of_equal_calls_is_counted_once() -> None:
    one = context_traffic(Window(30), 2, 2, 128, shards=("zigzag", 4))
    assert isinstance(one, Traffic) and one is context_traffic(Window(30), 2, 2, shards=Shards.zigzag(128, 4))
