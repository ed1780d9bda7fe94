"""The suite `decode`: its cases, what a pattern lists in them, and their pages."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from s2attn.core import bad_value, check_block, check_int
from s2attn.layout import Layout, build_layout
from s2attn.patterns import Dense, Local, Pattern, Power, Sink, Stride, Window
from s2attn.tuning.cases import DTYPES, S2, tokens

FEWEST = 16  # the longest of ragged sequences is up to so many times as long as the shortest


@dataclass(frozen=True)
class DecodeCase:
    """New queries of a batch over pages in random order, random normal inputs; nothing in it depends on a device.

    Attributes:
        context: tokens of each sequence, and where they are ``ragged`` of the longest one.
        q_len: new tokens of each sequence.
        page_size: tokens per page, and per block of the pattern's lists.
        all_peers: peers that take long to prepare take part, too.
    """

    name: str
    pattern: Pattern
    batch: int
    context: int
    q_len: int = 1
    page_size: int = 64
    ragged: bool = False
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    all_peers: bool = False
    op: str = "decode"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise bad_value("dtype", f"must be one of {', '.join(DTYPES)}", repr(self.dtype))
        for field in ("batch", "q_len", "heads", "kv_heads", "head_dim"):
            check_int(field, getattr(self, field), 1)
        check_int("context", self.context, FEWEST * self.q_len if self.ragged else self.q_len)
        if self.heads % self.kv_heads:
            raise bad_value("heads", f"must be a multiple of kv_heads ({self.kv_heads})", self.heads)
        check_block("page_size", self.page_size)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence. Ragged ones: the longest first, the others drawn, each order of magnitude as likely as another."""
        if not self.ragged:
            return (self.context,) * self.batch
        drawn = torch.rand(self.batch - 1, generator=torch.Generator().manual_seed(self.batch)).tolist()
        return (self.context, *(round(self.context * FEWEST**-share) for share in drawn))

    def facts(self) -> dict[str, Any]:
        """The case as plain values for a record."""
        names = ("batch", "q_len", "page_size", "ragged", "heads", "kv_heads", "head_dim", "dtype")
        shape = {"seqlen": self.context, "tokens": sum(self.lengths), **{name: getattr(self, name) for name in names}}
        return {"case": self.name, "op": self.op, "pattern": repr(self.pattern), **shape, "block": self.page_size}


@dataclass(frozen=True)
class Listed:
    """What a pattern lists: (query, key) pairs of all heads; and keys, of all KV heads, that lie in pages with a listed key."""

    pairs: int
    keys: int

    def bytes(self, case: DecodeCase) -> int:
        """Of these keys and their values."""
        return self.keys * 2 * case.head_dim * getattr(torch, case.dtype).itemsize


def listed_in(case: DecodeCase, pattern: Pattern, lengths: tuple[int, ...]) -> Listed:
    """What ``pattern`` lists in sequences of these lengths."""
    found = [_listed_one(replace(case, batch=1, ragged=False), pattern, length) for length in lengths]
    return Listed(sum(one.pairs for one in found), sum(one.keys for one in found))


