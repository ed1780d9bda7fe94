"""Stream-K ranges as the decode kernels compute them on the device: those of `s2attn.schedule.stream_k`, and every list cut exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2attn.schedule import stream_k

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language", reason="triton is not installed")

from s2attn.kernels.pieces.ranges import cut, find_output, program_of, range_begin  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.usefixtures("triton_backend"),
]


@triton.jit
def ranges_kernel(ends_ptr, begin_ptr, output_ptr, outputs):
    program, programs = tl.program_id(0), tl.num_programs(0) - 1
    total = tl.load(ends_ptr + outputs - 1)
    at = range_begin(program, total, programs)
    tl.store(begin_ptr + program, at)
    tl.store(output_ptr + program, find_output(ends_ptr, outputs, at))


@triton.jit
def owners_kernel(ends_ptr, first_ptr, last_ptr, outputs, programs):
    output = tl.program_id(0)
    total = tl.load(ends_ptr + outputs - 1)
    begin, end = tl.load(ends_ptr + output - 1, mask=output > 0, other=0), tl.load(ends_ptr + output)
    tl.store(first_ptr + output, program_of(begin, total, programs))
    tl.store(last_ptr + output, program_of(end - 1, total, programs))


@triton.jit
def cut_kernel(pieces_ptr, size_ptr, splits, least):
    pieces, size = cut(tl.program_id(0), splits, least)
    tl.store(pieces_ptr + tl.program_id(0), pieces)
    tl.store(size_ptr + tl.program_id(0), size)


@settings(max_examples=40)
@given(st.lists(st.one_of(st.just(0), st.integers(0, 40)), min_size=1, max_size=9), st.integers(1, 12))
def test_ranges_are_those_of_the_schedule(tiles, programs):
    plan = stream_k(torch.tensor(tiles), programs)
    ends = torch.tensor(tiles).cumsum(0)
    begin, output = torch.empty(2, programs + 1, dtype=torch.int64)
    ranges_kernel[(programs + 1,)](ends, begin, output, len(tiles))
    assert begin.tolist() == plan.begin.tolist()
    busy = plan.begin[1:] > plan.begin[:-1]
    assert torch.equal(output[:-1][busy], plan.output[busy])
    first, last = torch.empty(2, len(tiles), dtype=torch.int64)
    owners_kernel[(len(tiles),)](ends, first, last, len(tiles), programs)
    some = torch.tensor(tiles) > 0
    assert torch.equal(first[some], plan.first[some]) and torch.equal(last[some], plan.last[some])


@pytest.mark.parametrize(("splits", "least"), [(1, 1), (3, 2), (16, 4), (64, 1)])
def test_a_list_is_cut_into_a_few_pieces_that_are_long_enough(splits, least):
    longest = 70
    pieces, size = torch.empty(2, longest + 1, dtype=torch.int32)
    cut_kernel[(longest + 1,)](pieces, size, splits, least)
    for total, (count, each) in enumerate(zip(pieces.tolist(), size.tolist(), strict=True)):
        parts = [min(each, total - low) for low in range(0, count * each, each)]
        assert sum(parts) == total and 1 <= count <= splits
        assert count == 1 or (min(parts[:-1]) >= least and parts[-1] > 0)
