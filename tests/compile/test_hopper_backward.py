"""dq and dkv for Hopper: no spills, products in flight while P is computed, registers handed over, within Hopper's shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

CODE = """
import json, sys
from s2attn.testing.compiling_gluon import compile_hopper
op, dtype, dim, block, heads, flags = sys.argv[1:]
made = compile_hopper(op, dtype, int(dim), int(block), int(heads), capped="capped" in flags, packed="packed" in flags)
facts = {"spills": made.spill_bytes, "shared": made.shared_bytes, "warps": made.warps, "registers": made.registers}
facts |= {"wgmma": made.wgmma, "waits": made.waits, "asked": sorted(made.registers_asked), "remarks": made.remarks}
print(json.dumps({**facts, "tma": made.text.count("cp.async.bulk.tensor"), "cp_async": made.text.count("cp.async.c")}))
"""

# In the order of the text: the consumer that the compiler's first warps are, and the other one.
WAITS = {
    # S alone; then in the loop dP (S of the next step stays), then all; the last full step; a step with a mask.
    "dq": [0, 1, 0, 0, 0, 1, 0, 0],
    # S^T alone; in the loop dP^T (S^T of the next step and dv stay), then all; the last full step; a step with a mask.
    "dkv": [0, 2, 0, 1, 0, 1, 1, 0],
}


@pytest.mark.parametrize(
    ("op", "dtype", "dim", "block", "shared_heads", "flags"),
    [
        ("dq", "bf16", 128, 64, 2, ""),
        ("dq", "bf16", 128, 64, 1, "capped packed"),
        ("dq", "fp16", 64, 128, 1, ""),
        ("dkv", "bf16", 128, 64, 1, ""),
        ("dkv", "bf16", 128, 128, 1, ""),
        ("dkv", "bf16", 128, 128, 1, "capped packed"),
        ("dkv", "fp16", 64, 64, 4, ""),
    ],
)
def test_products_stay_in_flight(op, dtype, dim, block, shared_heads, flags):
    from s2attn.backends.triton.tiles import SHARED_MEMORY

    # In a process of its own: this one has loaded Triton as an interpreter.
    command = [sys.executable, "-c", CODE, op, dtype, *map(str, (dim, block, shared_heads)), flags]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["warps"] == 12 and facts["registers"] == 168
    assert {24, 240} <= set(facts["asked"])
    assert facts["spills"] == 0
    # Nothing of "products are serialized", nor of waits that the assembler puts in.
    assert facts["remarks"] == []
    assert facts["waits"] == WAITS[op] * 2
    assert facts["shared"] <= SHARED_MEMORY["sm_90"]
    assert facts["tma"] > 0 and facts["cp_async"] == 0
    # Two consumers, each with the steps: first S, loop, last full step, masked step.
    listed = 32 if op == "dkv" and dim == 128 else 64
    whole = {"dq": 2 * dim + listed, "dkv": 2 * dim + 2 * listed}[op] // 16
    assert facts["wgmma"] == 2 * 3 * whole
