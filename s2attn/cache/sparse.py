"""`SparseCache`: keys and values in pages per (layer, KV head), each given back when no later query of its head reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s2attn.backends.checks import FLOATS
from s2attn.cache import saved
from s2attn.cache.checks import check_new
from s2attn.cache.ledger import GONE, Ledger, Room, undoing
from s2attn.cache.needs import page_needs, pages_needed, pages_read, pattern_of
from s2attn.cache.paged_step import PagedStep, checked_counts
from s2attn.cache.pools import Pools
from s2attn.cache.probe import cache_shape
from s2attn.cache.sequences import Sequences
from s2attn.core import StrPath, bad_kind, bad_value, check_bool, check_int
from s2attn.layout import HeadRange, read_cu_seqlens
from s2attn.ops.cascade import decode_cascade
from s2attn.ops.decode import decode
from s2attn.ops.step import taking
from s2attn.ops.store import store_kv
from s2attn.patterns import Pattern, Recipe


class SparseCache(Sequences):
    """A paged cache of keys and values for many sequences that shrinks as the pattern allows.

    A page holds ``page_size`` tokens of one KV head of one layer. It is given out when its first token comes, and taken back as soon as
    the pattern proves that no later query of that head reads any of its tokens; a page that nobody will ever read is never given out. The
    proof is exact to the token, for sequences of up to ``max_tokens``. With a KV-efficient pattern what is kept is what the next query
    reads. Any other pattern comes back to pages which it has left out, so that they must wait: `bytes_waiting` says what that costs.

    Args:
        pattern: which keys are seen, or a `Recipe` with a pattern for each layer.
        num_kv_heads, head_dim, v_dim: G, D, and the width of values (D by default).
        num_pages: the most pages, shared by all sequences, layers and heads.
        max_tokens: the longest that a sequence may become.
        num_layers: layers of the model.
        num_heads: query heads H (G by default); it matters for patterns that tell query heads apart.
        page_size: tokens per page, a multiple of 16; the pattern's own block wastes nothing.
        heads: the global heads that these are, under tensor parallelism.
        hold: so many of a sequence's last tokens can always be taken back with :meth:`rollback`; what they read is kept longer.
        preallocate: allocate ``num_pages * page_bytes`` bytes now. Otherwise memory is allocated in steps as sequences need it, which moves
            ``k_pages`` and ``v_pages``: a CUDA graph that was captured over them is no longer right.
        dtype, device: of the pages.

    Every method changes all that it says or, when it raises anything at all (`CacheFull`, an error of a backend, an interrupt), nothing.

    >>> from s2attn import Sink, Window
    >>> shape = {"num_kv_heads": 1, "head_dim": 8, "page_size": 16, "dtype": torch.float32}
    >>> cache = SparseCache(Sink(4) | Window(32), num_pages=8, max_tokens=4096, **shape)
    >>> sequence = cache.open()
    >>> for _ in range(40):
    ...     out = cache.attend([sequence], 0, *torch.randn(3, 1, 5, 1, 8))
    >>> cache.length(sequence), cache.bytes_allocated, cache.bytes_used, cache.bytes_dense
    (200, 8192, 4096, 12800)
    """

    def __init__(
        self,
        pattern: Pattern | Recipe,
        *,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        max_tokens: int,
        v_dim: int | None = None,
        num_layers: int = 1,
        num_heads: int | None = None,
        page_size: int = 64,
        heads: HeadRange | None = None,
        hold: int = 0,
        preallocate: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        if not isinstance(pattern, (Pattern, Recipe)):
            raise bad_kind("pattern", "must be a Pattern or a Recipe", pattern)
        if dtype not in FLOATS:
            raise bad_value("dtype", f"must be one of {', '.join(str(one) for one in FLOATS)}", dtype)
        self.pattern, self.num_kv_heads = pattern, check_int("num_kv_heads", num_kv_heads, 1)
        self.num_layers = check_int("num_layers", num_layers, 1)
        self.num_heads = self.num_kv_heads if num_heads is None else check_int("num_heads", num_heads, 1)
        if self.num_heads % self.num_kv_heads:
            raise bad_value("num_kv_heads", f"must divide num_heads ({self.num_heads})", num_kv_heads)
        if heads is not None and heads.end - heads.start != self.num_heads:
            raise bad_value("heads", f"must name num_heads ({self.num_heads}) heads", f"({heads.start}, {heads.end})")
        if check_int("page_size", page_size, 16) % 16:
            raise bad_value("page_size", "must be a multiple of 16", page_size)
        self.heads, self.page_size = heads, page_size
        self.max_tokens, self.num_pages = check_int("max_tokens", max_tokens, 1), check_int("num_pages", num_pages, 1)
        self.hold, self.preallocate = check_int("hold", hold, 0), check_bool("preallocate", preallocate)
        width, v_width = check_int("head_dim", head_dim, 1), head_dim if v_dim is None else check_int("v_dim", v_dim, 1)
        self._everyone = heads or HeadRange(0, self.num_heads, self.num_heads, self.num_kv_heads)
        needs = page_needs(pattern, self._everyone, self.num_kv_heads, self.num_layers, max_tokens, page_size)
        self.ledger = self._new_ledger(needs)
        self.texts: dict[int, list[int]] = {}
        self._memory = self._new_pools(
            lambda shape, kind: torch.zeros(shape, dtype=kind, device=device), dtype, (width, v_width), num_pages
        )

    def _new_pools(self, make: Any, dtype: torch.dtype, widths: tuple[int, int], limit: int) -> Pools:
        return Pools(make, dtype, self.page_size, widths, limit=limit, preallocate=self.preallocate)

    def _new_ledger(self, needs: np.ndarray) -> Ledger:
        return Ledger(needs, page_size=self.page_size, num_pages=self.num_pages, max_tokens=self.max_tokens, hold=self.hold)

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
    ) -> SparseCache:
        """A cache for a model whose attention is `SparseAttention`, which is run over one token to see its layers.

        Args:
            model: takes int64 tokens ``(B, T)``; its modules are numbered, ``layer=0`` and on.
            max_tokens, sequences, chunk: room for so many sequences of so many tokens, which come up to ``chunk`` at a time.
            num_pages: in the place of ``sequences`` and ``chunk``: so many pages, whose memory is allocated at once. Without it memory is
                allocated in steps, up to what these say.
            page_size: the finest block of any layer by default.
            hold: as of the class.
        """
        shape = cache_shape(model)
        shape["page_size"] = shape["page_size"] if page_size is None else page_size
        preallocate = num_pages is not None
        if num_pages is None:
            asked = {name: shape[name] for name in ("pattern", "num_kv_heads", "num_heads", "num_layers", "page_size", "heads")}
            num_pages = check_int("sequences", sequences, 1) * pages_needed(**asked, tokens=max_tokens, chunk=chunk, hold=hold)
        return cls(**shape, num_pages=num_pages, max_tokens=max_tokens, hold=hold, preallocate=preallocate)

    def save(self, path: StrPath) -> None:
        """Write the cache into a file: its settings, its sequences with their numbers and tokens, and the pages that are in use.

        A file that is there is replaced when the new one is complete, and stays as it is when writing fails.
        """
        saved.save(self, path)

    @classmethod
    def load(
        cls, path: StrPath, *, num_pages: int | None = None, max_tokens: int | None = None, device: torch.device | str = "cpu"
    ) -> SparseCache:
        """The cache that :meth:`save` wrote, whatever device it lay on; it goes on as if it had never been away.

        Args:
            num_pages: pages of the new cache, as many as there were by default, allocated at once.
            max_tokens: the longest that a sequence may become, as before by default.

        Raises:
            ValueError: a file that was cut short or altered, one of another kind, or one whose content does not fit together; also
                ``max_tokens`` for which something is missing that had been given back. Only tensors, numbers and text are unpickled.
        """
        data = saved.read(path)
        settings: Any = {**saved.settings_of(data), "device": device}
        if num_pages is not None:
            settings |= {"num_pages": num_pages, "preallocate": True}
        if max_tokens is not None:
            settings["max_tokens"] = max_tokens
        cache = cls(**settings)
        saved.fill(cache, data)
        return cache

    # a whole model

    @contextmanager
    def step(
        self, sequences: Sequence[int], tokens: Tensor, counts: Sequence[int] | None = None, *, cascade: bool = False
    ) -> Iterator[PagedStep]:
        """Run a model over new tokens inside the block: each `SparseAttention` in it stores, attends, and reads from this cache.

        The model is called with ``tokens`` and no more; `s2attn.nn.positions` tells it where they stand. Room in all layers is taken
        before the block, and what no later query reads is given back after it. When the block raises, the sequences are left as they were.

        Args:
            sequences: one for each row, all different.
            tokens: ``(B, T)`` integers, which the cache remembers.
            counts: how many tokens each row has; the rest of a row is padding, of any value, and changes nothing. T by default.
            cascade: read the pages that all sequences share, as forks do, once for all of them: `s2attn.decode_cascade`.

        Raises:
            CacheFull: not enough free pages. Nothing was changed: make room and take the same step again.
            ValueError, TypeError: arguments that do not fit; a sequence that would become longer than max_tokens, or that has been given
                keys without tokens by :meth:`append`; a model that misses a layer or meets one twice.

        >>> import s2attn
        >>> layer = s2attn.SparseAttention(s2attn.Window(32), num_heads=4, num_kv_heads=2)
        >>> shape = {"num_kv_heads": 2, "num_heads": 4, "head_dim": 8, "dtype": torch.float32}
        >>> cache = s2attn.SparseCache(s2attn.Window(32), num_pages=8, max_tokens=100, **shape)
        >>> sequence = cache.open()
        >>> for tokens in torch.arange(100).split(40):
        ...     with torch.no_grad(), cache.step([sequence], tokens[None]):
        ...         out = layer(*(torch.randn(1, len(tokens), heads, 8) for heads in (4, 2, 2)))
        >>> cache.length(sequence), out.shape
        (100, torch.Size([1, 20, 4, 8]))
        """
        counts = checked_counts(sequences, tokens, counts)
        for sequence in sequences:
            self.ledger.trim(sequence)
        with undoing(self.checkpoint(sequences, opened=False)):
            made = PagedStep(self, sequences, tokens, counts, cascade)
            with taking(made):
                yield made
            made.finish()

    # tokens

    def attend(
        self,
        sequences: Sequence[int],
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor | None = None,
        cascade: bool = False,
        trim: bool = True,
        **options: Any,
    ) -> Any:
        """Append new tokens, let their queries attend, and give back what no later query reads: one layer of a model in one call.

        Args:
            sequences: as many as the batch has, all different.
            q, k, v: ``(B, T, H, D)``, ``(B, T, G, D)``, ``(B, T, G, Dv)``; or packed, with ``cu_seqlens_q``.
            cascade: read the pages that all sequences share, as forks do, once for all of them: `s2attn.decode_cascade`.
            trim: give back what no later query reads. Without it the new tokens can be taken back with :meth:`rollback`.
            options: scale, softcap, sinks, return_lse, backend of `s2attn.decode`.

        Raises:
            CacheFull: not enough free pages. Nothing was appended: make room and repeat the call.
            ValueError, TypeError, Unsupported: as `s2attn.decode`; also a sequence that would become longer than max_tokens.
        """
        pattern = pattern_of(self.pattern, layer)
        counts = self._counted(sequences, layer, k, v, cu_seqlens_q)
        with self.whole(sequences, layer):
            self._append(sequences, layer, k, v, counts)
            where: dict[str, Any] = {**self.tables(sequences, layer), "cu_seqlens_q": cu_seqlens_q, "layer": layer, "heads": self.heads}
            result = self.decode(q, pattern, cascade=cascade, **where, **options)
            for sequence in sequences if trim else ():
                self.trim(sequence, layer)
            return result

    def append(self, sequences: Sequence[int], layer: int, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor | None = None) -> None:
        """Store new keys and values of a layer, for all sequences or, with `CacheFull`, for none; arguments as of :meth:`attend`.

        Afterwards the queries of these tokens can be served; :meth:`trim` gives back what only they needed.
        """
        counts = self._counted(sequences, layer, k, v, cu_seqlens_q)
        with self.whole(sequences, layer):
            self._append(sequences, layer, k, v, counts)

    def _append(self, sequences: Sequence[int], layer: int, k: Tensor, v: Tensor, counts: list[int]) -> None:
        rooms = self.ledger.reserve(layer, list(zip(sequences, counts, strict=True)))
        self.prepare(rooms)
        if rooms:
            self.store(k, v, self.numbers(np.concatenate([room.slots.reshape(-1) for room in rooms])))

    def _counted(self, sequences: Sequence[int], layer: int, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None) -> list[int]:
        """New tokens of each sequence, after a trim: pages that are taken again cannot be brought back, so that it comes first."""
        counts = self._counts(sequences, k, v, cu_seqlens_q)
        for sequence in sequences:
            self.ledger.trim(sequence, layer)
        return counts

    def tables(self, sequences: Sequence[int], layer: int) -> dict[str, Tensor]:
        """``block_table`` ``(B, G, max_pages)`` and ``seq_lens`` ``(B,)`` of a layer, as `s2attn.decode` takes them."""
        lengths = np.array([self.ledger.length(sequence, layer) for sequence in sequences], dtype=np.int32)
        return {"block_table": self.numbers(self.table(sequences, layer)), "seq_lens": self.numbers(lengths)}

    @property
    def pools(self) -> tuple[Tensor, Tensor]:
        """The memory of keys and of values, ``(pages, page_size, 1, width)``: of ``num_pages`` pages, or so many as were needed yet."""
        return self._memory.both

    @property
    def k_pages(self) -> Tensor:
        """Keys as `s2attn.decode` takes them: one pool, seen by every KV head (the head axis has stride 0)."""
        return self.pools[0].expand(-1, -1, self.num_kv_heads, -1)

    @property
    def v_pages(self) -> Tensor:
        """Values, in the same way."""
        return self.pools[1].expand(-1, -1, self.num_kv_heads, -1)

    # bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, keys and values."""
        return self._memory.page_bytes

    @property
    def bytes_allocated(self) -> int:
        """Bytes of the memory that is allocated for pages, in use or not."""
        return self._memory.bytes

    @property
    def bytes_used(self) -> int:
        """Bytes of all pages in use; a shared page counts once."""
        return self.ledger.used_pages * self.page_bytes

    @property
    def bytes_most(self) -> int:
        """The most bytes that were ever in use."""
        return self.ledger.most_pages * self.page_bytes

    @property
    def bytes_dense(self) -> int:
        """What the same tokens take where every key is kept and nothing is shared."""
        tokens = sum(self.length(sequence, layer) for sequence in self.ledger.sequences for layer in range(self.num_layers))
        return tokens * self.num_kv_heads * (self.page_bytes // self.page_size)

    @property
    def bytes_waiting(self) -> int:
        """Bytes of pages which the next query of their head does not read, though a later one may: 0 for KV-efficient patterns,
        unless tokens are held."""
        read, held = set(), set()
        for sequence in self.ledger.sequences:
            for layer in range(self.num_layers):
                table = self.ledger.table(sequence, layer)
                pattern, position = pattern_of(self.pattern, layer), self.length(sequence, layer)
                listed = pages_read(pattern, self._everyone, self.num_kv_heads, layer, position, self.page_size)
                width = min(table.shape[1], listed.shape[1])
                held.update(table[table != GONE].tolist())
                read.update(table[:, :width][listed[:, :width]].tolist())
        return len(held - read) * self.page_bytes

    def _counts(self, sequences: Sequence[int], k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None) -> list[int]:
        """New tokens of each sequence; k and v checked."""
        check_new(k, v, self.pools, self.num_kv_heads, 4 if cu_seqlens_q is None else 3)
        if cu_seqlens_q is None:
            counts = [k.shape[1]] * k.shape[0]
        else:
            counts = np.diff(read_cu_seqlens("cu_seqlens_q", cu_seqlens_q, k.shape[0])).tolist()
        if len(counts) != len(sequences):
            raise bad_value("sequences", f"must name one for each of the {len(counts)} of the batch", len(sequences))
        return counts

    # what a step is made of

    def numbers(self, array: np.ndarray) -> Tensor:
        """Numbers of the books where :meth:`store` and :meth:`decode` want them."""
        return torch.from_numpy(array).to(self.pools[0].device)

    def store(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Write new keys ``(..., G, D)`` and values into their slots, ``(tokens * G,)``."""
        store_kv(k.detach().reshape(-1, 1, k.shape[-1]), v.detach().reshape(-1, 1, v.shape[-1]), *self.pools, slots)

    def decode(self, q: Tensor, pattern: Pattern, *, block_table: Tensor, seq_lens: Tensor, cascade: bool = False, **call: Any) -> Any:
        """`s2attn.decode` over the pages of this cache, or `s2attn.decode_cascade`; ``call`` holds their other arguments."""
        where: Any = {"block_table": block_table, "seq_lens": seq_lens}
        return (decode_cascade if cascade else decode)(q, self.k_pages, self.v_pages, pattern, **where, **call)

    def prepare(self, rooms: Sequence[Room]) -> None:
        """Have memory for all pages in use, and make the copies that new tokens of forks need."""
        self.fit_memory()
        copies = torch.from_numpy(np.concatenate([np.zeros((0, 2)), *(room.copies for room in rooms)]).astype(np.int64))
        if len(copies):
            self.copy_pages(copies)

    def fit_memory(self) -> None:
        """Have memory for all pages in use."""
        self._memory.fit(self.ledger.most_pages)

    def copy_pages(self, copies: Tensor) -> None:
        """Copy pages ``(n, 2)``, from and to."""
        copies = copies.to(self.pools[0].device)
        for pages in self.pools:
            pages[copies[:, 1]] = pages[copies[:, 0]]
