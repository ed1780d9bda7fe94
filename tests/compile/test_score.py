"""The kernels that estimate the mass of blocks, compiled for GPUs that are not there."""

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
from tests.support.compiling import compile_score
for call in json.loads(sys.argv[1]):
    made = compile_score(*call[:-1], capped=call[-1])
    facts = {"spills": made.spill_bytes, "shared": made.shared_bytes, "wgmma": made.wgmma, "products": made.matrix_products}
    print(json.dumps(facts))
"""


def compiled(calls: list[tuple]) -> list[dict]:
    """In a process of its own: this one has loaded Triton as an interpreter."""
    command = [sys.executable, "-c", CODE, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("target", STRICT)
def test_products_use_matrix_units_and_do_not_spill(target):
    calls = [("pieces", target, "bf16", *numbers, False) for numbers in ((128, 16, 128), (64, 8, 128), (128, 4, 64), (128, 1, 256))]
    for facts in compiled(calls):
        assert facts["products"] > 0 and facts["spills"] == 0
        assert facts["shared"] <= SHARED_MEMORY[target]
        assert (facts["wgmma"] > 0) == (target == "sm_90")


@pytest.mark.parametrize("target", sorted(SHARED_MEMORY))
def test_every_target(target):
    half = "fp16" if target == "sm_75" else "bf16"
    calls = [
        (kernel, target, dtype, 80, 8, 128, True)
        for kernel, dtype in (("pieces", half), ("pieces", "fp32"), ("rows", half), ("mass", half))
    ]
    made = compiled(calls)
    assert len(made) == 4 and all(facts["shared"] <= SHARED_MEMORY[target] for facts in made)
