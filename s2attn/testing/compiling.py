"""Compiling kernels for GPUs that are not there: registers, spills, shared memory and instructions as facts that a test can hold."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2attn.backends.triton.specialised import choose_form
from s2attn.backends.triton.tiles import Tiles, choose_tiles, next_power

KERNELS = {"forward": "forward_kernel", "dq": "dq_kernel", "dkv": "dkv_kernel", "delta": "delta_kernel"}
_INTS = ("pieces", "splits", "line_start", "line_length", "line_block", "full", "idx", "sub")
_INTS += ("key_start", "key_length", "key_end", "query_start", "query_length", "query_end")
_FLOATS = ("lse", "delta", "dlse", "sinks", "slot", "slot_out", "slot_lse", "slot_dq", "slot_dk", "slot_dv")
_POINTERS = {"ptr": "i64", "sub_at": "i64", "tiles": "u8", **dict.fromkeys(_INTS, "i32"), **dict.fromkeys(_FLOATS, "fp32")}
_COUNTS = ("slots", "lines", "num_heads", "num_kv_heads", "layout_heads", "tokens", "tile_rows", "places")
_NUMBERS = ("scale", "factor", "cap_log2")


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one kernel for one target; NVIDIA's assembler is asked for registers and spills.

    ``warps`` counts all of a program: more than were asked for when the compiler has cut the kernel into specialised warp groups.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    ptx: str

    @property
    def wgmma(self) -> int:
        """Asynchronous warpgroup products (Hopper)."""
        return len(re.findall(r"wgmma\.mma_async", self.ptx))

    @property
    def handed_over(self) -> int:
        """Places where warp groups hand registers to each other: 0 when no warp is specialised."""
        return len(re.findall(r"setmaxnreg", self.ptx))


def signature(kernel: Any, dtype: str, constants: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of a kernel's arguments as a contiguous call has them; the innermost strides are 1 and so constants."""
    types: dict[str, str] = {}
    for name in inspect.signature(kernel.fn).parameters:
        if name in constants or name.endswith("_dim"):
            types[name] = "constexpr"
            constants.setdefault(name, 1)
        elif name.endswith("_ptr"):
            types[name] = "*" + _POINTERS.get(name.removesuffix("_ptr"), dtype)
        elif name in _NUMBERS:
            types[name] = "fp32"
        else:
            types[name] = "i32" if name in _COUNTS else "i64"
    return types, constants


def compile_kernel(
    op: str, arch: int, dtype: str, dim: int, block: int, shared_limit: int, dim_v: int | None = None, tiles: Tiles | None = None,
    capped: bool = False, sinks: bool = False,
) -> Compiled:  # fmt: skip
    """Compile one of the kernels for ``sm_<arch>`` with the tiles that a launch on it would choose, or with other ones.

    Args:
        op: "forward", "dq", "dkv" or "delta".
        arch: 75, 80, 86, 89, 90, 100 or 120.
        dtype: "fp16", "bf16" or "fp32".
        dim, dim_v: head widths.
        block: tokens per block of the layout.
        shared_limit: bytes of shared memory of the target.
        tiles: tiles to try instead of those that a launch would choose.
        capped, sinks: with a soft-cap of the logits, with learned sink logits.
    """
    from s2attn.kernels import backward, forward

    kernel = getattr(forward if op == "forward" else backward, KERNELS[op])
    dim_v = dim if dim_v is None else dim_v
    constants: dict[str, Any] = {"DV": dim_v, "BLOCK_DV": next_power(dim_v)}
    options = {"num_warps": 4, "num_stages": 3}
    if op == "delta":
        constants |= {"BLOCK_M": 64, "HAS_DLSE": True}
    else:
        tiles = tiles or choose_tiles(op, dim, dim_v, 4 if dtype == "fp32" else 2, block, shared_limit, capped)
        lines, listed = ("BLOCK_N", "BLOCK_M") if op == "dkv" else ("BLOCK_M", "BLOCK_N")
        constants |= {"D": dim, "BLOCK_D": next_power(dim), lines: tiles.line_tokens, listed: tiles.listed_tokens, "RB": block}
        constants |= {"F": tiles.factor(block), "SUBS": tiles.per_block(block), "PRECISION": "ieee" if dtype == "fp32" else "tf32"}
        constants |= {"CAPPED": capped} | ({"SINKS": sinks} if op == "forward" else {})
        options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return _compiled(kernel, arch, dtype, constants, options)


def compile_specialised(
    op: str, arch: int, dtype: str, dim: int, block: int, shared_heads: int, *, capped: bool = False, sinks: bool = False
) -> Compiled:
    """Compile a warp-specialised kernel in the form that a launch would choose.

    Args:
        op: "forward", "dq" or "dkv".
        arch, dtype, dim, block: as for :func:`compile_kernel`; of ``dim`` 64 or 128, of ``block`` 64 or more.
        shared_heads: neighbouring query heads that share keys and lists.
        capped, sinks: as for :func:`compile_kernel`.
    """
    from s2attn.kernels import specialised, specialised_backward

    form = choose_form(op, dim, block, shared_heads)
    constants: dict[str, Any] = {"D": dim, "DV": dim, "PRECISION": "tf32", "CAPPED": capped, **form.constants(op, block)}
    if op == "forward":
        constants["SINKS"] = sinks
    kernel = getattr(specialised if op == "forward" else specialised_backward, f"specialised_{KERNELS[op]}")
    return _compiled(kernel, arch, dtype, constants, {"num_warps": 4})


def _compiled(kernel: Any, arch: int, dtype: str, constants: dict[str, Any], options: dict[str, int]) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants = signature(kernel, dtype, constants)
    # What the launcher's specialisation would find: pointers and strides are multiples of 16.
    divisible = [name for name, kind in types.items() if kind == "i64" and not name.startswith(("lse_", "dlse_"))]
    aligned = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(types.items()) if name in divisible or kind.startswith("*")}
    source = ASTSource(kernel, types, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spills = _assembled(made.asm["ptx"], arch)
    return Compiled(registers, spills, made.metadata.shared, made.metadata.num_warps, made.asm["ptx"])


def _assembled(ptx: str, arch: int) -> tuple[int, int]:
    """Registers per thread and bytes of spills, from the assembler that Triton brings."""
    from triton import knobs

    tool = knobs.nvidia.ptxas_blackwell if arch >= 100 and hasattr(knobs.nvidia, "ptxas_blackwell") else knobs.nvidia.ptxas
    target = re.search(r"\.target (sm_\w+)", ptx)
    name = target.group(1) if target else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [shutil.which(tool.path) or tool.path, "-v", f"--gpu-name={name}", str(path), "-o", str(path.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", said))
    spills = sum(int(a) + int(b) for a, b in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said))
    return registers, spills
