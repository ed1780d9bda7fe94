"""`Ledger`: which page belongs to whom. Numbers only, so that everything about it can be counted without a single key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from s2attn.core import bad_value, check_int
from s2attn.patterns.runs import Array

GONE = -1


class CacheFull(RuntimeError):
    """There are not enough free pages for new tokens. Nothing was changed: free a sequence or trim, and append the same tokens again.

    Attributes:
        texts: where it ended `s2attn.generate` or `s2attn.stream`, what was written so far; empty elsewhere.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.texts: list[Any] = []


class undoing:
    """``with undoing(undo):`` calls ``undo`` when the block raises anything at all, an interrupt too.

    A class, since a generator that an interrupt leaves suspended would undo when it is collected, at any later time.
    """

    def __init__(self, undo: Callable[[], None]) -> None:
        self.undo = undo

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.undo()


@dataclass(frozen=True, eq=False)
class Room:
    """Where new tokens of one sequence go.

    Attributes:
        slots: ``(tokens, kv_heads)`` int64, ``page * page_size + place``; -1 for a token that no query will ever read.
        copies: ``(n, 2)`` pages to copy, from and to, before anything is written.
    """

    slots: Array
    copies: Array


@dataclass(eq=False)
class _Sequence:
    table: Array  # (layers, kv_heads, pages so far) int32, GONE where there is none
    lengths: Array  # (layers,) int64


