"""A cache in a file and out of it: its settings as plain values, its books, and the pages that are in use."""

from __future__ import annotations

from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2attn.cache.ledger import GONE
from s2attn.core import StrPath, as_path, atomic_write, bad_value
from s2attn.core.files import append_checksum, verify_checksum
from s2attn.layout import HeadRange
from s2attn.patterns import Pattern, Recipe

if TYPE_CHECKING:
    from s2attn.cache.sparse import SparseCache

VERSION = 2
_RULE = "must be a file that SparseCache.save wrote"
_NUMBERS = ("num_kv_heads", "head_dim", "v_dim", "num_pages", "max_tokens", "num_layers", "num_heads", "page_size", "hold")
_BOOKS = {"table": (torch.int32, 3), "lengths": (torch.int64, 1), "tokens": (torch.int64, 1)}
_FIELDS = {"format", "version", "settings", "dtype", "pattern", "heads", "sequences", "k", "v"}


def save(cache: SparseCache, path: StrPath) -> None:
    """Write a cache; see :meth:`SparseCache.save`."""
    used = np.flatnonzero(cache.ledger.references)
    number = np.full(cache.ledger.num_pages + 1, GONE, dtype=np.int32)  # the last one answers GONE
    number[used] = np.arange(len(used))
    sequences = {}
    for sequence in cache.ledger.sequences:
        table, lengths = cache.ledger.books(sequence)
        tokens = torch.tensor(cache.texts[sequence], dtype=torch.int64)
        sequences[sequence] = {"table": torch.from_numpy(number[table]), "lengths": torch.from_numpy(lengths), "tokens": tokens}
    pools = [pool[torch.from_numpy(used).to(pool.device)].cpu() for pool in cache.pools]
    widths = {"head_dim": pools[0].shape[-1], "v_dim": pools[1].shape[-1]}
    settings = {name: widths[name] if name in widths else getattr(cache, name) for name in (*_NUMBERS, "preallocate")}
    heads = cache.heads and [cache.heads.start, cache.heads.end, cache.heads.num_heads, cache.heads.num_kv_heads]
    pattern = "recipe" if isinstance(cache.pattern, Recipe) else "pattern", cache.pattern.to_json()
    plain = {"format": "s2attn.SparseCache", "version": VERSION, "settings": settings, "dtype": str(pools[0].dtype).removeprefix("torch.")}
    with atomic_write(as_path("path", path)) as file:
        torch.save({**plain, "pattern": pattern, "heads": heads, "sequences": sequences, "k": pools[0], "v": pools[1]}, file)
        append_checksum(file)


def read(path: StrPath) -> dict[str, Any]:
    """What :func:`save` wrote; nothing but tensors, numbers and text is unpickled."""
    verify_checksum(as_path("path", path), _RULE)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
        raise bad_value("path", _RULE, f"{path} ({str(error).splitlines()[0][:80]})") from None
    if not isinstance(data, dict) or data.get("format") != "s2attn.SparseCache" or set(data) != _FIELDS:
        raise bad_value("path", _RULE, path)
    if data["version"] != VERSION:
        raise bad_value("path", f"must have version {VERSION}", data["version"])
    return data


def settings_of(data: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `SparseCache`."""
    kind, text = data["pattern"]
    pattern = Recipe.from_json(text) if kind == "recipe" else Pattern.from_json(text)
    heads = data["heads"] and HeadRange(*data["heads"])
    return {
        **{name: data["settings"][name] for name in (*_NUMBERS, "preallocate")},
        "pattern": pattern,
        "heads": heads,
        "dtype": getattr(torch, data["dtype"]),
    }


def fill(cache: SparseCache, data: dict[str, Any]) -> None:
    """Give a new cache the sequences of a file, under their numbers."""
    pages = len(data["k"])
    if pages > cache.num_pages:
        raise bad_value("num_pages", f"must be at least {pages}, the pages in the file", cache.num_pages)
    for pool, saved in zip(cache.pools, (data["k"], data["v"]), strict=True):
        if (len(saved), saved.shape[1:], saved.dtype) != (pages, pool.shape[1:], pool.dtype):
            rule = f"must hold {pages} pages of {tuple(pool.shape[1:])} {pool.dtype}"
            raise bad_value("path", rule, f"{tuple(saved.shape)} {saved.dtype}")
    for books in data["sequences"].values():
        for name, (dtype, axes) in _BOOKS.items():
            if books[name].dtype != dtype or books[name].dim() != axes:
                rule = f"must hold {name} of {axes} axes of {dtype}"
                raise bad_value("path", rule, f"{books[name].dtype} {tuple(books[name].shape)}")
    cache.ledger.restore({i: (books["table"].numpy(), books["lengths"].numpy()) for i, books in data["sequences"].items()}, pages)
    cache.texts.update({i: books["tokens"].tolist() for i, books in data["sequences"].items()})
    cache.prepare([])
    for pool, saved in zip(cache.pools, (data["k"], data["v"]), strict=True):
        pool[:pages] = saved.to(pool.device)
