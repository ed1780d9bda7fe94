"""Kernels compiled for GPUs that are not there: no spills, shared memory within the limit, Hopper's own products on Hopper."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

CODE = """
import json, sys
from s2attn.backends.triton.tiles import SHARED_MEMORY
from s2attn.testing.compiling import compile_kernel
op, arch, dtype, dim, block = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
limit = SHARED_MEMORY[f"sm_{arch}"]
made = compile_kernel(op, arch, dtype, dim, block, limit)
print(json.dumps({"spills": made.spill_bytes, "shared": made.shared_bytes, "wgmma": made.wgmma, "limit": limit}))
"""


def compiled(op: str, arch: int, dtype: str, dim: int, block: int) -> dict[str, int]:
    """Compile in a process of its own: this one has loaded Triton as an interpreter."""
    command = [sys.executable, "-c", CODE, op, str(arch), dtype, str(dim), str(block)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("op", ["forward", "dq", "dkv"])
def test_no_spills(op, dim, arch):
    facts = compiled(op, arch, "bf16", dim, 64)
    assert facts["spills"] == 0
    assert facts["shared"] <= facts["limit"]
    if arch == 90:
        assert facts["wgmma"] > 0


@pytest.mark.parametrize(
    ("op", "arch", "dtype", "dim", "block"),
    [
        ("forward", 75, "fp16", 64, 64),
        ("dkv", 86, "bf16", 128, 16),
        ("dq", 89, "fp16", 96, 32),
        ("forward", 120, "bf16", 128, 128),
        ("forward", 90, "fp32", 64, 64),
        ("forward", 90, "bf16", 192, 256),
        ("delta", 90, "bf16", 128, 64),
    ],
)
def test_compiles_for(op, arch, dtype, dim, block):
    facts = compiled(op, arch, dtype, dim, block)
    assert facts["shared"] <= facts["limit"]
