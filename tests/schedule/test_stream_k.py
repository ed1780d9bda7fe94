"""Stream-K ranges: exact cover, even loads, one continuing piece per program, and the published unit vector."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2attn.schedule import list_pieces, most_pieces, stream_k, stream_k_programs

counts = st.lists(st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 90)), max_size=12).map(lambda x: np.array(x, dtype=np.int64))


@settings(max_examples=1000)
@given(counts, st.integers(1, 40))
def test_pieces_cover_every_tile_once_and_evenly(tiles: np.ndarray, programs: int) -> None:
    pieces = list_pieces(tiles, programs)
    loads = [sum(p.to_tile - p.from_tile for p in mine) for mine in pieces]
    assert max(loads) - min(loads) <= 1
    assert loads == sorted(loads, reverse=True)
    seen = [np.zeros(count, int) for count in tiles]
    slots = []
    for mine in pieces:
        continuing = [i for i, piece in enumerate(mine) if piece.from_tile > 0]
        beginning = [i for i, piece in enumerate(mine) if piece.from_tile == 0 and piece.to_tile < tiles[piece.output]]
        assert continuing in ([], [0])
        assert beginning in ([], [len(mine) - 1])
        for piece in mine:
            seen[piece.output][piece.from_tile : piece.to_tile] += 1
            whole = (piece.from_tile, piece.to_tile) == (0, tiles[piece.output])
            assert (piece.slot is None) == whole
            slots += [] if piece.slot is None else [piece.slot]
    assert all((one == 1).all() for one in seen)
    assert len(slots) == len(set(slots))
    assert all(0 <= slot < 2 * programs for slot in slots)


@settings(max_examples=1000)
@given(counts, st.integers(1, 40))
def test_the_arithmetic_agrees_with_the_spelled_out_pieces(tiles: np.ndarray, programs: int) -> None:
    plan, pieces = stream_k(torch.from_numpy(tiles), programs), list_pieces(tiles, programs)
    assert plan.programs == programs
    loads = [sum(p.to_tile - p.from_tile for p in mine) for mine in pieces]
    assert (plan.begin[1:] - plan.begin[:-1]).tolist() == loads
    assert plan.output.tolist() == [mine[0].output if mine else len(tiles) for mine in pieces]
    assert plan.tile_ptr.tolist() == [0, *np.cumsum(tiles).tolist()]
    for output, count in enumerate(tiles):
        owners = [program for program, mine in enumerate(pieces) for piece in mine if piece.output == output]
        first, last = int(plan.first[output]), int(plan.last[output])
        assert owners == (list(range(first, last + 1)) if count else [])
        if first != last:  # the slots that the second kernel joins, in its order
            slots = [piece.slot for mine in pieces for piece in mine if piece.output == output]
            assert slots == [programs + first, *range(first + 1, last + 1)]


@settings(max_examples=500)
@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 50))
def test_uniform_outputs_never_have_more_pieces_than_bound(length: int, outputs: int, processors: int) -> None:
    total = length * outputs
    programs = stream_k_programs(length, total, processors)
    plan = stream_k(torch.full((outputs,), length), programs)
    assert 1 <= programs <= max(2 * processors, 1)
    assert int((plan.last - plan.first).max()) + 1 <= most_pieces(length, total, programs)


def test_the_unit_vector_of_onnx_runtime() -> None:
    """L = 384 at key tiles of 128, one head, one SM: T = 3, G = 2, mt = 2, high = 1, 3 splits."""
    tiles = 384 // 128
    programs = stream_k_programs(tiles, tiles, processors=1)
    plan = stream_k(torch.tensor([tiles]), programs)
    assert programs == 2
    assert (plan.begin[1:] - plan.begin[:-1]).tolist() == [2, 1]
    assert most_pieces(tiles, tiles, programs) == 3


@pytest.mark.parametrize("outputs", [0, 3])
def test_no_work_at_all(outputs: int) -> None:
    plan = stream_k(torch.zeros(outputs, dtype=torch.int32), 4)
    assert plan.begin.tolist() == [0] * 5
    assert plan.first.tolist() == plan.last.tolist() == [-1] * outputs


def test_shapes_depend_on_programs_and_outputs_alone() -> None:
    """What a captured graph needs: on the meta device there are no numbers to look at."""
    plan = stream_k(torch.zeros(7, dtype=torch.int32, device="meta"), 5)
    shapes = [tuple(x.shape) for x in (plan.begin, plan.output, plan.tile_ptr, plan.first, plan.last)]
    assert shapes == [(6,), (5,), (8,), (7,), (7,)]
