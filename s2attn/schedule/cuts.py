"""How decoding cuts its lists: not at all, each by itself, or all into equal ranges; a pure function of what a host knows in advance."""

from __future__ import annotations

from dataclasses import dataclass

CUTS = ("direct", "split", "stream")
LEAST_TOKENS = 256
"""A piece with fewer listed tokens costs more to join than it gains."""
FIXED_SPLITS, FIXED_TOKENS = 16, 512
"""Pieces of an output at most, and tokens of each at least, where nothing but its own list may matter."""
MOST_SPLITS = 64
EVEN = 0.7
"""Rows whose mean is so close to the longest are taken for equally long."""


@dataclass(frozen=True)
class Cut:
    """Which way the lists of a call are cut.

    Attributes:
        form: "direct": one program for each output. "split": each output by itself, into ``splits`` pieces at most with ``least`` listed
            tokens or more. "stream": all outputs into ``programs`` equal ranges (`s2attn.schedule.stream_k`).
    """

    form: str
    splits: int = 1
    least: int = LEAST_TOKENS
    programs: int = 0


@dataclass(frozen=True)
class RowLengths:
    """Listed tokens of the rows of a layout: of the longest, and on average."""

    longest: int
    mean: float


def choose_cut(outputs: int, rows: RowLengths, processors: int, *, invariant: bool = False, form: str = "") -> Cut:
    """The cut for so many outputs (tiles of queries times units of heads) on a device of so many processors.

    Args:
        invariant: the pieces of an output depend on its own list alone, so that its bits do not depend on the batch.
        form: one of `CUTS` instead of the rule's choice; an ``invariant`` call is not asked.

    >>> choose_cut(4096, RowLengths(8192, 4000.0), 132).form
    'direct'
    >>> choose_cut(64, RowLengths(8192, 8000.0), 132)
    Cut(form='split', splits=9, least=256, programs=0)
    >>> choose_cut(64, RowLengths(131072, 65536.0), 132)
    Cut(form='stream', splits=1, least=256, programs=264)
    """
    programs = 2 * processors
    if invariant:
        return Cut("split", FIXED_SPLITS, FIXED_TOKENS) if rows.longest >= 2 * FIXED_TOKENS else Cut("direct")
    if not form:
        cuttable = rows.longest >= 2 * LEAST_TOKENS and outputs < 4 * programs
        form = ("split" if rows.mean >= EVEN * rows.longest else "stream") if cuttable else "direct"
    if form == "direct":
        return Cut("direct")
    if form == "stream":
        return Cut("stream", programs=programs)
    wanted = -(-2 * programs // max(outputs, 1))
    return Cut("split", max(1, min(wanted, -(-rows.longest // LEAST_TOKENS), MOST_SPLITS)))
