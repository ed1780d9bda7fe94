"""Quest over pages: bounds that follow what is stored, and choices that are those of a search over single pages."""

from __future__ import annotations

import pytest
import torch

import s2attn
from s2attn import Dense
from s2attn.selectors import KeyBounds, PageBounds

SIZE, WIDTH = 16, 8


class Cache:
    """Sequences of 2 KV heads whose pages lie anywhere."""

    def __init__(self, lengths, spare=4):
        most = -(-max(lengths) // SIZE)
        self.k_pages, self.v_pages = torch.full((2, len(lengths) * most + spare, SIZE, 2, WIDTH), torch.nan)
        self.table = torch.randperm(len(self.k_pages))[: len(lengths) * most].view(len(lengths), most)
        self.bounds, self.seq_lens = KeyBounds.of(self.k_pages), torch.tensor(lengths)
        self.k = [torch.randn(n, 2, WIDTH) for n in lengths]
        self.v = [torch.randn(n, 2, WIDTH) for n in lengths]
        for line, k, v in zip(self.table, self.k, self.v, strict=True):
            self.store(line, 0, k, v)

    def store(self, line, begin, k, v):
        at = begin + torch.arange(len(k))
        slots = line[at // SIZE] * SIZE + at % SIZE
        s2attn.store_kv(k, v, self.k_pages, self.v_pages, slots)
        self.bounds.store(k, slots)

    def arguments(self):
        return {"block_table": self.table, "seq_lens": self.seq_lens}


def by_search(q, k, top_k, sink):
    """Which pages a KV head of one sequence reads, one page after another."""
    (new, heads, width), (tokens, kv_heads, _) = q.shape, k.shape
    pages, group, found = -(-tokens // SIZE), heads // kv_heads, []
    for g in range(kv_heads):
        mass = torch.zeros(pages)
        for h in range(g * group, (g + 1) * group):
            for t in range(new):
                some = [n for n in range(pages) if n * SIZE <= tokens - new + t]
                logits = []
                for n in some:
                    keys = k[n * SIZE : (n + 1) * SIZE, g]
                    logits.append(torch.maximum(q[t, h] * keys.amin(0), q[t, h] * keys.amax(0)).sum() * width**-0.5)
                mass[some] += torch.softmax(torch.stack(logits), 0)
        tail = (new + SIZE - 2) // SIZE + 1
        forced = {n for n in range(pages) if n >= pages - tail} | ({0} if sink else set())
        rest = sorted(set(range(pages)) - forced, key=lambda n: -mass[n].item())
        found.append(sorted([*forced, *rest[: max(0, top_k - len(forced))]]))
    return found


@pytest.mark.parametrize("new", [1, 4, 17])
@pytest.mark.parametrize("sink", [True, False])
def test_pages_are_those_of_a_search(new, sink):
    cache = Cache([200, 37, 96])
    q = 3 * torch.randn(3, new, 4, WIDTH)
    chooser = PageBounds(top_k=5, block=SIZE, forced=("sink",) if sink else ())
    few = chooser.pages(q, cache.bounds, **cache.arguments())
    for b in range(3):
        for g, pages in enumerate(by_search(q[b], cache.k[b], 5, sink)):
            assert few["block_table"][b, g, : len(pages)].tolist() == cache.table[b, pages].tolist()
            tokens = cache.seq_lens[b].item() - (-(-cache.seq_lens[b].item() // SIZE) - len(pages)) * SIZE
            assert few["seq_lens"][b] == tokens


@pytest.mark.parametrize("new", [1, 5])
def test_attention_is_that_over_the_chosen_pages(new):
    cache = Cache([200, 37])
    q = 3 * torch.randn(2, new, 4, WIDTH)
    few = PageBounds(top_k=4, block=SIZE).pages(q, cache.bounds, **cache.arguments())
    out = s2attn.decode(q, cache.k_pages, cache.v_pages, Dense(), **few)
    for b in range(2):
        for h in range(4):
            pages = by_search(q[b], cache.k[b], 4, True)[h // 2]
            tokens = [t for n in pages for t in range(n * SIZE, min((n + 1) * SIZE, len(cache.k[b])))]
            for i in range(new):
                seen = [t for t in tokens if t <= len(cache.k[b]) - new + i]
                weights = torch.softmax(cache.k[b][seen, h // 2] @ q[b, i, h] * WIDTH**-0.5, 0)
                torch.testing.assert_close(out[b, i, h], weights @ cache.v[b][seen, h // 2], atol=1e-5, rtol=1e-5)


def test_with_room_for_all_pages_nothing_changes():
    cache = Cache([120, 64, 0])
    q = torch.randn(3, 1, 4, WIDTH)
    few = PageBounds(top_k=99, block=SIZE).pages(q, cache.bounds, **cache.arguments())
    assert few["seq_lens"].tolist() == [120, 64, 0]
    whole = s2attn.decode(q, cache.k_pages, cache.v_pages, Dense(), **cache.arguments())
    assert torch.equal(s2attn.decode(q, cache.k_pages, cache.v_pages, Dense(), **few), whole)


def test_bounds_follow_what_is_stored():
    cache = Cache([50])
    line = cache.table[0]
    exact = [cache.k[0][n * SIZE : (n + 1) * SIZE] for n in range(4)]
    assert torch.equal(cache.bounds.low[line], torch.stack([keys.amin(0) for keys in exact]))
    cache.store(line, 50, torch.full((1, 2, WIDTH), 9.0), torch.zeros(1, 2, WIDTH))
    assert bool((cache.bounds.high[line[3]] == 9.0).all()) and torch.equal(cache.bounds.low[line[3]], exact[3].amin(0))
    cache.store(line, 48, torch.zeros(1, 2, WIDTH), torch.zeros(1, 2, WIDTH))  # the page begins anew
    assert not cache.bounds.low[line[3]].any() and not cache.bounds.high[line[3]].any()


def test_slots_that_do_not_exist_are_left_out():
    bounds = KeyBounds.of(torch.zeros(2, 16, 1, 4))
    bounds.store(torch.ones(4, 1, 4), torch.tensor([-1, 32, 5, 1 << 40]))
    assert bounds.low[0].tolist() == [[1.0] * 4] and bool(torch.isinf(bounds.low[1]).all())


def test_evicted_pages_come_last():
    cache = Cache([160])
    cache.table = cache.table.clone()
    cache.table[0, [2, 3, 4, 5, 6]] = -1
    few = PageBounds(top_k=5, block=SIZE).pages(torch.randn(1, 1, 4, WIDTH), cache.bounds, **cache.arguments())
    assert bool((few["block_table"] >= 0).all()) and few["seq_lens"].tolist() == [80]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_k": 1}, "top_k must be at least 2: the pages of 1 new tokens and the first one; got 1"),
        ({"top_k": None, "threshold": 0.5}, "top_k must be given: a threshold keeps another number"),
        ({"block": 32}, "block must be the page_size of the bounds, 16; got 32"),
        ({"q": torch.ones(1, 1, 3, WIDTH)}, "q must be a tensor"),
        ({"block_table": torch.zeros(2, 3, dtype=torch.int64)}, "block_table must have shape"),
        ({"seq_lens": torch.zeros(2, dtype=torch.int64)}, r"seq_lens must have shape \(1,\)"),
    ],
)
def test_bad_arguments(change, words):
    cache = Cache([40])
    call = {"q": torch.ones(1, 1, 4, WIDTH), **cache.arguments()} | {
        k: v for k, v in change.items() if k in ("q", "block_table", "seq_lens")
    }
    settings = {"top_k": 4, "block": SIZE} | {k: v for k, v in change.items() if k in ("top_k", "threshold", "block")}
    with pytest.raises(ValueError, match=words):
        PageBounds(**settings).pages(call.pop("q"), cache.bounds, **call)


def test_bad_stores():
    bounds = KeyBounds.of(torch.zeros(2, 16, 1, 4))
    with pytest.raises(ValueError, match="k and slot_mapping must be tensors"):
        bounds.store(torch.ones(3, 1, 4), torch.tensor([1]))
    with pytest.raises(TypeError, match="slot_mapping must be an int32 or int64 tensor"):
        bounds.store(torch.ones(1, 1, 4), torch.tensor([1.0]))
    with pytest.raises(TypeError, match="k must have the dtype of the bounds"):
        bounds.store(torch.ones(1, 1, 4).half(), torch.tensor([1]))
    with pytest.raises(ValueError, match="k_pages must have a page_size among 16"):
        KeyBounds.of(torch.zeros(2, 48, 1, 4))
