"""Which versions of Megatron-core the adapter was written for: its constructors and calls change between minor versions."""

from __future__ import annotations

from s2attn.core import Unsupported, requires

OLDEST, NEWEST = (0, 16), (0, 16)
"""The first and the last minor version that the tests know."""


def check_version(version: str | None = None) -> None:
    """Refuse a Megatron-core whose interfaces are not the ones that the tests know.

    Args:
        version: as in ``megatron.core.__version__``, which is read when it is left out.

    Raises:
        Unsupported: another minor version, or a Megatron-core that is not there.

    >>> check_version("0.16.1")
    >>> check_version("0.9.0")
    Traceback (most recent call last):
    ...
    s2attn.core.errors.Unsupported: s2attn.integrations.megatron cannot run
      megatron-core: must be of version 0.16; got 0.9.0
    """
    if version is None:
        with requires("s2attn.integrations.megatron cannot run", "megatron", "megatron"):
            from megatron.core import __version__ as version
    parts = str(version).split(".")
    minor = tuple(int(part) for part in parts[:2]) if all(part.isdecimal() for part in parts[:2]) else ()
    if not OLDEST <= minor <= NEWEST:
        rule = f"must be of version {'.'.join(map(str, OLDEST))}" + (f" to {'.'.join(map(str, NEWEST))}" if OLDEST != NEWEST else "")
        raise Unsupported("s2attn.integrations.megatron cannot run", {"megatron-core": [f"{rule}; got {version}"]})
