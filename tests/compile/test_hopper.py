"""The Gluon kernels compiled for Hopper: their partitions, no spills, products that overlap the softmax, within its shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

CODE = """
import json, re, sys
from tests.support.compiling import compile_hopper, exponentials_beside_products
made = compile_hopper(*json.loads(sys.argv[1]), **json.loads(sys.argv[2]))
facts = {"registers": made.registers, "spills": made.spill_bytes, "shared": made.shared_bytes, "warps": made.warps, "wgmma": made.wgmma}
waits = re.findall(r"wgmma.wait_group.sync.aligned (\\d+)", made.text)
tma, tensormaps = (made.text.count(name) for name in ("cp.async.bulk.tensor", "tensormap.cp_fenceproxy"))
facts |= {"handed_over": made.handed_over, "beside": exponentials_beside_products(made.text)}
print(json.dumps({**facts, "waits": waits, "tma": tma, "tensormaps": tensormaps}))
"""


def compiled(*given, **options) -> dict:
    # In a process of its own: this one has loaded Triton as an interpreter.
    command = [sys.executable, "-c", CODE, json.dumps(given), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


# type, width, block, query heads that share keys and lists, width of v, options
FORWARD = [
    ("bf16", 128, 64, 2, 128, {}),
    ("bf16", 64, 64, 2, 64, {}),
    ("bf16", 128, 64, 1, 128, {"packed": True}),
    ("bf16", 128, 128, 1, 128, {}),
    ("bf16", 64, 128, 1, 64, {"packed": True}),
    ("fp16", 64, 256, 2, 128, {}),
    ("bf16", 128, 128, 1, 128, {"capped": True, "sinks": True, "packed": True}),
]


@pytest.mark.parametrize(("dtype", "dim", "block", "shared_heads", "dim_v", "options"), FORWARD)
def test_forward(dtype, dim, block, shared_heads, dim_v, options):
    from s2attn.backends.triton.hopper import choose_hopper_form
    from s2attn.backends.triton.tiles import SHARED_MEMORY

    facts = compiled("forward", dtype, dim, block, shared_heads, dim_v, **options)
    # Two consumers and a producer, padded to four warps; 12 warps can have 168 registers each, and hand them over while they run.
    assert facts["warps"] == 12 and facts["registers"] == 168 and facts["handed_over"] > 0
    assert facts["spills"] == 0
    assert facts["shared"] <= SHARED_MEMORY["sm_90"]
    # Products stand in the code three times for each consumer: before and in the loop over full tiles (after it for values), and in the
    # other loop. In the first loop a consumer waits with one product under way: its softmax overlaps the next products of keys.
    join = choose_hopper_form(dim, dim_v, block, shared_heads).join
    assert facts["wgmma"] == 2 * (3 * dim + (2 * join + 1) * 64) // 16
    assert facts["waits"].count("1") == 2
    # The compiler may still put products after the softmax; of its 32 exponentials for a thread and tile most must stand beside them.
    assert facts["beside"] > 2 * 0.7 * 32 * join
    assert facts["tma"] > 0 and facts["tensormaps"] == 3
