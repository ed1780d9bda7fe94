"""`TwoPools`: a ledger whose pages lie in two memories, those of a device and those of its host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from s2attn.cache.ledger import GONE, CacheFull, Ledger
from s2attn.core import bad_value, check_int
from s2attn.patterns.runs import Array


class TwoPools(Ledger):
    """Pages below ``device_pages`` lie on the device, the others on the host; a layer's new pages come from one of the two.

    Args:
        needs, options: as of `Ledger`.
        num_pages: pages on the device.
        host_pages: pages on the host.
        host_layers: layers whose pages are all on the host.

    Attributes:
        most_on_device, most_on_host: the most pages that were ever in use there.
    """

    def __init__(self, needs: Array, *, num_pages: int, host_pages: int, host_layers: Sequence[int], **options: Any) -> None:
        super().__init__(needs, num_pages=num_pages + host_pages, **options)
        for layer in host_layers:
            if check_int("host_layers", layer, 0) >= len(needs):
                raise bad_value("host_layers", f"must name layers below {len(needs)}", layer)
        self.device_pages, self.host_layers = num_pages, frozenset(host_layers)
        self._set_free(list(range(self.num_pages - 1, -1, -1)))
        self.most_on_device = self.most_on_host = 0

    @property
    def on_device(self) -> int:
        """Pages in use on the device."""
        return self.device_pages - len(self._free)

    @property
    def on_host(self) -> int:
        """Pages in use on the host."""
        return self.num_pages - self.device_pages - len(self._free_on_host)

    @property
    def used_pages(self) -> int:
        return self.on_device + self.on_host

    def checkpoint(self, sequences: Iterable[int], layer: int | None = None, *, opened: bool = True) -> Callable[[], None]:
        """As of `Ledger`; other sequences, whose pages :meth:`send` may give other numbers, get the old numbers back."""
        listed, layers = set(sequences), slice(None) if layer is None else slice(layer, layer + 1)
        base = super().checkpoint(listed, layer, opened=opened)
        others = [(mine, mine.table[layers].copy()) for number, mine in self._sequences.items() if number not in listed]
        most = self.most_on_device, self.most_on_host

        def undo() -> None:
            for mine, before in others:
                now = mine.table[layers, :, : before.shape[2]]
                sent = (now >= self.device_pages) & (before != GONE) & (before < self.device_pages)
                now[sent] = before[sent]
            self.most_on_device, self.most_on_host = most
            base()

        return undo

    def send(self, layer: int, pages: Array) -> Array:
        """Give pages of a layer other numbers, on the host: ``(n, 2)`` old and new ones of as many as there is room for.

        All sequences that share a page follow it. Somebody has to copy what it holds before the old number is used again.
        """
        with self.whole((), layer):
            old = pages[: len(self._free_on_host)]
            new = self._taken(self._free_on_host, len(old))
            self.references[new], self.references[old] = self.references[old], 0
            moved = np.arange(self.num_pages, dtype=np.int32)
            moved[old] = new
            for mine in self._sequences.values():
                table = mine.table[layer]
                held = table != GONE
                table[held] = moved[table[held]]
            self._free.extend(old.tolist())
            self._count()
            return np.stack([old, new], axis=1)

    def _check_room(self, needed: Mapping[int, int]) -> None:
        for where, free, total, here in (
            ("on the device", self._free, self.device_pages, False),
            ("on the host", self._free_on_host, self.num_pages - self.device_pages, True),
        ):
            asked = sum(count for layer, count in needed.items() if (layer in self.host_layers) == here)
            if asked > len(free):
                raise CacheFull(f"the cache is full: {asked} new pages are needed {where}, {len(free)} of {total} are free there")

    def _take(self, count: int, layer: int) -> Array:
        pages = self._taken(self._free_on_host if layer in self.host_layers else self._free, count)
        self._count()
        return pages

    def _give_back(self, pages: list[int]) -> None:
        self._free.extend(page for page in pages if page < self.device_pages)
        self._free_on_host.extend(page for page in pages if page >= self.device_pages)

    def _set_free(self, pages: list[int]) -> None:
        self._free, self._free_on_host = [], []
        self._give_back(pages)

    def _count(self) -> None:
        self.most_on_device, self.most_on_host = max(self.most_on_device, self.on_device), max(self.most_on_host, self.on_host)
        self.most_pages = max(self.most_pages, self.used_pages)
