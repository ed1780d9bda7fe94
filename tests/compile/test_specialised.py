"""The cut into specialised warp groups, which Triton can drop without a word: made, without spills, within Hopper's shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

CODE = """
import json, sys
from tests.support.compiling import compile_specialised
made = compile_specialised(sys.argv[1], "sm_90", sys.argv[2], *map(int, sys.argv[3:]))
facts = {"spills": made.spill_bytes, "shared": made.shared_bytes, "warps": made.warps, "handed_over": made.handed_over}
tma = made.text.count("cp.async.bulk.tensor")
print(json.dumps({**facts, "registers": made.registers, "wgmma": made.wgmma, "tma": tma, "cp_async": made.text.count("cp.async.c")}))
"""


@pytest.mark.parametrize(
    ("op", "dtype", "dim", "block", "shared_heads"),
    [
        ("forward", "bf16", 128, 64, 2),
        ("forward", "bf16", 64, 64, 2),
        ("forward", "bf16", 128, 64, 1),
        ("forward", "fp16", 128, 256, 2),
        ("dq", "bf16", 64, 64, 2),
        ("dq", "bf16", 128, 64, 2),
        ("dkv", "bf16", 64, 64, 2),
        ("dkv", "bf16", 128, 64, 1),
    ],
)
def test_warps_are_specialised(op, dtype, dim, block, shared_heads):
    from s2attn.backends.triton.tiles import SHARED_MEMORY

    # In a process of its own: this one has loaded Triton as an interpreter.
    command = [sys.executable, "-c", CODE, op, dtype, str(dim), str(block), str(shared_heads)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    # One loading and two computing warp groups; the products of both loops stand in the code of each of these.
    assert facts["warps"] == 12 and facts["handed_over"] > 0
    assert facts["spills"] == 0
    assert facts["shared"] <= SHARED_MEMORY["sm_90"]
    listed = 32 if op == "dkv" and dim == 128 else 64
    steps = {"forward": dim + listed, "dq": 2 * dim + listed, "dkv": 2 * dim + 2 * listed}[op] // 16
    assert facts["wgmma"] == 2 * 2 * steps
    assert facts["tma"] > 0 and facts["cp_async"] == 0
