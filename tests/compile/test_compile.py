"""Kernels compiled for GPUs that are not there: no spills, shared memory within the limit, Hopper's own products on Hopper.

A representative of each kind; `make compile-matrix` compiles everything that a launch can choose.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from s2attn.backends.triton.tiles import SHARED_MEMORY

pytest.importorskip("triton", reason="triton is not installed")

LARGE = ("forward", "dq", "dkv")
STRICT = ("sm_80", "sm_90", "sm_100")
MAY_SPILL = {("sm_80", "dq", 128): 24, ("sm_90", "dkv", 64): 20}
"""Bytes in registers' place at most: masked pairs are selected in P and in dS, which costs registers."""


def compiled(target: str) -> list[dict]:
    """In a process of its own: this one has loaded Triton as an interpreter. One process compiles all of a target."""
    command = [sys.executable, str(Path(__file__).with_name("matrix.py")), "--representatives", target]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}, check=False)
    assert done.stdout, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_compiles_for(target):
    rows = compiled(target)
    large = [row for row in rows if row["op"] in LARGE]
    assert large and {row["op"] for row in rows} >= {"delta", "merge", "sum"}
    assert [row for row in rows if "error" in row or row["shared"] > row["limit"]] == []
    if target != "sm_75":  # there Triton makes products of single multiplications
        assert [row for row in large if not row["products"] and row["dtype"] != "fp32"] == []
    if target in STRICT:
        usual = [row for row in large if row["dim"] in (64, 128) and row["block"] == 64]
        assert len(usual) == len(LARGE) * 4, "two widths, plain and with a soft-cap"
        most = [(row, MAY_SPILL.get((target, row["op"], row["dim"]), 0)) for row in large if row["dim"] in (64, 128)]
        assert [row for row, spills in most if row["spills"] > spills and row["dtype"] == "bf16"] == []
    if target == "sm_90":
        assert [row for row in usual if not row["wgmma"]] == []
