"""Compiling the Hopper kernels written in Gluon: the facts of `s2attn.testing.compiling`, and what the assembler says of their products."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from s2attn.backends.triton.hopper_backward import choose_column_form, choose_dq_form
from s2attn.testing.compiling import Compiled, signature

_OTHER_TYPES = {
    "work_ptr": "*i64", "bits_ptr": "*i64", "keys_ptr": "*i32", "listed_ptr": "*i32", "codes_ptr": "*i32", "numbers_ptr": "*fp32",
    **dict.fromkeys(("items", "batches", "key_tokens"), "i32"),
}  # fmt: skip


@dataclass(frozen=True)
class CompiledGluon(Compiled):
    """Further facts of a kernel with products in flight.

    Attributes:
        remarks: what the assembler says of the products, such as that it had to wait after every one of them (C7510 and its neighbours).
    """

    remarks: tuple[str, ...]

    @property
    def waits(self) -> list[int]:
        """Products that each wait leaves in flight, in the order of the text."""
        return [int(n) for n in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", self.text)]

    @property
    def registers_asked(self) -> set[int]:
        """Registers per thread that warp groups ask for."""
        return {int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", self.text)}


def compile_hopper(
    op: str, dtype: str, dim: int, block: int, shared_heads: int, *, dim_v: int | None = None, capped: bool = False, packed: bool = False
) -> CompiledGluon:  # fmt: skip
    """Compile a Hopper kernel for sm_90 in the form that a launch would choose.

    Args:
        op: "dq" or "dkv".
        dtype: "fp16" or "bf16".
        dim, dim_v: head widths, 64 or 128.
        block: tokens per block of the layout, 64 or more.
        shared_heads: neighbouring query heads that share keys and lists.
        capped, packed: with a soft-cap of the logits, over packed sequences.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    dim_v = dim if dim_v is None else dim_v
    form = choose_dq_form(dim, dim_v, block, shared_heads) if op == "dq" else choose_column_form(dim, dim_v, block, capped)
    kernel = getattr(import_module(f"s2attn.kernels.hopper.{op}"), f"hopper_{op}_kernel")
    constants: dict[str, Any] = {"D": dim, "DV": dim_v, "CAPPED": capped, "PACKED": packed, **form.constants(block)}
    types, constants = signature(kernel, dtype, constants)
    types |= {name: kind for name, kind in _OTHER_TYPES.items() if name in types}
    aligned = [i for i, (n, kind) in enumerate(types.items()) if kind.startswith("*") or (kind == "i64" and not n.startswith("lse_"))]
    named = {(list(types).index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, types, constexprs=named, attrs={(i,): [["tt.divisibility", 16]] for i in aligned})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    said = _assemble(made.asm["ptx"])
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", said))
    spills = sum(int(a) + int(b) for a, b in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said))
    remarks = tuple(re.findall(r"\(C75\d\d\)[^\n]*", said))
    return CompiledGluon(registers, spills, made.metadata.shared, made.metadata.num_warps, made.asm["ptx"], remarks)


def _assemble(ptx: str) -> str:
    """What Triton's own assembler says of a program."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        tool = shutil.which(knobs.nvidia.ptxas.path) or knobs.nvidia.ptxas.path
        command = [tool, "-v", "--gpu-name=sm_90a", str(path), "-o", str(path.with_suffix(".cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
