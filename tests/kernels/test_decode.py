"""The decode kernels in Triton's interpreter against the float64 oracle: patterns, lengths, pages, forms; garbage."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

import s2attn
from s2attn import Dense, Layout, Local, PerHead, Recipe, Sink, Stride, Window, build_layout, preset
from s2attn.backends.triton import decode as launch
from s2attn.patterns import PRESETS
from s2attn.schedule import Cut, cuts
from tests.support import assert_close, dense_mask, eager, oracle
from tests.support.paging import Paged, scatter
from tests.support.problems import random_mask

# The interpreter turns arrays of one element into scalars, which NumPy announces to refuse one day.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.usefixtures("triton_backend", "poisoned_empty"),
]

S2 = Local(2, 16) | Stride(3, block=16)
FORMS = {
    "direct": Cut("direct"),
    "split": Cut("split", splits=3, least=32),
    "stream": Cut("stream", programs=5),
    "stream of one": Cut("stream", programs=1),
    "stream of many": Cut("stream", programs=40),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def cut_as(monkeypatch):
    """Sets how lists are cut, whatever their lengths: tiny problems would not be cut at all."""
    return lambda form: monkeypatch.setattr(launch, "choose_cut", lambda *given, **more: FORMS[form])


@dataclass
class Case:
    """Sequences of (queries, keys), scattered over pages so that nothing but what is seen holds a number."""

    pattern: Any
    lengths: list[tuple[int, int]]
    heads: int = 4
    kv_heads: int = 2
    page_size: int = 32
    per_head: bool = False
    heads_first: bool = False
    dim: int = 16
    dim_v: int = 16
    dtype: torch.dtype = torch.float32
    q: list[Tensor] = field(default_factory=list)
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        for n, m in self.lengths:
            sizes = ((n, self.heads, self.dim), (m, self.kv_heads, self.dim), (m, self.kv_heads, self.dim_v))
            for kept, size in zip((self.q, self.k, self.v), sizes, strict=True):
                kept.append(torch.randn(size).to(self.dtype))
            self.masks.append(dense_mask(self.pattern, self.heads, self.kv_heads, n, m))

    def paged(self) -> Paged:
        read = [mask.unflatten(0, (self.kv_heads, -1)).any(1).any(1) for mask in self.masks]
        return scatter(self.k, self.v, read, self.page_size, per_head=self.per_head, heads_first=self.heads_first)

    def run(self, paged: Paged | None = None, **call: Any) -> tuple[Tensor, Tensor]:
        """Packed results."""
        paged = paged or self.paged()
        q, cu = torch.cat(self.q), torch.tensor([0, *(len(x) for x in self.q)]).cumsum(0)
        given = {"block_table": paged.block_table, "seq_lens": paged.seq_lens, "backend": "triton", "return_lse": True, **call}
        if len({len(x) for x in self.q}) > 1:
            return s2attn.decode(q, paged.k_pages, paged.v_pages, given.pop("pattern", self.pattern), cu_seqlens_q=cu, **given)
        rows = torch.stack(self.q)
        out, lse = s2attn.decode(rows, paged.k_pages, paged.v_pages, given.pop("pattern", self.pattern), **given)
        return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)

    def check(self, out: Tensor, lse: Tensor, **scoring: Any) -> None:
        at = 0
        for q, k, v, mask in zip(self.q, self.k, self.v, self.masks, strict=True):
            end = at + len(q)
            if mask.numel():
                sets = [formula(q[None], k[None], v[None], mask, **scoring) for formula in (eager, oracle)]
                for name, got, plain, exact in zip(("out", "lse"), (out[at:end], lse[:, at:end]), *sets, strict=True):
                    assert_close(name, got, plain[0], exact[0].double())
            else:
                assert (out[at:end] == 0).all() and (lse[:, at:end] == -torch.inf).all()
            at = end


SHAPES = cycle(
    [
        (1, 1, 16, "direct"), (3, 4, 64, "split"), (16, 2, 16, "stream"), (1, 16, 64, "stream"), (2, 1, 32, "split"), (5, 3, 16, "direct"),
        (1, 4, 48, "split"), (8, 1, 256, "stream"),
    ]
)  # fmt: skip


@pytest.mark.parametrize(("name", "shape"), [(name, next(SHAPES)) for name in sorted(PRESETS)])
def test_presets(name, shape, cut_as):
    """Ragged lengths, groups of all sizes, pages smaller and larger than the block; pages that nobody reads are gone."""
    q_len, group, page_size, form = shape
    cut_as(form)
    found = preset(name)
    pattern = found.pattern(0) if isinstance(found, Recipe) else found
    lengths = [(q_len, 330), (q_len, 129), (q_len, q_len)]
    case = Case(pattern, lengths, heads=2 * group, kv_heads=2, page_size=page_size, per_head=q_len < 5, heads_first=group > 2)
    case.check(*case.run())


MIXED = [(18, 60), (1, 80), (0, 50), (3, 20), (2, 0), (5, 4)]
"""A prompt behind a prefix, one token, none, several, and sequences with fewer keys than queries."""


@pytest.mark.parametrize(
    ("pattern", "forms"),
    [(S2, ("direct", "stream", "stream of many")), (Window(30) | Sink(3), ("split",)), (Dense(), ("stream of one",))],
    ids=["S2", "window", "dense"],
)
def test_prefill_and_decode_side_by_side(pattern, forms, cut_as):
    case = Case(pattern, MIXED, kv_heads=2, per_head=True, dim_v=24)
    paged = case.paged()
    for form in forms:
        cut_as(form)
        case.check(*case.run(paged))


@pytest.mark.parametrize("form", ["split", "stream"])
@pytest.mark.parametrize("pattern", [PerHead({0: Window(9), 3: Dense()}, default=S2, heads="query"), Stride(2, block=16, heads="query")])
def test_lists_of_query_heads(pattern, form, cut_as):
    cut_as(form)
    case = Case(pattern, [(1, 100), (1, 33)], heads=6, kv_heads=2)
    case.check(*case.run())


@pytest.mark.parametrize(
    ("dtype", "softcap", "form"), [(torch.float16, None, "split"), (torch.float16, 5.0, "stream"), (torch.float32, 1.5, "direct")]
)
def test_dtypes_softcap_and_sinks(dtype, softcap, form, cut_as):
    cut_as(form)
    case = Case(S2, [(1, 130), (3, 77), (20, 20), (2, 0)], dtype=dtype, dim=24)
    sinks = torch.tensor([0.5, -1.0, 2.0, -torch.inf])
    out, lse = case.run(softcap=softcap, sinks=sinks, scale=0.3)
    assert out.dtype == dtype and lse.dtype == torch.float32
    case.lengths, seen = case.lengths[:3], slice(0, 24)
    for kept in (case.q, case.k, case.v, case.masks):
        del kept[3:]
    case.check(out[seen], lse[:, seen], scale=0.3, softcap=softcap, sinks=sinks)
    assert (out[24:] == 0).all() and torch.equal(lse[:, 24:], sinks[:, None].expand(-1, 2))


def test_float8_pages():
    case = Case(S2, [(2, 100), (1, 33)])
    paged = case.paged()
    k_scale, v_scale = torch.tensor([0.5, 2.0]), torch.tensor([0.25, 1.0])
    pools = [pages.div(scale[:, None]).to(torch.float8_e4m3fn) for pages, scale in ((paged.k_pages, k_scale), (paged.v_pages, v_scale))]
    stored = Paged(*pools, paged.block_table, paged.seq_lens)
    case.k, case.v = ([(x / scale[:, None]).to(torch.float8_e4m3fn).float() * scale[:, None] for x in kept]
                      for kept, scale in ((case.k, k_scale), (case.v, v_scale)))  # fmt: skip
    case.check(*case.run(stored, k_scale=k_scale, v_scale=v_scale))


@pytest.mark.parametrize("form", ["split", "stream"])
def test_strides_and_the_same_bits(form, cut_as):
    cut_as(form)
    case = Case(S2, [(2, 90), (2, 60)], heads_first=False)
    paged = case.paged()
    first = case.run(paged)
    both = torch.stack([paged.k_pages, paged.v_pages], dim=-1)  # columns that are not neighbours
    turned = Paged(both[..., 0], both[..., 1], paged.block_table.long().t().contiguous().t(), paged.seq_lens.long())
    for other in (paged, turned):
        assert all(torch.equal(a, b) for a, b in zip(first, case.run(other), strict=True))


def test_one_pool_for_all_heads(cut_as):
    """As `SparseCache` has it: the head axis of the pages has stride 0, and every KV head a table of its own."""
    cut_as("split")
    case = Case(S2, [(1, 90), (1, 60)], per_head=True)
    paged = case.paged()
    pools = [x.transpose(1, 2).reshape(-1, case.page_size, 1, 16).expand(-1, -1, 2, -1) for x in (paged.k_pages, paged.v_pages)]
    number = paged.block_table.long() * 2 + torch.arange(2)[:, None]
    table = torch.where((paged.block_table < 0) | (paged.block_table >= len(paged.k_pages)), -1, number)
    case.check(*case.run(Paged(*pools, table, paged.seq_lens)))


@pytest.mark.parametrize(("heads", "form"), [(1, "direct"), (2, "split"), (4, "stream")])
def test_a_packed_layout_takes_the_place_of_a_pattern(heads, form, cut_as):
    cut_as(form)
    by_head = {h: Stride(2, offset=h % 2, block=16) | Window(5 + h) for h in range(heads)}
    pattern = PerHead(by_head, heads="query") if heads == 4 else PerHead({h: by_head[h % heads] for h in range(2)})
    lengths = [(3, 70), (1, 33), (17, 50)]
    case = Case(pattern, lengths)
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()]) for n in zip(*lengths, strict=True))
    layout = build_layout(pattern, 4, 2, block=16, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    if heads == 1:
        layout = build_layout(by_head[0], 4, 1, block=16, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    case.check(*case.run(pattern=layout))


@pytest.mark.parametrize("form", ["direct", "stream"])
def test_rows_of_a_square_layout(form, cut_as):
    """Of random blocks that no pattern made: a query reads the row of its position."""
    cut_as(form)
    case = Case(S2, [(3, 70), (1, 33), (5, 90)])
    mask = random_mask(2, 90, 90, 16, causal=True)
    layout = replace(Layout.from_dense(mask, block=16), causal=True)
    case.masks = [mask.repeat_interleave(2, 0)[:, m - n : m, :m] for n, m in case.lengths]
    case.check(*case.run(pattern=layout))


def test_the_bits_of_a_sequence_do_not_depend_on_its_batch(monkeypatch):
    monkeypatch.setattr(cuts, "FIXED_SPLITS", 3)
    monkeypatch.setattr(cuts, "FIXED_TOKENS", 32)
    case = Case(Dense(), [(2, 200), (2, 40), (2, 130)])
    paged = case.paged()
    out, lse = case.run(paged, batch_invariant=True)
    case.check(out, lse)
    for number in range(3):
        mine = Paged(paged.k_pages, paged.v_pages, paged.block_table[number : number + 1], paged.seq_lens[number : number + 1])
        alone = Case(Dense(), [], q=[case.q[number]]).run(mine, batch_invariant=True)
        assert torch.equal(alone[0], out[2 * number : 2 * number + 2]) and torch.equal(alone[1], lse[:, 2 * number : 2 * number + 2])


@pytest.mark.parametrize("form", ["direct", "split", "stream"])
def test_nobody_looks_at_numbers(form, cut_as, monkeypatch):
    """What a capture demands, once the lists are built: no number comes to the host, and no shape follows from one."""
    cut_as(form)
    case = Case(S2, [(1, 90), (1, 60)])
    paged = case.paged()
    slots = torch.tensor([3, -1])
    expected = case.run(paged)
    for name in ("tolist", "item", "__bool__", "__int__", "__index__", "nonzero", "cpu", "unique"):
        monkeypatch.setattr(torch.Tensor, name, lambda *given, name=name, **more: pytest.fail(f"{name} looks at numbers"))
    got = case.run(paged, validate=False)
    s2attn.store_kv(case.k[0][:2], case.v[0][:2], paged.k_pages, paged.v_pages, slots, validate=False, backend="triton")
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_captured_stream_is_served_by_who_does_not_look(monkeypatch):
    from s2attn.backends.cpu import backend as cpu
    from s2attn.backends.torch import backend as plain
    from s2attn.ops import looks

    case = Case(S2, [(1, 90), (1, 60)])
    paged = case.paged()
    expected = case.run(paged)
    for room in (plain, looks):
        monkeypatch.setattr(room, "is_captured", lambda *tensors: True)
    monkeypatch.setattr(cpu, "_built", lambda: ["no stream of a CPU is captured"])
    got = case.run(paged, backend="auto")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with pytest.raises(s2attn.Unsupported, match="torch: it reads sizes on the host"):
        case.run(paged, backend="torch")
    pools = torch.zeros(2, 1, 16, 2, 16)
    s2attn.store_kv(case.k[0][:3], case.v[0][:3], *pools, torch.tensor([99, 5, 5]))
    assert pools[0, 0, 5].any() and int(pools.any(-1).any(-1).sum()) == 2


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_bad_numbers_reach_only_the_queries_that_see_them(value):
    """Among several queries of one tile, which see different keys of its partial blocks."""
    case = Case(Window(4), [(6, 30)], heads=2, kv_heads=1, page_size=16)
    clean = case.run()
    for kept, position in ((case.k, 27), (case.v, 28)):
        kept[0][position] = value
    out, lse = case.run()
    before = slice(0, 3)  # positions 24 to 26
    assert torch.equal(out[before], clean[0][before]) and torch.equal(lse[:, before], clean[1][:, before])
    assert value == 3e38 or not out[4:].isfinite().any()
