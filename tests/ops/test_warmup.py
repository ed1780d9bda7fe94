"""`warmup`: what it compiles is what calls need, whatever their length; arguments are checked like those of a call."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from s2attn import Sink, Unsupported, Window, warmup
from s2attn.ops import source

SHAPE = {"seqlen": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "device": "cpu"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seqlen": 0}, "seqlen must be an integer >= 1; got 0"),
        ({"num_kv_heads": 3}, r"num_kv_heads must divide num_heads \(4\); got 3"),
        ({"softcap": -1.0}, "softcap must be positive and finite"),
        ({"block": 48}, "block must be"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_arguments_are_checked(change, words):
    with pytest.raises(ValueError, match=words):
        warmup(Window(8), **SHAPE | change)


def test_kinds_are_checked():
    with pytest.raises(TypeError, match="pattern must be a Pattern"):
        warmup("window", **SHAPE)
    with pytest.raises(TypeError, match=r"dtype must be a floating point torch\.dtype"):
        warmup(Window(8), **SHAPE, dtype=torch.int32)


def test_what_no_kernel_serves_is_refused():
    with pytest.raises(Unsupported, match="head widths up to 256"):
        warmup(Window(8), **SHAPE | {"head_dim": 300}, dtype=torch.float32, backend="triton")


def test_the_first_call_finds_its_layout():
    source.forget_layouts()
    warmup(Window(24), **SHAPE, dtype=torch.float32, backend="torch")
    (key,) = source._layouts
    q, k = torch.zeros(1, 64, 4, 16), torch.zeros(1, 64, 2, 16)
    assert source.find_layout(key[0], [], q, k) is source._layouts[key]


@pytest.mark.parametrize("sinks", [False, True])
def test_interpreted_kernels_need_nothing(sinks):
    pytest.importorskip("triton", reason="triton is not installed")
    warmup(Sink(4) | Window(24), **SHAPE, dtype=torch.float16, softcap=2.0, sinks=sinks, backend="triton")


CODE = """
import json, torch, s2attn
from s2attn import Sink, Window, warmup
from s2attn.backends.registry import get_backend
from s2attn.kernels import backward, forward, join
from s2attn.testing.recording import recording
kernels = (forward.forward_kernel, join.merge_kernel, backward.delta_kernel, backward.dq_kernel, backward.dkv_kernel, join.sum_kernel)
count = lambda: [len(kernel.device_caches[0][0]) for kernel in kernels]
with recording() as gpu:
    get_backend("triton").objections = lambda q, k, v: []
    warmup(Sink(16) | Window(64), seqlen=512, num_heads=2, head_dim=16, device="cpu", backend="triton")
    before, started = count(), len(gpu.launches)
    for length in (512, 100, 9000):
        q, k, v = (torch.zeros(1, length, 2, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        out, lse = s2attn.attention(q, k, v, Sink(16) | Window(64), return_lse=True, backend="triton")
        torch.autograd.backward([out, lse], [torch.zeros_like(out), torch.zeros_like(lse)])
        s2attn.attention(q, k, v, Sink(16) | Window(64), backend="triton").float().sum().backward()
print(json.dumps([started, before, count(), sorted({launch.kernel for launch in gpu.launches})]))
"""


def test_later_calls_of_any_length_compile_nothing():
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    started, before, after, launched = json.loads(done.stdout.splitlines()[-1])
    assert started == 0, "a warm-up starts nothing"
    assert before == after and min(before) >= 1
    assert launched == ["delta_kernel", "dkv_kernel", "dq_kernel", "forward_kernel", "sum_kernel"]
