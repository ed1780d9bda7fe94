"""The ordered list of backends, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

from torch import Tensor

from s2attn.backends.base import Backend, Pages, Writes
from s2attn.core import Unsupported, bad_kind, bad_value


def _cpu() -> Backend:
    from s2attn.backends.cpu import Cpu

    return Cpu()


def _torch() -> Backend:
    from s2attn.backends.torch import Torch

    return Torch()


def _triton() -> Backend:
    from s2attn.backends.triton import Triton

    return Triton()


def _reference() -> Backend:
    from s2attn.backends.reference import Reference

    return Reference()


_LOADERS: dict[str, Callable[[], Backend]] = {"cpu": _cpu, "torch": _torch, "triton": _triton, "reference": _reference}
"""In order of preference. A loader imports its backend on first use, so that `import s2attn` stays light.

The Triton kernels stand behind plain torch, and so are used only when they are asked for by name, until there is a record of
their results and their speed on a GPU.
"""


def backend_names() -> list[str]:
    """The names that ``backend=`` accepts besides ``"auto"``, the preferred one first.

    >>> backend_names()[-1]
    'reference'
    """
    return list(_LOADERS)


@cache
def _load(name: str) -> Backend:
    return _LOADERS[name]()


def get_backend(name: str) -> Backend:
    """The backend of that name, whether or not it can serve anything here.

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: no backend has that name; the message lists those that exist.
    """
    if not isinstance(name, str):
        raise bad_kind("backend", f"must be {_choices()}", name)
    if name not in _LOADERS:
        raise bad_value("backend", f"must be {_choices()}", repr(name))
    return _load(name)


def pick(name: str, q: Tensor, k: Tensor, v: Tensor) -> Backend:
    """The backend that shall serve these tensors: the named one, or for ``"auto"`` the first without objections.

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: no backend has that name; the message lists those that exist.
        Unsupported: the named backend, or with ``"auto"`` every backend, objects; all reasons of all backends are given.
    """
    return _pick(name, "attention", lambda backend: backend.objections(q, k, v))


def pick_paged(name: str, q: Tensor, pages: Pages) -> Backend:
    """The same choice for queries whose keys lie in pages."""
    return _pick(name, "decode", lambda backend: backend.paged_objections(q, pages))


def pick_mass(name: str, q: Tensor, k: Tensor) -> Backend:
    """The same choice for estimates of the mass of blocks."""
    return _pick(name, "estimates of block mass", lambda backend: backend.mass_objections(q, k))


def pick_store(name: str, new: Writes) -> Backend:
    """The same choice for new keys and values that shall be written into pages."""
    return _pick(name, "store_kv", lambda backend: backend.store_objections(new))


def _pick(name: str, what: str, objections: Callable[[Backend], list[str]]) -> Backend:
    chosen = None if name == "auto" else get_backend(name)
    for backend in _every_backend() if chosen is None else [chosen]:
        if not objections(backend):
            return backend
    title = f"no backend can run {what} on these tensors" if chosen is None else f"{what} cannot run with backend={name!r}"
    raise Unsupported(title, {b.name: objections(b) or ["could serve this call, but was not asked for"] for b in _every_backend()})


def _every_backend() -> Iterator[Backend]:
    return (_load(name) for name in _LOADERS)


def _choices() -> str:
    return "one of " + ", ".join(repr(name) for name in ["auto", *_LOADERS])
