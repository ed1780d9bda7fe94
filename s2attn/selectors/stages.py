"""Named stages of a call, for whoever measures them: while nobody listens, a stage is a look at one variable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

HYPER_STAGES = ("hash", "sort", "blocks", "samples", "exact", "merge")
"""Of `hyper_attention`; "exact" is attention where nothing is estimated."""
Listener = Callable[[str], AbstractContextManager[object]]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def stage(name: str) -> AbstractContextManager[object]:
    """What a listener wants to have around the stage ``name``; stages may lie inside of one another."""
    listener = _listener.get()
    return nullcontext() if listener is None else listener(name)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Inside of it ``listener`` is asked for a context around every stage of this thread."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
