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
from s2attn.testing.compiling import compile_specialised
made = compile_specialised(90, sys.argv[1], *map(int, sys.argv[2:]))
facts = {"spills": made.spill_bytes, "shared": made.shared_bytes, "warps": made.warps, "handed_over": made.handed_over}
tma = made.ptx.count("cp.async.bulk.tensor")
print(json.dumps({**facts, "registers": made.registers, "wgmma": made.wgmma, "tma": tma, "cp_async": made.ptx.count("cp.async.c")}))
"""


@pytest.mark.parametrize(
    ("dtype", "dim", "block", "shared_heads"),
    [
        ("bf16", 128, 64, 2),
        ("bf16", 64, 64, 2),
        ("bf16", 128, 64, 1),
        ("bf16", 64, 64, 1),
        ("bf16", 128, 128, 2),
        ("bf16", 64, 128, 1),
        ("fp16", 128, 256, 2),
    ],
)
def test_warps_are_specialised(dtype, dim, block, shared_heads):
    from s2attn.backends.triton.tiles import SHARED_MEMORY

    # In a process of its own: this one has loaded Triton as an interpreter.
    command = [sys.executable, "-c", CODE, dtype, str(dim), str(block), str(shared_heads)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    # One loading and two computing warp groups; the products of both loops stand in the code of each computing one.
    assert facts["warps"] == 12 and facts["handed_over"] > 0
    assert facts["spills"] == 0
    assert facts["shared"] <= SHARED_MEMORY["sm_90"]
    assert facts["wgmma"] == 2 * 2 * (dim // 16 + 64 // 16)
    assert facts["tma"] > 0 and facts["cp_async"] == 0
