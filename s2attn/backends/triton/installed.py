"""Which Triton is installed, and what it lacks: an older, a newer or a broken one is a reason, not an ImportError."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

LEAST = (3, 6)
"""The first release that the kernels and their launches are written for."""
ABSENT = "triton is not installed; the extra named triton brings it"


@lru_cache(maxsize=1)
def triton_objections() -> tuple[str, ...]:
    """Every reason why the installed Triton cannot run the kernels; empty when it can.

    It is looked for once in a process.
    """
    if find_spec("triton") is None:
        return (ABSENT,)
    try:
        version = str(import_module("triton").__version__)
    except Exception as error:  # whatever a broken installation raises
        return (f"triton cannot be imported: {type(error).__name__}: {error}",)
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or tuple(int(number) for number in found.groups()) < LEAST:
        return (f"needs Triton {LEAST[0]}.{LEAST[1]} or newer, not {version}",)
    try:
        _ = import_module("triton.knobs").runtime.interpret, import_module("triton.runtime").driver
    except (ImportError, AttributeError) as error:
        return (f"Triton {version} is not known to these kernels: {type(error).__name__}: {error}",)
    return ()


@lru_cache(maxsize=1)
def gluon_objections() -> tuple[str, ...]:
    """Every reason why the installed Triton cannot run the Gluon kernels, whose names move between releases."""
    try:
        import_module("s2attn.kernels.hopper.names")
    except (ImportError, AttributeError) as error:
        return (f"this release of Triton lacks a name of Gluon: {type(error).__name__}: {error}",)
    return ()


@lru_cache(maxsize=1)
def allocator_objections() -> tuple[str, ...]:
    """Every reason why no kernel that makes descriptors can be launched: the caller's allocator could not be put back."""
    try:
        _ = import_module("triton.runtime._allocation")._allocator.get()
        _ = import_module("triton").set_allocator
    except (ImportError, AttributeError) as error:
        return (f"this release of Triton does not tell which allocator is set: {type(error).__name__}: {error}",)
    return ()
