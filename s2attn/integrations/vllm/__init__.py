"""vLLM: an attention backend out of tree, chosen with ``--attention-backend S2ATTN``, and a KV cache that gives blocks back by pattern.

The entry point `plugin` is called by vLLM in all of its processes. `backend` and `cache` implement vLLM's interfaces and need it; `freeing`
and `places` hold what can be said without it.
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any

from s2attn.core import Unsupported, requires

NAME = "S2ATTN"
"""What ``--attention-backend`` is told."""
FIRST, LAST = (0, 32), (0, 33)
"""vLLM's versions that are accepted: engines of the first are run by the tests, the interfaces of both are compared."""
ON_CPU = "S2ATTN_VLLM_CPU"
"""Environment variable that puts the backend in the place of vLLM's only one for CPUs, which heeds no ``--attention-backend``."""

__all__ = ["NAME", "ON_CPU", "S2Backend", "check_version", "plugin", "register"]

_LAZY = {"S2Backend", "S2CpuBackend"}
_PATH = "s2attn.integrations.vllm.backend"
_CANNOT = "s2attn.integrations.vllm cannot run"


def check_version(version: str) -> None:
    """Refuse a vLLM whose interfaces nobody has compared with ours.

    >>> check_version("0.33.1")
    >>> check_version("0.11.2")
    Traceback (most recent call last):
    ...
    s2attn.core.errors.Unsupported: s2attn cannot serve with this vLLM
      vllm: must be 0.32 to 0.33, the versions that were tested; got 0.11.2
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not FIRST <= (int(found[1]), int(found[2])) <= LAST:
        first, last = (".".join(map(str, number)) for number in (FIRST, LAST))
        reason = f"must be {first} to {last}, the versions that were tested; got {version}"
        raise Unsupported("s2attn cannot serve with this vLLM", {"vllm": [reason]})


def register() -> None:
    """Tell vLLM of the attention backend and of the KV cache that goes with it; again is the same as once.

    Raises:
        Unsupported: a version of vLLM that was not tested, or none.
    """
    with requires(_CANNOT, "vllm", "vllm"):
        import vllm
    check_version(vllm.__version__)
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from s2attn.integrations.vllm.cache import register_cache

    name_backend()
    if os.environ.get(ON_CPU) == "1":
        # All of them, so that a kind of attention that we refuse is refused there too and not served without the recipe.
        for name in ("CPU_ATTN", "CPU_MLA", "AMX_MLA"):
            if name in AttentionBackendEnum.__members__:
                register_backend(AttentionBackendEnum[name], f"{_PATH}.S2CpuBackend")
    register_cache()


def name_backend() -> Any:
    """The member of vLLM's enumeration of backends that stands for this one."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, f"{_PATH}.S2Backend")
        # An enumeration pickles its members by value. A process that is spawned reads its configuration before it loads plug-ins, and
        # would not find ours: so this member brings along how it is made.
        AttentionBackendEnum[NAME].__reduce_ex__ = lambda protocol: (name_backend, ())
    return AttentionBackendEnum[NAME]


def plugin() -> None:
    """What vLLM calls when it starts: :func:`register`, but a vLLM that is not supported goes on without us and says so."""
    try:
        register()
    except Unsupported as error:
        logging.getLogger("vllm.s2attn").warning("%s is not available: %s", NAME, error)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    with requires(_CANNOT, "vllm", "vllm"):
        return getattr(import_module(_PATH), name)
