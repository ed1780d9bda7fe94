"""Many independent pieces of work on all cores: one thread per piece, results in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Generic, TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def in_order(function: Callable[[Piece], Result], pieces: Sequence[Piece], device: torch.device) -> Iterator[Result]:
    """``map(function, pieces)``; on a CPU by as many threads as torch would use, the caller's among them, each of which computes alone.

    Torch would rather split every single operation among its threads. These then wait for each other after each operation, which is
    slow when operations are small and ruinous when other processes want the same cores. One thread per piece also makes the bits of a
    result independent of the number of threads. While the iterator runs, `torch.get_num_threads` is 1; afterwards it is what it was.
    """
    if device.type != "cpu":
        yield from map(function, pieces)
        return
    with alone() as threads:
        if threads == 1 or len(pieces) < 2:
            yield from map(function, pieces)
        else:
            yield from _by_threads(function, pieces, min(threads, len(pieces)))


_lock = Lock()
_calls, _threads = 0, 1


@contextmanager
def alone() -> Iterator[int]:
    """Let every operation run on one thread, and tell how many torch had before.

    The setting belongs to the process: of several calls at a time the first reads it, so that none takes another's 1 for the user's.

    Around a whole call this also keeps cores free: after an operation that torch split, OpenMP's threads spin for some milliseconds in
    case another one follows, and pieces that start meanwhile have to share a core with them.
    """
    global _calls, _threads
    with _lock:
        if _calls == 0:
            _threads = torch.get_num_threads()
        _calls += 1
        torch.set_num_threads(1)  # threads that start now inherit it
    try:
        yield _threads
    finally:
        with _lock:
            _calls -= 1
            torch.set_num_threads(_threads)


def alone_on(device: torch.device) -> AbstractContextManager[object]:
    """:func:`alone` for what runs on a CPU; elsewhere nothing."""
    return alone() if device.type == "cpu" else nullcontext()


def usual_threads() -> int:
    """How many threads torch has while nobody is :func:`alone`."""
    with _lock:
        return _threads if _calls else torch.get_num_threads()


@dataclass(eq=False)
class _Task(Generic[Piece, Result]):
    """A piece that was handed out."""

    piece: Piece
    future: Future[Result]


def _by_threads(function: Callable[[Piece], Result], pieces: Sequence[Piece], threads: int) -> Iterator[Result]:
    """At most two results per thread wait to be taken. The caller computes, too, whenever the next result is not there yet."""
    inference = torch.is_inference_mode_enabled()

    def compute(piece: Piece) -> Result:  # another thread knows nothing of the caller's modes
        with torch.inference_mode(inference), torch.no_grad():
            return function(piece)

    waiting: deque[_Task[Piece, Result]] = deque()
    pool = _pool(threads - 1)
    try:
        for piece in pieces:
            waiting.append(_Task(piece, pool.submit(compute, piece)))
            if len(waiting) > 2 * threads:
                yield _first(waiting, compute)
        while waiting:
            yield _first(waiting, compute)
    finally:
        wait([task.future for task in waiting if not task.future.cancel()])  # nothing goes on behind the caller's back


def _first(waiting: deque[_Task[Piece, Result]], compute: Callable[[Piece], Result]) -> Result:
    """The first result; until it is there, the caller's thread takes what nobody has begun."""
    first = waiting[0].future
    while not first.done():
        untouched = next((task for task in waiting if task.future.cancel()), None)
        if untouched is None:
            break
        untouched.future = Future()
        try:
            untouched.future.set_result(compute(untouched.piece))
        except Exception as error:  # it is raised when its turn comes
            untouched.future.set_exception(error)
        first = waiting[0].future
    return waiting.popleft().future.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that stay: a new one would first have to find memory and set torch's interpreter up, which takes longer than small pieces."""
    return ThreadPoolExecutor(threads, "s2attn", initializer=torch.set_num_threads, initargs=(1,))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of its parent's threads
