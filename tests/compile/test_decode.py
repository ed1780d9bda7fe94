"""The kernels of decoding, compiled for GPUs that are not there: no spills on three generations, shared memory within the limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from s2attn.backends.triton.tiles import SHARED_MEMORY

pytest.importorskip("triton", reason="triton is not installed")

STRICT = ("sm_80", "sm_90", "sm_100")
CODE = """
import json, sys
from s2attn.backends.triton.tiles import SHARED_MEMORY
from tests.support.compiling import DecodeCase, compile_decode
target = sys.argv[1]
for line in sys.stdin:
    op, case = json.loads(line)
    made = compile_decode(op, target, DecodeCase(**case), SHARED_MEMORY[target])
    facts = {"op": op, "spills": made.spill_bytes, "shared": made.shared_bytes, "products": made.matrix_products}
    print(json.dumps({**facts, "registers": made.registers, "copies": made.text.count("cp.async.c")}), flush=True)
"""


def kinds(target: str) -> list[tuple[str, dict]]:
    """What is compiled: on the strict targets one token and several, whole lists and equal ranges, pages of both kinds."""
    half = "fp16" if target == "sm_75" else "bf16"
    one = {"dtype": half, "dim": 64 if target == "sm_75" else 128}  # there products are single multiplications, and compile slowly
    if target not in STRICT:
        return [("decode", one), ("store", {**one, "pages": "u8"})]
    small = [("reduce", {**one, "stream": True, "rows": 32}), ("store", {**one, "pages": "u8"})]
    mixed = {**one, "stream": True, "rows": 32, "mode": 1, "page_size": 64, "capped": True, "sinks": True}
    float8 = {**one, "dim": 64, "block": 16, "pages": "u8" if target == "sm_80" else "fp8"}
    return [
        ("decode", one),
        ("decode", {**one, "stream": True}),
        ("decode", mixed),
        ("decode", float8),
        *small,
        ("count", {**one, "mode": 1}),
    ]


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_compiles_for(target):
    # In a process of its own: this one has loaded Triton as an interpreter.
    command, cases = [sys.executable, "-c", CODE, target], "\n".join(json.dumps(kind) for kind in kinds(target))
    done = subprocess.run(command, input=cases, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(kinds(target))
    assert [row for row in rows if row["shared"] > SHARED_MEMORY[target]] == []
    walks = [row for row in rows if row["op"] == "decode"]
    if target != "sm_75":
        assert [row for row in walks if not row["products"]] == []
    if target in STRICT:
        assert [row for row in rows if row["spills"]] == []
        assert [row for row in walks if not row["copies"]] == [], "K and V come through the pipeline"
