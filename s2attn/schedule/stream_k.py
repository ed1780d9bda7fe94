"""Stream-K: equal work for every program over outputs of any lengths (LeanAttention, arXiv:2405.10480, section 4).

All tiles of all outputs stand in one line, and every program takes one contiguous range of it. Everything follows from the numbers of
tiles by arithmetic without loops, so that a device computes it by itself: the shapes depend on the numbers of programs and outputs alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class StreamK:
    """Which tiles each program takes, and which programs share an output; int64 tensors on the device of the tile counts.

    A program walks tiles ``begin[p]`` to ``begin[p + 1]``. The part of an output that falls into its range is a *piece*. A piece that is
    its whole output is written straight to the result. Any other piece leaves a partial state in a slot: slot ``p`` when it continues an
    output that an earlier program began, slot ``programs + p`` when it begins an output that a later program ends. So every program needs
    two slots at most, nobody waits for anybody, and a second kernel joins the slots of each split output in a fixed order: first
    ``programs + first[o]``, then ``first[o] + 1 .. last[o]``.

    Attributes:
        begin: ``(programs + 1,)`` first tile of each program, and the number of all tiles.
        output: ``(programs,)`` output that holds the first tile of each program (the number of outputs for a program without tiles).
        tile_ptr: ``(outputs + 1,)`` first tile of each output, and the number of all tiles.
        first, last: ``(outputs,)`` programs with the first and the last tile of each output; equal when it is whole. An output without
            tiles has ``first = last = -1``: nobody walks it, and the second kernel writes its empty result.

    Invariants:
        K1  ranges are consecutive, cover every tile once, and differ in length by at most one, the longer ones first
        K2  only the first piece of a program continues an output, only its last one begins an output without ending it
        K3  the programs of an output are ``first .. last``, each with a piece of it
    """

    begin: Tensor
    output: Tensor
    tile_ptr: Tensor
    first: Tensor
    last: Tensor

    @property
    def programs(self) -> int:
        return self.output.shape[0]


def stream_k(tiles: Tensor, programs: int) -> StreamK:
    """Spread ``tiles[o]`` tiles of each output o over ``programs`` programs; nothing is read back from the device.

    With T tiles in all, ``most = ceil(T / programs)``: the first ``T - (most - 1) * programs`` programs take ``most``, the others one less.

    Args:
        tiles: ``(outputs,)`` integers, 0 or more.
        programs: 1 or more; a plain number, so that a grid can be fixed before the lengths are known.

    >>> plan = stream_k(torch.tensor([3]), programs=2)
    >>> plan.begin.tolist(), plan.first.tolist(), plan.last.tolist()
    ([0, 2, 3], [0], [1])
    """
    zero = torch.zeros(1, dtype=torch.int64, device=tiles.device)
    tile_ptr = torch.cat([zero, tiles.to(torch.int64).cumsum(0)])
    total = tile_ptr[-1]
    most = (total + (programs - 1)) // programs
    longer = total - (most - 1) * programs  # with no tiles at all: every program takes "most", which is 0
    number = torch.arange(programs + 1, device=tiles.device)
    begin = number * most - (number - longer).clamp_(min=0)
    output = torch.searchsorted(tile_ptr, begin[:-1].contiguous(), right=True) - 1
    output = torch.where(begin[1:] > begin[:-1], output, tiles.shape[0])
    first, last = (_program_of(tile, most, longer) for tile in (tile_ptr[:-1], tile_ptr[1:] - 1))
    empty = tile_ptr[1:] == tile_ptr[:-1]
    return StreamK(begin, output, tile_ptr, first.masked_fill(empty, -1), last.masked_fill(empty, -1))


def _program_of(tile: Tensor, most: Tensor, longer: Tensor) -> Tensor:
    """Which program takes a tile; any number for one that does not exist."""
    in_long = longer * most
    early = tile // most.clamp(min=1)
    late = longer + (tile - in_long) // (most - 1).clamp(min=1)
    return torch.where(tile < in_long, early, late)


@dataclass(frozen=True)
class Piece:
    """Tiles ``from_tile .. to_tile - 1`` of an output, counted from its own first one; ``slot`` is None for a whole output."""

    output: int
    from_tile: int
    to_tile: int
    slot: int | None


def list_pieces(tiles: np.ndarray, programs: int) -> list[list[Piece]]:
    """The pieces of every program in the order in which it walks them: `stream_k` spelled out tile by tile, for tests and drawings.

    >>> [[(p.from_tile, p.to_tile, p.slot) for p in pieces] for pieces in list_pieces(np.array([3]), programs=2)]
    [[(0, 2, 2)], [(2, 3, 1)]]
    """
    line = [(output, tile) for output, count in enumerate(tiles.tolist()) for tile in range(count)]
    most = -(-len(line) // programs)
    longer = len(line) - (most - 1) * programs
    found, at = [], 0
    for program in range(programs):
        end = at + (most if program < longer else most - 1)
        pieces: list[Piece] = []
        for output in dict.fromkeys(output for output, _ in line[at:end]):
            mine = [tile for owner, tile in line[at:end] if owner == output]
            low, high = mine[0], mine[-1] + 1
            slot = None if (low, high) == (0, int(tiles[output])) else program if low else programs + program
            pieces.append(Piece(output, low, high, slot))
        found.append(pieces)
        at = end
    return found


def stream_k_programs(tiles_per_output: int, total_tiles: int, processors: int) -> int:
    """How many programs to start where all outputs are about as long: ONNX Runtime's rule for LeanAttention.

    Two for each processor. With few tiles fewer programs: each gets two tiles or more, and no output more than about 32 pieces.

    >>> stream_k_programs(tiles_per_output=3, total_tiles=3, processors=1)
    2
    """
    if not total_tiles:
        return 1
    if total_tiles > 4 * processors:
        return 2 * processors
    return min(-(-total_tiles // 2), -(-32 * total_tiles // max(tiles_per_output, 1)))


def most_pieces(tiles_per_output: int, total_tiles: int, programs: int) -> int:
    """A bound on the pieces of an output of so many tiles, by the lengths of the ranges alone: ONNX Runtime's number of splits.

    >>> most_pieces(tiles_per_output=3, total_tiles=3, programs=2)
    3
    """
    most = -(-total_tiles // programs)
    shortest = most if total_tiles % programs == 0 else most - 1
    return 1 + (tiles_per_output + shortest - 2) // shortest if shortest else tiles_per_output
