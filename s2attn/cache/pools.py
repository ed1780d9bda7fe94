"""`Pools`: the memory behind pages of keys and of values, allocated at once or in steps as pages come into use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FIRST_PAGES = 16
_Make = Callable[[tuple[int, ...], torch.dtype], Tensor]


class Pools:
    """Two tensors ``(pages, page_size, 1, width)``, of keys and of values, that can grow.

    Args:
        make: allocates zeros of a shape and a dtype.
        page_size: tokens per page.
        widths: channels of a key and of a value.
        limit: the most pages.
        preallocate: allocate all of them now.
    """

    def __init__(
        self,
        make: _Make,
        dtype: torch.dtype,
        page_size: int,
        widths: tuple[int, int],
        *,
        limit: int,
        preallocate: bool,
    ) -> None:
        self._make, self._limit = make, limit
        pages = limit if preallocate else min(limit, FIRST_PAGES)
        # Tensors that are made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self._k, self._v = (make((pages, page_size, 1, width), dtype) for width in widths)

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """Keys and values. The tensors change when :meth:`fit` grows them."""
        pages = min(len(self._k), len(self._v))  # they differ where an exception came between the two
        return self._k[:pages], self._v[:pages]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, keys and values."""
        return sum(pool[0].numel() * pool.element_size() for pool in (self._k, self._v))

    @property
    def bytes(self) -> int:
        """Bytes of all memory that is allocated."""
        return sum(pool.numel() * pool.element_size() for pool in (self._k, self._v))

    def fit(self, pages: int) -> None:
        """Have memory for the first ``pages`` pages: at least a quarter more than before, so that copies stay rare."""
        self._k = self._grown(self._k, pages)
        self._v = self._grown(self._v, pages)

    def _grown(self, pool: Tensor, pages: int) -> Tensor:
        before = len(pool)
        if pages <= before:
            return pool
        with torch.inference_mode(False):
            after = min(self._limit, max(pages, before + before // 4))
            larger = self._make((after, *pool.shape[1:]), pool.dtype)
            larger[:before] = pool
        return larger