class Ledger:
    """Pages of many sequences, given out per (layer, KV head) and taken back when the pattern allows it.

    Args:
        needs: ``(layers, kv_heads, pages)`` position of the last query that reads each page of a sequence, -1 for none.
        page_size: tokens per page.
        num_pages: pages in the pool, shared by all layers and heads.
        max_tokens: the longest sequence, for which ``needs`` holds.
        hold: so many of the last tokens of a sequence can be taken back: what queries at their positions read is kept.

    Attributes:
        most_pages: the most pages that were ever in use.

    Invariants:
        P1  a page is free, or as many tables hold it as its count of references says, each once
        P2  a table holds a page wherever it has tokens that a query at its length or later reads, or one of the ``hold`` queries before
        P3  tokens are only written to pages of one owner
        P4  a page below ``most_pages`` is taken before any other, so that memory for ``most_pages`` pages is enough

    Every method changes all that it says or, when it raises anything at all, nothing: counts and free pages are made anew from the tables
    then. Only what :meth:`trim` gives back before new pages are taken stays given back.
    """

    def __init__(self, needs: Array, *, page_size: int, num_pages: int, max_tokens: int, hold: int = 0) -> None:
        self.needs, self.page_size, self.num_pages, self.max_tokens, self.hold = needs, page_size, num_pages, max_tokens, hold
        self.references = np.zeros(num_pages, dtype=np.int32)
        self.most_pages = 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0

    @property
    def used_pages(self) -> int:
        return self.num_pages - len(self._free)

    @property
    def sequences(self) -> list[int]:
        return list(self._sequences)

    def open(self) -> int:
        """A new empty sequence; its number."""
        layers, kv_heads, _ = self.needs.shape
        return self._enter(_Sequence(np.full((layers, kv_heads, 0), GONE, dtype=np.int32), np.zeros(layers, dtype=np.int64)))

    def fork(self, sequence: int) -> int:
        """A new sequence that begins with all tokens of another one; both share its pages until one of them writes to the last."""
        mine = self._level(sequence, "be forked")
        with self.whole():
            number = self._enter(_Sequence(mine.table.copy(), mine.lengths.copy()))
            self.references[mine.table[mine.table != GONE]] += 1
            return number

    def close(self, sequence: int) -> None:
        """Give back all pages of a sequence and forget it."""
        mine = self._get(sequence)
        with self.whole([sequence]):
            self._release(mine.table)
            del self._sequences[sequence]

    def checkpoint(self, sequences: Iterable[int], layer: int | None = None, *, opened: bool = True) -> Callable[[], None]:
        """Remember some sequences, in one layer or in all; calling the result makes them what they were.

        Pages that a :meth:`trim` has given back since, and that were taken again, do not hold what they held: trim before.

        Args:
            opened: close the sequences too that were opened since.
        """
        layers = slice(None) if layer is None else slice(layer, layer + 1)
        kept = [(number, mine, mine.table[layers].copy(), mine.lengths[layers].copy()) for number, mine in self._all(sequences)]
        known, most, following = set(self._sequences) if opened else None, self.most_pages, self._next

        def undo() -> None:
            for number, mine, table, lengths in kept:
                mine.table[layers, :, : table.shape[2]] = table
                mine.table[layers, :, table.shape[2] :] = GONE
                mine.lengths[layers] = lengths
                self._sequences[number] = mine
            if known is not None:
                self._sequences = {number: mine for number, mine in self._sequences.items() if number in known}
                self._next = following
            self.most_pages = most
            self._recount()

        return undo

    def whole(self, sequences: Iterable[int] = (), layer: int | None = None) -> undoing:
        """Undo what the block changes about these sequences, and close what it opens, when it raises anything at all."""
        return undoing(self.checkpoint(sequences, layer))

    def length(self, sequence: int, layer: int = 0) -> int:
        """Tokens so far."""
        return int(self._get(sequence).lengths[self._layer(layer)])

    def trim(self, sequence: int, layer: int | None = None) -> None:
        """Give back the pages that no query at the sequence's length or later reads, nor one of the ``hold`` queries before."""
        mine = self._get(sequence)
        layers = slice(None) if layer is None else slice(self._layer(layer), layer + 1)
        table = mine.table[layers]
        first = mine.lengths[layers, None, None] - self.hold
        dead = (table != GONE) & (self.needs[layers, :, : table.shape[2]] < first)
        if dead.any():
            with self.whole([sequence], layer):
                self._release(table[dead])
                table[dead] = GONE

    def reserve(self, layer: int, tokens: Sequence[tuple[int, int]]) -> list[Room]:
        """Room for so many new tokens of each (sequence, tokens), for all of them or, with `CacheFull`, for none."""
        return self._reserve([self._layer(layer)], tokens)[0]

    def reserve_step(self, tokens: Sequence[tuple[int, int]]) -> list[list[Room]]:
        """Room in all layers, ``[layer][sequence]``, or in none; every sequence must have the same length in all layers."""
        for sequence, _ in tokens:
            self._level(sequence, "take a step")
        return self._reserve(range(len(self.needs)), tokens)

    def _reserve(self, layers: Sequence[int], tokens: Sequence[tuple[int, int]]) -> list[list[Room]]:
        if len({sequence for sequence, _ in tokens}) < len(tokens):
            raise bad_value("sequences", "must not repeat", [sequence for sequence, _ in tokens])
        for sequence, count in tokens:
            end = self.length(sequence, layers[0]) + count
            if end > self.max_tokens:
                raise bad_value("tokens", f"must not make sequence {sequence} longer than max_tokens ({self.max_tokens})", end)
        one = layers[0] if len(layers) == 1 else None
        for sequence, _ in tokens:
            self.trim(sequence, one)
        self._check_room({layer: self._needed(layer, tokens) for layer in layers})
        with self.whole([sequence for sequence, _ in tokens], one):
            return [[self._extend(self._sequences[sequence], layer, count) for sequence, count in tokens] for layer in layers]

    def check_rollback(self, sequence: int, tokens: int) -> None:
        """Refuse a :meth:`rollback` of more tokens than can be taken back."""
        mine = self._level(sequence, "be rolled back")
        length = int(mine.lengths[0])
        begun = -(-length // self.page_size)
        gone = mine.table[:, :, :begun] == GONE
        # A page that was given back is missed by any sequence that is not longer than its last reader.
        most = length - max(0, int(np.max(self.needs[:, :, :begun] + 1, where=gone, initial=0)))
        if check_int("tokens", tokens, 0) > most:
            rule = f"must be at most {most}, since keys which sequence {sequence} read before have been given back; hold= keeps them"
            raise bad_value("tokens", rule if most < length else f"must be at most {length}, the length of sequence {sequence}", tokens)

    def rollback(self, sequence: int, tokens: int) -> None:
        """Take the last tokens of a sequence back, in all layers; pages that hold nothing else return to the pool."""
        self.check_rollback(sequence, tokens)
        mine = self._get(sequence)
        length = int(mine.lengths[0])
        with self.whole([sequence]):
            later = mine.table[:, :, -(-(length - tokens) // self.page_size) :]
            self._release(later)
            later[:] = GONE
            mine.lengths[:] = length - tokens

    def books(self, sequence: int) -> tuple[Array, Array]:
        """What :meth:`restore` needs: pages ``(layers, kv_heads, pages)`` and lengths ``(layers,)``."""
        mine = self._get(sequence)
        return mine.table[:, :, : -(-int(mine.lengths.max()) // self.page_size)], mine.lengths

    def restore(self, sequences: Mapping[int, tuple[Array, Array]], pages: int) -> None:
        """Take over the :meth:`books` of sequences that use the first ``pages`` pages; for a ledger without sequences."""
        with self.whole():
            for sequence, (table, lengths) in sequences.items():
                self._check_books(sequence, table, lengths, pages)
                self._sequences[sequence] = _Sequence(table.copy(), lengths.copy())
            self._recount()
            self._next = max([-1, *self._sequences]) + 1
            self.most_pages = self.used_pages

    def _check_books(self, sequence: int, table: Array, lengths: Array, pages: int) -> None:
        check_int("sequence", sequence, 0)
        if lengths.shape != (len(self.needs),) or not (lengths >= 0).all() or not (lengths <= self.max_tokens).all():
            raise bad_value("lengths", f"must be {len(self.needs)} numbers up to max_tokens ({self.max_tokens})", lengths.tolist())
        expected = (*self.needs.shape[:2], -(-int(lengths.max()) // self.page_size))
        if table.shape != expected or not (table >= GONE).all() or not (table < pages).all():
            raise bad_value("table", f"must have shape {expected} and name pages below {pages}", table.shape)
        held = table[table != GONE]
        begun = np.arange(expected[2]) * self.page_size < lengths[:, None, None]
        needed = begun & (self.needs[:, :, : expected[2]] >= lengths[:, None, None])
        if len(np.unique(held)) < len(held) or (needed & (table == GONE)).any() or (~begun & (table != GONE)).any():
            raise bad_value("table", "must name the pages that later queries read, and each page once", f"others for {sequence}")

    def table(self, sequence: int, layer: int) -> Array:
        """Pages ``(kv_heads, pages)`` of one layer, -1 where there is none."""
        return self._get(sequence).table[self._layer(layer)]

    def _needed(self, layer: int, tokens: Sequence[tuple[int, int]]) -> int:
        fresh, shared = 0, []
        for sequence, count in tokens:
            mine = self._sequences[sequence]
            new, written = self._new_pages(mine, layer, count), self._written(mine, layer, count)
            fresh += int(new.sum())
            shared.append(written[self.references[written] > 1])
        page, writers = np.unique(np.concatenate(shared), return_counts=True) if shared else (np.zeros(0, int), np.zeros(0, int))
        return fresh + int(np.minimum(writers, self.references[page] - 1).sum())  # the last owner of a shared page keeps it

    def _new_pages(self, mine: _Sequence, layer: int, count: int) -> Array:
        """Which pages ``(kv_heads, new)`` after the ones that have begun will be read by a query at the sequence's length or later."""
        begin = int(mine.lengths[layer])
        first, end = -(-begin // self.page_size), -(-(begin + count) // self.page_size)
        return self.needs[layer, :, first:end] >= begin

    def _written(self, mine: _Sequence, layer: int, count: int) -> Array:
        """Pages that have begun and get more tokens."""
        begin = int(mine.lengths[layer])
        if not count or begin % self.page_size == 0:
            return np.zeros(0, dtype=np.int32)
        pages = mine.table[layer, :, begin // self.page_size]
        return pages[pages != GONE]

    def _extend(self, mine: _Sequence, layer: int, count: int) -> Room:
        begin = int(mine.lengths[layer])
        first, end = -(-begin // self.page_size), -(-(begin + count) // self.page_size)
        if end > mine.table.shape[2]:
            wider = min(max(end, 2 * mine.table.shape[2]), self.needs.shape[2])
            mine.table = np.pad(mine.table, ((0, 0), (0, 0), (0, wider - mine.table.shape[2])), constant_values=GONE)
        table = mine.table[layer]
        written = self._written(mine, layer, count)
        old = written[self.references[written] > 1]
        copies = np.stack([old, self._take(len(old), layer)], axis=1)
        if len(old):
            self.references[old] -= 1
            last = table[:, begin // self.page_size]
            last[np.isin(last, old)] = copies[:, 1]  # in the order of the heads, as _written gave them
        new = self._new_pages(mine, layer, count)
        table[:, first:end][new] = self._take(int(new.sum()), layer)
        mine.lengths[layer] = begin + count
        token = np.arange(begin, begin + count)
        page = table[:, token // self.page_size].astype(np.int64).T
        slots = page * self.page_size + (token % self.page_size)[:, None]
        return Room(np.where(page == GONE, GONE, slots), copies)

    def _check_room(self, needed: Mapping[int, int]) -> None:
        """Refuse so many new pages of each layer where there are fewer."""
        total = sum(needed.values())
        if total > len(self._free):
            raise CacheFull(f"the cache is full: {total} new pages are needed, {len(self._free)} of {self.num_pages} are free")

    def _take(self, count: int, layer: int) -> Array:
        """Free pages for a layer, now of one owner each."""
        pages = self._taken(self._free, count)
        self.most_pages = max(self.most_pages, self.used_pages)
        return pages

    def _taken(self, free: list[int], count: int) -> Array:
        at = len(free) - count
        pages = np.array(free[at:][::-1], dtype=np.int32)
        del free[at:]
        self.references[pages] = 1
        return pages

    def _release(self, pages: Array) -> None:
        pages = pages[pages != GONE]
        self.references[pages] -= 1
        self._give_back(pages[self.references[pages] == 0].tolist())

    def _give_back(self, pages: list[int]) -> None:
        self._free.extend(pages)

    def _recount(self) -> None:
        """Count the owners of pages, and which ones are free, from the tables alone."""
        self.references[:] = 0
        for mine in self._sequences.values():
            self.references[mine.table[mine.table != GONE]] += 1
        self._set_free(np.flatnonzero(self.references == 0)[::-1].tolist())

    def _set_free(self, pages: list[int]) -> None:
        """These pages are free; the last one is taken first."""
        self._free = pages

    def _enter(self, sequence: _Sequence) -> int:
        number, self._next = self._next, self._next + 1
        self._sequences[number] = sequence
        return number

    def _all(self, sequences: Iterable[int]) -> list[tuple[int, _Sequence]]:
        return [(number, self._get(number)) for number in sequences]

    def _get(self, sequence: int) -> _Sequence:
        if sequence not in self._sequences:
            raise bad_value("sequence", "must be one that is open in this cache", sequence)
        return self._sequences[sequence]

    def _level(self, sequence: int, what: str) -> _Sequence:
        mine = self._get(sequence)
        if (mine.lengths != mine.lengths[0]).any():
            raise bad_value("sequence", f"must have the same length in all layers to {what}", mine.lengths.tolist())
        return mine

    def _layer(self, layer: int) -> int:
        if check_int("layer", layer, 0) >= len(self.needs):
            raise bad_value("layer", f"must be below num_layers ({len(self.needs)})", layer)
        return layer
