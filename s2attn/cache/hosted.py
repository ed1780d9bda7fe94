"""`HostedCache`: a cache in two memories; what lies on the host is attended there, and merged with what the device has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s2attn.cache.bus import Bus
from s2attn.cache.host_ledger import TwoPools
from s2attn.cache.host_parts import packed_layout, split_by_page
from s2attn.cache.host_plan import plan_layers
from s2attn.cache.ledger import GONE, Room
from s2attn.cache.needs import most_pages, page_needs, pages_read, pattern_of
from s2attn.cache.probe import cache_shape
from s2attn.cache.sparse import SparseCache
from s2attn.core import Unsupported, bad_value, check_int
from s2attn.layout import HeadRange, Layout
from s2attn.ops.decode import decode
from s2attn.ops.merge import merge
from s2attn.ops.store import store_kv
from s2attn.patterns import Pattern, Recipe

WAITING = "waiting"


class HostedCache(SparseCache):
    """A `SparseCache` of which some layers, or pages that are old or wait, lie in the memory of the host.

    Keys on the host are never brought back. Queries go there, attend on the CPU through the torch backend, and what returns is a partial
    result ``(out, lse)``, which is merged with that of the keys on the device (FastAttention, arXiv:2410.16663, section 4.4). Exact: the
    result is that of the cache in one memory. ``s2attn.generate(..., cache=...)`` and all methods work as there, but for :meth:`save`.

    Args:
        pattern, num_pages, options: as of `SparseCache`; ``num_pages`` and ``device`` are those of the device.
        host_pages: pages on the host.
        host_layers: layers whose keys all lie on the host; `plan_layers` says how many have to.
        spill: of the other layers, which pages go to the host after a step, if it has room: None for none, "waiting" for those that the
            next query does not read though a later one may, or a number: those without any of the last so many tokens.

    Attributes:
        bus: counts the bytes that went to the host and to the device.
        pages: the ledger, which counts the pages of both memories.

    >>> from s2attn import Dense
    >>> shape = {"num_kv_heads": 1, "head_dim": 8, "page_size": 16, "max_tokens": 400, "dtype": torch.float32}
    >>> cache = HostedCache(Dense(), num_pages=4, host_pages=20, spill=32, **shape)
    >>> sequence = cache.open()
    >>> for _ in range(20):
    ...     out = cache.attend([sequence], 0, *torch.randn(3, 1, 10, 1, 8))
    >>> cache.length(sequence), cache.bytes_on_device, cache.bytes_on_host
    (200, 3072, 10240)
    """

    def __init__(
        self,
        pattern: Pattern | Recipe,
        *,
        host_pages: int,
        host_layers: Sequence[int] = (),
        spill: int | str | None = None,
        **options: Any,
    ) -> None:
        if isinstance(spill, str) and spill != WAITING:
            raise bad_value("spill", f"must be None, {WAITING!r} or a number of tokens", repr(spill))
        self.spill = spill if spill is None or isinstance(spill, str) else check_int("spill", spill, 1)
        self.host_pages, self.host_layers = check_int("host_pages", host_pages, 1), tuple(sorted(set(host_layers)))
        super().__init__(pattern, **options)
        self.bus = Bus(self._k.device)
        k, v = (self.bus.memory((host_pages, *pool.shape[1:]), pool.dtype) for pool in self.pools)
        self._host = k, v
        self._coming: list[tuple[Tensor, Callable[[], list[Tensor]]]] = []
        self._looked: dict[tuple[int, int], int] = {}

    def _new_ledger(self, needs: np.ndarray) -> TwoPools:
        options = {"page_size": self.page_size, "num_pages": self.num_pages, "max_tokens": self.max_tokens, "hold": self.hold}
        self.pages = TwoPools(needs, host_pages=self.host_pages, host_layers=self.host_layers, **options)
        return self.pages

    @classmethod
    def for_model(
        cls,
        model: Callable[[Tensor], Tensor],
        *,
        max_tokens: int,
        sequences: int = 1,
        chunk: int = 512,
        num_pages: int | None = None,
        page_size: int | None = None,
        hold: int = 0,
        device_bytes: int | None = None,
        host_layers: Sequence[int] = (),
        spill: int | str | None = None,
    ) -> HostedCache:
        """A cache for a model, as `SparseCache.for_model`, with as much on the device as asked for.

        Args:
            num_pages: pages on the device, where they shall be fewer than enough for what stays there.
            device_bytes: bytes for keys on the device: `plan_layers` chooses ``host_layers`` then.
            host_layers, spill: as of the class.
        """
        shape = cache_shape(model)
        size = shape["page_size"] = shape["page_size"] if page_size is None else page_size
        names = ("num_layers", "num_kv_heads", "num_heads", "head_dim", "v_dim", "heads", "dtype")
        if device_bytes is not None:
            if host_layers or spill is not None or num_pages is not None:
                rule = "must be left out where device_bytes says what lies where"
                raise bad_value("host_layers, spill and num_pages", rule, (host_layers, spill, num_pages))
            room = {"tokens": max_tokens, "sequences": sequences, "chunk": chunk, "page_size": size, "hold": hold}
            plan = plan_layers(shape["pattern"], device_bytes=device_bytes, **room, **{name: shape[name] for name in names})
            pages: Any = {"num_pages": max(1, plan.device_pages), "host_pages": max(1, plan.host_pages)}
            return cls(**shape, **pages, host_layers=plan.host_layers, max_tokens=max_tokens, hold=hold)
        query_heads = shape["num_heads"]
        everyone = shape["heads"] or HeadRange(0, query_heads, query_heads, shape["num_kv_heads"])
        needs = page_needs(shape["pattern"], everyone, shape["num_kv_heads"], shape["num_layers"], max_tokens, size)
        how: Any = {"tokens": max_tokens, "chunk": chunk, "page_size": size}
        away = [layer for layer in range(len(needs)) if layer in set(host_layers)]
        stay = [layer for layer in range(len(needs)) if layer not in away]
        kept = np.where(needs < 0, needs, needs + hold)
        if isinstance(spill, int):
            kept = np.minimum(kept, np.arange(1, needs.shape[2] + 1) * size + spill - 1)
        enough = sequences * most_pages(kept[stay], **how)
        host = most_pages(needs[away] if spill is None else needs, hold=hold, **how)
        return cls(
            **shape,
            num_pages=enough if num_pages is None else num_pages,
            host_pages=sequences * host,
            host_layers=host_layers,
            spill=spill,
            max_tokens=max_tokens,
            hold=hold,
        )

    def save(self, path: Path | str) -> None:
        """Refused: a file is of a cache in one memory."""
        raise Unsupported("this cache cannot be saved", {"HostedCache": ["its pages lie in two memories"]})

    @classmethod
    def load(cls, path: Path | str, *, num_pages: int | None = None, device: torch.device | str = "cpu") -> SparseCache:
        """Refused: a file is of a cache in one memory; `SparseCache.load` reads it."""
        raise Unsupported("a file is of a cache in one memory", {"HostedCache": ["SparseCache.load reads it"]})

    # bytes

    @property
    def bytes_on_device(self) -> int:
        """Bytes of the pages in use on the device."""
        return self.pages.on_device * self.page_bytes

    @property
    def bytes_on_host(self) -> int:
        """Bytes of the pages in use on the host."""
        return self.pages.on_host * self.page_bytes

    # what a step is made of

    def numbers(self, array: np.ndarray) -> Tensor:
        """On the host, where both memories are addressed from."""
        return torch.from_numpy(array)

    def store(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Write new keys and values to where their pages lie."""
        first = self.num_pages * self.page_size  # slots of pages on the host begin here
        here, there = (slots >= 0) & (slots < first), slots >= first
        if bool(here.any()):
            super().store(k, v, torch.where(here, slots, GONE).to(self._k.device))
        if bool(there.any()):
            self._arrive()
            new_k, new_v = (x.detach().reshape(-1, 1, x.shape[-1]) for x in (k, v))
            where = there.nonzero()[:, 0]
            new_k, new_v = self.bus.fetch(*(x[where.to(x.device)] for x in (new_k, new_v)))()
            store_kv(new_k, new_v, *self._host, slots[where] - first)

    def decode(
        self,
        q: Tensor,
        pattern: Pattern,
        *,
        block_table: Tensor,
        seq_lens: Tensor,
        cascade: bool = False,
        cu_seqlens_q: Tensor | None = None,
        sinks: Tensor | None = None,
        return_lse: bool = False,
        layer: int = 0,
        heads: HeadRange | None = None,
        **options: Any,
    ) -> Any:
        """`s2attn.decode` on the device, on the host, or on both, as the pages of ``block_table`` lie; it takes :meth:`tables`."""
        if cascade:
            why = "what sequences share is read once only where all of it lies on the device"
            raise Unsupported("no cascade over two memories", {"HostedCache": [why]})
        away, place = block_table >= self.num_pages, {"layer": layer, "heads": heads}
        where = {"seq_lens": seq_lens.cpu(), "cu_seqlens_q": None if cu_seqlens_q is None else cu_seqlens_q.cpu()}
        here: Pattern | Layout | None = pattern
        there: Pattern | Layout | None = None
        if layer in self.host_layers:
            here, there = None, pattern
        elif bool(away.any()):
            here, there = self._split(q, pattern, away, where, place)
            place = {}
        # The queries travel while the device attends, and come back as a partial result.
        coming = None if there is None else self.bus.fetch(q, *([] if sinks is None else [sinks]))
        results = []
        how: dict[str, Any] = {**place, **options, "return_lse": True}
        if here is not None:
            mine = {name: x if x is None else x.to(q.device) for name, x in (*where.items(), ("block_table", block_table))}
            seen = here.to(q.device) if isinstance(here, Layout) else here
            results.append(decode(q, self.k_pages, self.v_pages, seen, sinks=sinks, **dict[str, Any](how, **mine)))
        if there is not None and coming is not None:
            self._arrive()
            asked, *given = coming()
            once = given[0] if given and not results else None  # sinks count once
            k_pages, v_pages = (pool.expand(-1, -1, self.num_kv_heads, -1) for pool in self._host)
            how |= {**where, "block_table": block_table - self.num_pages, "backend": "torch", "sinks": once}
            results.append(tuple(self.bus.send(*decode(asked, k_pages, v_pages, there, **how))))
        out, lse = results[0] if len(results) == 1 else merge(results)
        return (out, lse) if return_lse else out

    def _split(
        self, q: Tensor, pattern: Pattern, away: Tensor, where: dict[str, Tensor | None], place: dict[str, Any]
    ) -> tuple[Layout | None, Layout | None]:  # fmt: skip
        """What queries read on the device, and on the host; None where that is nothing."""
        cu, tokens = where["cu_seqlens_q"], where["seq_lens"]
        assert tokens is not None
        queries = torch.full_like(tokens, q.shape[1]) if cu is None else cu.diff()
        layout = packed_layout(pattern, (q.shape[-2], self.num_kv_heads), queries, tokens, self.page_size, **place)
        here, there = split_by_page(layout, away, self.page_size)
        if not there.rows.entries:
            return here, None
        return here if here.rows.entries else None, there

    def copy_pages(self, rooms: Sequence[Room]) -> None:
        """Make the copies that new tokens of forks need, from and to whichever memory."""
        copies = torch.from_numpy(np.concatenate([np.zeros((0, 2)), *(room.copies for room in rooms)]).astype(np.int64))
        if not len(copies):
            return
        self._arrive()
        first = self.num_pages
        ends = copies >= first
        for (from_host, to_host), chosen in (
            ((a, b), copies[(ends[:, 0] == a) & (ends[:, 1] == b)]) for a in (False, True) for b in (False, True)
        ):
            old, new = chosen[:, 0] - first * from_host, chosen[:, 1] - first * to_host
            held = [pool[old.to(pool.device)] for pool in (self._host if from_host else self.pools)]
            if from_host != to_host and len(chosen):
                held = self.bus.fetch(*held)() if to_host else self.bus.send(*held)
            for pool, pages in zip(self._host if to_host else self.pools, held, strict=True):
                pool[new.to(pool.device)] = pages

    # pages that go to the host

    def trim(self, sequence: int, layer: int | None = None) -> None:
        """Give back the pages that no later query reads, and send to the host what `spill` says."""
        super().trim(sequence, layer)
        if self.spill is None:
            return
        for one in range(self.num_layers) if layer is None else [layer]:
            if one not in self.host_layers:
                self._spill(sequence, one)

    def free(self, sequence: int) -> None:
        """Forget a sequence and give its pages back."""
        super().free(sequence)
        for layer in range(self.num_layers):
            self._looked.pop((sequence, layer), None)

    def _spill(self, sequence: int, layer: int) -> None:
        length = self.length(sequence, layer)
        behind = length - self.spill if isinstance(self.spill, int) else length
        full = max(0, behind // self.page_size)  # pages that are old enough, and will not be written to
        if self._looked.get((sequence, layer)) == full:
            return
        self._looked[sequence, layer] = full
        table = self.pages.table(sequence, layer)[:, :full]
        chosen = (table != GONE) & (table < self.num_pages)
        if self.spill == WAITING and full:
            listed = pages_read(pattern_of(self.pattern, layer), self._everyone, self.num_kv_heads, layer, length, self.page_size)
            chosen &= ~listed[:, :full]
        moves = torch.from_numpy(self.pages.send(layer, table[chosen]).astype(np.int64))
        if len(moves):
            coming = self.bus.fetch(*(pool[moves[:, 0].to(pool.device)] for pool in self.pools))
            self._coming.append((moves[:, 1] - self.num_pages, coming))

    def _arrive(self) -> None:
        """Put pages that are on their way to the host where they belong, before anything is read or written there."""
        coming, self._coming = self._coming, []
        for places, pages in coming:
            for pool, held in zip(self._host, pages(), strict=True):
                pool[places] = held