@lru_cache(maxsize=4096)
def _listed_one(case: DecodeCase, pattern: Pattern, length: int) -> Listed:
    layout = build_layout(pattern, case.heads, case.kv_heads, case.q_len, length, block=case.page_size)
    keys = sum(_keys_of(layout, h, case.kv_heads) for h in range(case.kv_heads))
    return Listed(int(layout.pairs.sum()) * case.heads // layout.heads, keys)


def _keys_of(layout: Layout, kv_head: int, kv_heads: int) -> int:
    """Keys in blocks that any query head of a KV head lists; each once."""
    own = [h for h in range(layout.heads) if h * kv_heads // layout.heads == kv_head] or [kv_head * layout.heads // kv_heads]
    lists = [layout.rows.idx[int(layout.rows.ptr[h, 0]) : int(layout.rows.ptr[h, -1])] for h in own]
    return int(layout.k_spans.length[torch.cat(lists).unique().long()].sum())


def uniform_twin(case: DecodeCase) -> DecodeCase:
    """The batch of equally long sequences in which the pattern lists as many bytes as in a ragged one, as nearly as whole pages allow."""
    wanted = listed_in(case, case.pattern, case.lengths).keys / case.batch
    low, high = 1, -(-case.context // case.page_size)
    while low < high:  # the fewest pages that list so many
        middle = (low + high) // 2
        enough = _twin_keys(case, middle) >= wanted
        low, high = (low, middle) if enough else (middle + 1, high)
    pages = min((low, max(1, low - 1)), key=lambda count: abs(_twin_keys(case, count) - wanted))
    return replace(case, name=f"{case.name}, equal bytes", ragged=False, context=max(case.q_len, pages * case.page_size))


def _twin_keys(case: DecodeCase, pages: int) -> int:
    return listed_in(case, case.pattern, (max(case.q_len, pages * case.page_size),)).keys


@dataclass(frozen=True, eq=False)
class Batch:
    """The tensors of a case: q ``(B, T, H, D)``, pages ``(P, page_size, G, D)`` in random order, and which of them are whose."""

    case: DecodeCase
    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    seq_lens: Tensor

    @classmethod
    def of(cls, case: DecodeCase, seed: int = 0, device: str = "cpu") -> Batch:
        generator, dtype = torch.Generator(device).manual_seed(seed), getattr(torch, case.dtype)
        counts = [-(-length // case.page_size) for length in case.lengths]
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)).int().split(counts)
        table = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True, padding_value=-1)
        shapes = [(case.batch, case.q_len, case.heads, case.head_dim), *[(sum(counts), case.page_size, case.kv_heads, case.head_dim)] * 2]
        q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes)
        return cls(case, q, k, v, table.to(device), torch.tensor(case.lengths, dtype=torch.int32, device=device))

    def tokens_of(self, pages: Tensor, sequence: int) -> Tensor:
        """The keys or values of a sequence, ``(S, G, D)``."""
        length = self.case.lengths[sequence]
        own = self.block_table[sequence, : -(-length // self.case.page_size)].long()
        return pages[own].flatten(0, 1)[:length]

    @cached_property
    def whole(self) -> tuple[Tensor, Tensor, Tensor]:
        """q ``(B, H, T, D)``, and all keys and values ``(B, G, longest, D)``, each sequence at the end of its room, zeros before it.

        Made once: a copy for each peer would not fit.
        """
        case = self.case
        k, v = (x.new_zeros(case.batch, case.kv_heads, case.context, case.head_dim) for x in (self.k_pages, self.v_pages))
        for sequence, length in enumerate(case.lengths):
            for made, pages in ((k, self.k_pages), (v, self.v_pages)):
                made[sequence, :, case.context - length :] = self.tokens_of(pages, sequence).transpose(0, 1)
        return self.q.transpose(1, 2).contiguous(), k, v


def decode_suite(op: str = "decode", size: str = "full") -> list[DecodeCase]:
    """The cases of the suite, the most valuable first.

    Args:
        size: ``"full"`` for a graphics card; ``"small"`` for a CPU; ``"tiny"``, whose numbers mean nothing.
    """
    return {"full": _full, "small": _small, "tiny": _tiny}[size]()


def _case(pattern_name: str, batch: int, context: int, **more: Any) -> DecodeCase:
    said = [f"{more['q_len']} queries" if "q_len" in more else "", f"pages of {more['page_size']}" if "page_size" in more else ""]
    said += [f"width {more['head_dim']}" if "head_dim" in more else "", "ragged" if more.get("ragged") else ""]
    name = ", ".join([f"{batch} x {tokens(context)} {pattern_name}", *(part for part in said if part)])
    return DecodeCase(name, PATTERNS[pattern_name], batch, context, **more)


PATTERNS: dict[str, Pattern] = {
    "S2": S2,
    "dense": Dense(),
    "sink+window": Sink(64) | Window(4096),
    "power": Sink(64) | Local(5) | Power(),
}


def _full() -> list[DecodeCase]:
    """Up to two million tokens together: 8 GB of keys and values."""
    long = [_case(name, 16, 131072, **more) for name, more in (("S2", {"all_peers": True}), ("dense", {}))]
    ragged = [_case(name, 64, 32768, ragged=True, all_peers=name == "S2") for name in ("S2", "dense")]
    alone = [_case(name, 1, 131072) for name in ("S2", "dense")]
    others = [_case("sink+window", 16, 131072, all_peers=True), _case("power", 16, 131072), _case("S2", 64, 32768)]
    several = [_case(name, 16, 131072, q_len=4) for name in ("S2", "dense")]
    pages = [_case(name, 16, 131072, page_size=16) for name in ("S2", "dense")]
    many = [_case("S2", 128, 8192), _case("S2", 128, 8192, ragged=True), _case("dense", 128, 8192)]
    more = [_case("S2", 16, 131072, ragged=True), _case("power", 16, 131072, ragged=True), _case("S2", 64, 32768, q_len=4, ragged=True)]
    return [*long, *ragged, *alone, *others, *several, *pages, *many, *more, _case("S2", 16, 32768, head_dim=64), _case("S2", 1, 8192)]


def _small() -> list[DecodeCase]:
    shape: dict[str, Any] = {"heads": 8, "kv_heads": 2, "dtype": "float32"}
    four = [replace(_case(name, 4, 16384), **shape, head_dim=64) for name in PATTERNS]
    more: list[dict[str, Any]] = [{"ragged": True}, {"q_len": 4}, {"page_size": 16}]
    four += [replace(_case("S2", 4, 16384, **one), **shape, head_dim=64) for one in more]
    return [
        *four,
        replace(_case("dense", 4, 16384, ragged=True), **shape, head_dim=64),
        replace(_case("S2", 1, 65536), **shape, head_dim=64),
    ]


def _tiny() -> list[DecodeCase]:
    shape: dict[str, Any] = {"page_size": 16, "heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float32"}
    patterns: dict[str, Pattern] = {
        "S2": Local(2, 16) | Stride(4, block=16),
        "sink+window": Sink(5) | Window(33),
        "power": Sink(16) | Local(2, 16) | Power(2, 16),
        "dense": Dense(),
    }
    cases = [DecodeCase(f"tiny {name}", pattern, 3, 300, **shape) for name, pattern in patterns.items()]
    s2 = patterns["S2"]
    several = DecodeCase("tiny S2, 4 queries, ragged", s2, 5, 300, q_len=4, ragged=True, **shape)
    return [*cases, several, DecodeCase("tiny dense, ragged", Dense(), 5, 300, ragged=True, **shape)]


def unchecked(op: Callable[..., Any]) -> dict[str, Any]:
    """What keeps a paged op from looking at numbers on the device, so that a CUDA graph can capture it; nothing where it always looks."""
    return {"validate": False} if "validate" in inspect.signature(op).parameters else {}
