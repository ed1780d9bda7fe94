"""The table of what works where: each cell is made by running or compiling, and the page says what the record says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from s2attn.backends.triton.tiles import SHARED_MEMORY
from s2attn.core import Unsupported
from s2attn.testing import portability
from s2attn.testing.compiling import Compiled
from s2attn.testing.portability import OPERATIONS, RECORD, Finding, compile_for, page, run_here


def test_everything_is_right_on_a_cpu() -> None:
    found = list(run_here(torch.device("cpu"), "CPU"))
    assert len(found) == 3 * len(OPERATIONS)
    assert {one.result for one in found} == {"right"} and {one.backend for one in found} <= {"cpu", "torch"}


def test_a_wrong_result_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(device: torch.device, dtype: torch.dtype) -> tuple[str, float]:
        raise Unsupported("nobody can", {"torch": ["a reason"]})

    monkeypatch.setattr(portability, "_CALLS", {name: (lambda *_: ("torch", 0.5)) for name in OPERATIONS} | {"decode": refused})
    found = list(run_here(torch.device("cpu"), "CPU"))
    assert all(one.result == "no" for one in found) and {"off by 5e-01 of the largest number"} <= {one.notes[0] for one in found}
    assert any("nobody can" in one.notes[0] for one in found)


def test_a_compiler_is_asked() -> None:
    """In a process of its own: the interpreter of this one would take the compiler's place."""
    code = (
        "from s2attn.testing import portability as p; p.OPERATIONS = ('store_kv',); print([one.result for one in p.compile_for('sm_75')])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}, check=True)
    assert done.stdout.split("\n")[0] == "['compiles', 'no', 'compiles']"  # float16, bfloat16, float32


def test_compiling_names_what_a_device_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Compiled(registers=255, spill_bytes=8, shared_bytes=100, warps=4, text="")
    monkeypatch.setattr(portability, "_compile", lambda *_: made)
    found = {(one.dtype, one.operation): one for one in compile_for("sm_75")}
    assert found["bfloat16", "decode"].result == "no" and "no bfloat16" in found["bfloat16", "decode"].notes[0]
    assert found["float16", "store_kv"].notes == ("store spills 8 bytes",)
    assert "forward has no matrix instructions" in found["float16", "attention"].notes
    assert found["float32", "attention"].notes == ("forward spills 8 bytes",)
    monkeypatch.setattr(portability, "_compile", lambda *_: replace(made, shared_bytes=1 << 20))
    assert {(one.result, one.notes[0].partition(" ")[2]) for one in compile_for("sm_90")} == {("no", "asks for 1048576 of 232448 bytes")}


def test_the_page_is_that_of_the_record() -> None:
    record = json.loads(RECORD.read_text())
    assert Path("docs/reference/portability.md").read_text() == page(record)
    devices = {one["device"] for one in record["findings"]}
    assert devices == {"CPU", "ROCm gfx942", *(f"CUDA {target}" for target in SHARED_MEMORY if target != "gfx942")}
    assert len(record["findings"]) == len(devices) * 3 * len(OPERATIONS)


def test_notes_are_numbered_once() -> None:
    made = [asdict(Finding("CUDA sm_1", "float16", name, "no", "triton", ("too old",))) for name in OPERATIONS]
    text = page({"made_with": {"torch": "2"}, "findings": made})
    assert text.count("[1]") == len(OPERATIONS) and text.count("too old") == 1
