"""dq and dkv for Hopper: no spills, products in flight while P is computed, registers handed over, within Hopper's shared memory."""

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
facts = {"spills": made.spill_bytes, "shared": made.shared_bytes, "warps": made.warps, "registers": made.registers, "wgmma": made.wgmma}
waits, asked = re.findall(r"wgmma.wait_group.sync.aligned (\\d+)", made.text), re.findall(r"setmaxnreg\\S+\\s+(\\d+)", made.text)
facts |= {"waits": [int(n) for n in waits], "asked": [int(n) for n in asked], "remarks": made.remarks}
facts["beside"] = exponentials_beside_products(made.text)
print(json.dumps({**facts, "tma": made.text.count("cp.async.bulk.tensor"), "tensormaps": made.text.count("tensormap.cp_fenceproxy")}))
"""

# In the order of the text: the consumer that the compiler's first warps are, and the other one.
WAITS = {
    # S alone; then in the loop dP (S of the next step stays), then all; the last full step; a step with a mask.
    "dq": [0, 1, 0, 0, 0, 1, 0, 0],
    # S^T alone; in the loop dP^T (S^T of the next step and dv stay), then all; the last full step; a step with a mask.
    "dkv": [0, 2, 0, 1, 0, 1, 1, 0],
}


# op, type, width, block, query heads that share keys and lists, width of v, options
BUILDS = [
    ("dq", "bf16", 128, 64, 2, 128, {}),
    ("dq", "bf16", 128, 64, 1, 128, {"capped": True, "packed": True}),
    ("dq", "fp16", 64, 128, 1, 64, {}),
    ("dkv", "bf16", 128, 64, 1, 128, {}),
    ("dkv", "bf16", 128, 128, 1, 128, {}),
    ("dkv", "bf16", 128, 128, 1, 128, {"capped": True, "packed": True}),
    ("dkv", "fp16", 64, 64, 4, 64, {}),
    ("dkv", "fp16", 64, 64, 1, 128, {"packed": True}),
]


@pytest.mark.parametrize(("op", "dtype", "dim", "block", "shared_heads", "dim_v", "options"), BUILDS)
def test_products_stay_in_flight(op, dtype, dim, block, shared_heads, dim_v, options):
    from s2attn.backends.triton.tiles import SHARED_MEMORY

    # In a process of its own: this one has loaded Triton as an interpreter.
    command = [sys.executable, "-c", CODE, json.dumps([op, dtype, dim, block, shared_heads, dim_v]), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    # Two consumers and a producer, padded to four warps; while they run a consumer has 240 registers, the producer 24.
    assert facts["warps"] == 12 and facts["registers"] == 168 and {24, 240} <= set(facts["asked"])
    # Four heads of width 64: selecting dS where a pair is masked costs registers.
    assert facts["spills"] <= (48 if (op, dim, shared_heads) == ("dkv", 64, 4) else 0)
    # Nothing of products that are taken one after another, nor of waits that the assembler puts in.
    assert facts["remarks"] == []
    assert facts["waits"] == WAITS[op] * 2
    assert facts["shared"] <= SHARED_MEMORY["sm_90"]
    assert facts["tma"] > 0 and facts["tensormaps"] == {"dq": 4, "dkv": 5}[op]
    # Two consumers, each with every product three times: before the loop over full tiles or after it, in it, and for a tile with a mask.
    wide = op == "dkv" and max(dim, dim_v) > 64
    listed = 32 if wide or (op == "dkv" and options.get("capped", False)) else 64
    # P is one exponential for each pair; over full tiles, in the loop and after it, most stand beside products.
    assert facts["beside"] >= 0.75 * 2 * 2 * listed // 2
    whole = dim + dim_v + {"dq": listed, "dkv": 2 * listed}[op]
    assert facts["wgmma"] == 2 * 3 * whole // 16
