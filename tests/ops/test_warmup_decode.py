"""`warmup_decode`: what it compiles and lists is what decoding needs, whatever the batch; arguments are checked like those of a call."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from s2attn import Local, Stride, Unsupported, Window, build_layout, decode, warmup_decode
from s2attn.backends import Requests
from s2attn.backends.triton.decode import plan_queries
from s2attn.ops import source
from s2attn.ops.warmup_decode import packed_means

SHAPE = {"max_tokens": 100, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "device": "cpu", "dtype": torch.float16}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer >= 1; got 0"),
        ({"q_len": 0}, "q_len must be an integer >= 1; got 0"),
        ({"num_kv_heads": 3}, r"num_kv_heads must divide num_heads \(4\); got 3"),
        ({"page_size": 24}, "page_size must be a multiple of 16; got 24"),
        ({"page_scales": True}, "page_scales must be left out unless page_dtype is float8_e4m3fn; got True"),
        ({"softcap": -1.0}, "softcap must be positive and finite"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_arguments_are_checked(change, words):
    with pytest.raises(ValueError, match=words):
        warmup_decode(Window(8), **SHAPE | change)


def test_kinds_are_checked():
    with pytest.raises(TypeError, match="pattern must be a Pattern"):
        warmup_decode("window", **SHAPE)
    with pytest.raises(TypeError, match=r"page_dtype must be dtype, torch\.float16, or float8_e4m3fn; got torch\.float32"):
        warmup_decode(Window(8), **SHAPE, page_dtype=torch.float32)
    with pytest.raises(TypeError, match=r"index_dtype must be torch\.int32 or torch\.int64; got torch\.int16"):
        warmup_decode(Window(8), **SHAPE, index_dtype=torch.int16)


def test_what_no_kernel_serves_is_refused():
    with pytest.raises(Unsupported, match="head widths up to 256"):
        warmup_decode(Window(8), **SHAPE | {"head_dim": 300}, backend="triton")


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
def test_the_first_step_makes_no_lists():
    pytest.importorskip("triton", reason="triton is not installed")
    source.forget_layouts()
    pattern = Local(2, block=16) | Stride(3, block=16)
    warmup_decode(pattern, **SHAPE, page_size=32, sinks=True, page_dtype=torch.float8_e4m3fn, page_scales=True, backend="triton")
    before = list(source._layouts)
    assert len(before) == 1
    k, v = torch.zeros(2, 9, 32, 2, 16, dtype=torch.float16)
    where = {"block_table": torch.zeros(3, 4, dtype=torch.int32), "seq_lens": torch.tensor([128, 1, 0]), "validate": False}
    decode(torch.zeros(3, 1, 4, 16, dtype=torch.float16), k, v, pattern, **where, backend="triton")
    assert list(source._layouts) == before


CODE = """
import json, torch, s2attn
from s2attn import Dense, warmup_decode
from s2attn.backends.registry import get_backend
from s2attn.kernels.decode import count_kernel, decode_kernel, reduce_kernel
from s2attn.kernels.store import store_kernel
from tests.support.recording import recording
kernels = (decode_kernel, count_kernel, reduce_kernel, store_kernel)
count = lambda: [len(kernel.device_caches[0][0]) for kernel in kernels]
with recording() as gpu:
    get_backend("triton").paged_objections = lambda q, pages: []
    get_backend("triton").store_objections = lambda new: []
    shape = {"max_tokens": 4096, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": 16, "device": "cpu", "backend": "triton"}
    warmup_decode(Dense(), **shape)
    before = count()
    gpu.launches.clear()
    for batch in (1, 3, 30, 500):
        k, v = torch.zeros(2, 2 * batch, 16, 2, 16, dtype=torch.bfloat16)
        where = {"block_table": torch.zeros(batch, 256, dtype=torch.int32), "seq_lens": torch.full((batch,), 99, dtype=torch.int32)}
        q = torch.zeros(batch, 1, 4, 16, dtype=torch.bfloat16)
        s2attn.store_kv(q[:, 0, :2], q[:, 0, 2:], k, v, torch.arange(batch), validate=False, backend="triton")
        s2attn.decode(q, k, v, Dense(), **where, validate=False, backend="triton")
print(json.dumps([before, count(), sorted({launch.kernel for launch in gpu.launches})]))
"""


def test_later_steps_of_any_batch_compile_nothing():
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after, launched = json.loads(done.stdout.splitlines()[-1])
    assert before == after and min(before) >= 1
    assert launched == ["count_kernel", "decode_kernel", "reduce_kernel", "store_kernel"]


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_packed_calls_of_any_lengths_find_their_height(block, group):
    layout = build_layout(Window(8), 8, 8, 256, block=block)

    def height(total, batch):
        requests = Requests(torch.zeros(batch, dtype=torch.int32), torch.zeros(batch + 1, dtype=torch.int32))
        return plan_queries(total, requests, layout, group, 32).queries

    prepared = {height(length, 1) for length in packed_means(block)}
    assert {height(total, batch) for batch in (1, 3, 16) for total in range(1, 600)} <= prepared
