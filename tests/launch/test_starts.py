"""What a launch passes to a GPU: proven without one, by a driver that writes launches down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

KERNELS = ("forward_kernel", "delta_kernel", "dq_kernel", "dkv_kernel", "merge_kernel", "sum_kernel")


def recorded(name: str):
    """In a process of its own: this one has loaded Triton as an interpreter."""
    command = [sys.executable, str(Path(__file__).with_name("recorded.py")), name]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_one_compilation_serves_all_lengths_and_batches():
    counts = recorded("lengths")
    assert counts[0] == dict.fromkeys(KERNELS, 1), "the first call cuts both rows and columns, so it needs every kernel"
    assert counts[1:] == counts[:-1]


def test_repeated_starts_pass_what_triton_passes():
    calls = recorded("arguments")
    for ways in calls:
        expected = ways[0][3]
        for way, stream, launched, passed in ways:
            assert passed == expected, way
            assert {number for _, number in launched} == {stream}, "every kernel starts on the current stream"
    assert {kernel for ways in calls for kernel, _ in ways[0][2]} == set(KERNELS)


def test_hopper_kernels_start_like_the_others():
    found = recorded("hopper")
    # Two heads are stacked: 4 heads have half as many items as blocks and heads, and no more programs start than the GPU holds at once.
    # Columns are those of the KV heads.
    programs = [[64, 1, 1], [24, 1, 1], [6, 1, 1], [132, 1, 1]]
    kernels = [f"hopper_{op}_kernel" for op in ("forward", "dq", "dkv")]
    assert found["grids"] == [dict.fromkeys(kernels, grid) for grid in programs]
    assert found["forms"] == [1, 1, 1] and found["same"]
    assert set(found["kernels"]) == {*kernels, "delta_kernel"}


def test_decoding_is_tuned_with_what_was_compiled_ahead():
    found = recorded("ahead")
    pages = 2
    assert found["cut"] == "stream" and found["forms"] == [[pages, 1, 1]] * 3
    assert found["launched"] == ["count_kernel", "decode_kernel", "reduce_kernel"] * pages


def test_unaligned_tensors_are_never_taken_for_aligned_ones():
    found = recorded("unaligned")
    assert all(one["address"] for one in found)
    assert [one["kept"] for one in found] == [0, 1, 1, 1]
    compiled = {offset: {one["compiled"] for one in found if one["offset"] == offset} for offset in (0, 1)}
    assert len(compiled[0]) == len(compiled[1]) == 1 and compiled[0] != compiled[1]


def test_one_compilation_serves_all_batches_and_caches():
    found = recorded("paged")
    expected = {"direct": ["decode_kernel"], "split": ["decode_kernel"], "stream": ["count_kernel", "decode_kernel", "reduce_kernel"]}
    for form, calls in found.items():
        for call in calls:
            assert [name for name, _ in call if name != "reduce_kernel" or form == "stream"] == [*expected[form], "store_kernel"]
        compiled = {tuple(kernel) for call in calls for kernel in call}
        assert len(compiled) == len({name for name, _ in compiled})


def test_strides_are_not_confused():
    assert recorded("strides") == [True] * 5


def test_a_profiler_is_told_of_every_launch():
    assert recorded("hooks") == [["forward_kernel"] * 2, 3]


def test_repeated_starts_cost_less_than_triton_s_own():
    took = recorded("host_time")
    assert took["own"] > 1.3 * took["repeated"], took
