"""Compiling kernels for GPUs that are not there: registers, spills, shared memory and instructions as facts that a test can hold."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from s2attn.backends.triton.decode import compiler_options
from s2attn.backends.triton.hopper import choose_hopper_form
from s2attn.backends.triton.hopper_backward import choose_column_form, choose_dq_form
from s2attn.backends.triton.launch import DELTA_ROWS, JOINED_ROWS
from s2attn.backends.triton.specialised import choose_form
from s2attn.backends.triton.tiles import SHARED_MEMORY, Tiles, choose_tiles, next_power

KERNELS = {
    "forward": "forward.forward_kernel",
    "dq": "backward.dq_kernel",
    "dkv": "backward.dkv_kernel",
    "delta": "backward.delta_kernel",
    "merge": "join.merge_kernel",
    "sum": "join.sum_kernel",
    "pieces": "score.piece_kernel",
    "rows": "score.row_kernel",
    "mass": "score.mass_kernel",
    "decode": "decode.decode_kernel",
    "count": "decode.count_kernel",
    "reduce": "decode.reduce_kernel",
    "store": "store.store_kernel",
}
_INTS = ("keys", "codes", "listed", "pieces", "splits", "line_start", "line_length", "line_block", "full", "idx", "sub")
_INTS += ("table", "lens", "cu", "counts", "key_pos", "spans")
_INTS += ("key_start", "key_length", "key_end", "query_start", "query_length", "query_end")
_FLOATS = (
    "lse",
    "delta",
    "numbers",
    "dlse",
    "sinks",
    "slot",
    "slot_out",
    "slot_lse",
    "slot_dq",
    "slot_dk",
    "slot_dv",
    "k_scale",
    "v_scale",
)
_FLOATS += ("sums", "mass")
_POINTERS = {
    "ptr": "i64",
    "work": "i64",
    "bits": "i64",
    "sub_at": "i64",
    "ends": "i64",
    "slots": "i64",
    "tiles": "u8",
    **dict.fromkeys(_INTS, "i32"),
    **dict.fromkeys(_FLOATS, "fp32"),
}
_COUNTS = ("slots", "lines", "num_heads", "num_kv_heads", "layout_heads", "tokens", "tile_rows", "places")
_COUNTS += ("batch", "room", "q_len", "per", "max_pages", "outputs", "programs", "splits", "least")
_COUNTS += ("first_row", "end_row", "reach", "seqlen_q", "seqlen_k", "group", "pieces", "key_blocks")
_COUNTS += ("key_tokens", "items", "batches")
_NUMBERS = ("scale", "factor", "cap_log2")


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one kernel for one target.

    Attributes:
        registers, spill_bytes: per thread; NVIDIA's assembler is asked, AMD's compiler writes them down.
        shared_bytes: per program.
        warps: of a program; more than were asked for when the compiler has cut the kernel into specialised warp groups.
        text: PTX, or amdgcn.
        remarks: what NVIDIA's assembler says of asynchronous products, such as that it must wait after every one of them.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    text: str
    remarks: tuple[str, ...] = ()

    @property
    def wgmma(self) -> int:
        """Asynchronous warpgroup products (Hopper)."""
        return len(re.findall(r"wgmma\.mma_async", self.text))

    @property
    def matrix_products(self) -> int:
        """Instructions of matrix units of any kind; none where products are made of single multiplications."""
        return self.wgmma + len(re.findall(r"\b(?:mma\.sync|tcgen05\.mma|v_mfma)", self.text))

    @property
    def handed_over(self) -> int:
        """Places where warp groups hand registers to each other: 0 when no warp is specialised."""
        return len(re.findall(r"setmaxnreg", self.text))


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
    op: str, target: str, dtype: str, dim: int, block: int, shared_limit: int, dim_v: int | None = None, tiles: Tiles | None = None,
    capped: bool = False, sinks: bool = False,
) -> Compiled:  # fmt: skip
    """Compile one of the kernels for ``target`` with the tiles that a launch on it would choose, or with other ones.

    Args:
        op: "forward", "dq", "dkv", "delta", or "merge" and "sum", which join the pieces of cut lists.
        target: "sm_75", "sm_80", ... or "gfx942": the keys of `s2attn.backends.triton.tiles.SHARED_MEMORY`.
        dtype: "fp16", "bf16" or "fp32".
        dim, dim_v: head widths.
        block: tokens per block of the layout.
        shared_limit: bytes of shared memory of the target.
        tiles: tiles to try instead of those that a launch would choose.
        capped, sinks: with a soft-cap of the logits, with learned sink logits.
    """
    kernel = _kernel(op)
    dim_v = dim if dim_v is None else dim_v
    large = {"merge": "forward", "sum": "dq"}.get(op, op)  # what is joined has the tiles of who left it
    if op != "delta":
        tiles = tiles or choose_tiles(large, dim, dim_v, 4 if dtype == "fp32" else 2, block, shared_limit, capped)
    constants, options = _constants(op, dtype, (dim, dim_v), block, tiles, (capped, sinks))
    return _compiled(kernel, target, dtype, constants, options)


def compile_specialised(
    op: str, target: str, dtype: str, dim: int, block: int, shared_heads: int, *, capped: bool = False, sinks: bool = False
) -> Compiled:
    """Compile a warp-specialised kernel in the form that a launch would choose.

    Args:
        op: "forward", "dq" or "dkv".
        target, dtype, dim, block: as for :func:`compile_kernel`; of ``dim`` 64 or 128, of ``block`` 64 or more.
        shared_heads: neighbouring query heads that share keys and lists.
        capped, sinks: as for :func:`compile_kernel`.
    """
    from s2attn.kernels import specialised, specialised_backward

    form = choose_form(op, dim, block, shared_heads)
    constants: dict[str, Any] = {"D": dim, "DV": dim, "CAPPED": capped, **form.constants(op, block)}
    if op == "forward":
        constants["SINKS"] = sinks
    kernel = getattr(specialised if op == "forward" else specialised_backward, f"specialised_{op}_kernel")
    return _compiled(kernel, target, dtype, constants, {"num_warps": 4})


def compile_hopper(
    op: str, dtype: str, dim: int, block: int, shared_heads: int, dim_v: int | None = None, *, capped: bool = False, sinks: bool = False,
    packed: bool = False,
) -> Compiled:  # fmt: skip
    """Compile a Gluon kernel for sm_90 in the form that a launch would choose.

    Args:
        op: "forward", "dq" or "dkv".
        dtype, block, shared_heads, capped, sinks: as for :func:`compile_specialised`; sinks are the forward kernel's alone.
        dim, dim_v: head widths, 64 or 128.
        packed: for several sequences in one tensor.
    """
    kernel = getattr(import_module(f"s2attn.kernels.hopper.{op}"), f"hopper_{op}_kernel")
    dim_v = dim if dim_v is None else dim_v
    flags = {"CAPPED": capped, "PACKED": packed}
    if op == "forward":
        form, flags["SINKS"] = choose_hopper_form(dim, dim_v, block, shared_heads), sinks
    else:
        form = choose_dq_form(dim, dim_v, block, shared_heads) if op == "dq" else choose_column_form(dim, dim_v, block, capped)
    constants = {"D": dim, "DV": dim_v, **form.constants(block), **flags}
    return _compiled(kernel, "sm_90", dtype, constants, {"num_warps": 4})


def compile_score(kernel: str, target: str, dtype: str, dim: int, stride: int, block: int, *, capped: bool = False) -> Compiled:
    """Compile one of the kernels that estimate the mass of blocks ("pieces", "rows" or "mass") as a launch on ``target`` would."""
    from s2attn.backends.triton.score import ROWS, WIDTH, choose_score_tiles, piece_groups

    room, name = KERNELS[kernel].split(".")
    tiles = choose_score_tiles(dim, 4 if dtype == "fp32" else 2, SHARED_MEMORY[target])
    constants: dict[str, Any] = {"PIECE": piece_groups(stride, block, tiles)}
    options = {"num_warps": 4, "num_stages": 3}
    if kernel == "pieces":
        constants |= {"D": dim, "BLOCK_D": tiles.depth, "STRIDE": stride, "BLOCK_M": tiles.rows, "BLOCK_N": tiles.columns, "CAPPED": capped}
        options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    else:
        constants |= {"ROWS": ROWS, "WIDTH": WIDTH, **({"PER_BLOCK": block // stride} if kernel == "mass" else {})}
    return _compiled(getattr(import_module(f"s2attn.kernels.{room}"), name), target, dtype, constants, options)


@dataclass(frozen=True)
class DecodeCase:
    """A kind of decode call, as far as a compiler sees it.

    Attributes:
        dtype: "fp16", "bf16" or "fp32"; ``pages`` that of the cache where it is another one: "fp8" (native) or "u8".
        dim, block, page_size: widths of q, k and v; of the layout; of the cache.
        rows, group: of a tile of queries, and of them for each query.
        mode: how queries are found, 0 to 2 (`s2attn.kernels.pieces.queries`).
        stream: equal ranges instead of lists cut by themselves.
        capped, sinks: as for :func:`compile_kernel`.
    """

    dtype: str
    dim: int
    block: int = 64
    page_size: int = 16
    pages: str = ""
    rows: int = 16
    group: int = 4
    mode: int = 0
    stream: bool = False
    capped: bool = False
    sinks: bool = False


def compile_decode(op: str, target: str, case: DecodeCase, shared_limit: int) -> Compiled:
    """Compile "decode", "reduce", "count" or "store" for calls of that kind, with the tiles that a launch on the target would choose."""
    tiles = choose_tiles("decode", case.dim, case.dim, 4 if case.dtype == "fp32" else 2, case.block, shared_limit, case.capped)
    pages = {"fp8": "fp8e4nv"}.get(case.pages, case.pages or case.dtype)
    scaled = {"SCALED_K": case.pages != "", "SCALED_V": case.pages != ""}
    of_q, of_v = {"D": case.dim, "BLOCK_D": next_power(case.dim)}, {"DV": case.dim, "BLOCK_DV": next_power(case.dim)}
    if op == "store":
        constants = of_q | of_v | scaled | {"PAGE": case.page_size}
        return _compiled(_kernel(op), target, case.dtype, constants, {"num_warps": 1}, {"k_pages_ptr": pages, "v_pages_ptr": pages})
    constants = {"BLOCK_N": tiles.listed_tokens, "RB": case.block, "MEMBERS": case.group, "MODE": case.mode}
    if op == "count":
        constants |= {"QUERIES": case.rows // case.group, "UNITS": 8}
        return _compiled(_kernel(op), target, case.dtype, constants, {"num_warps": 1})
    constants |= {"STREAM": case.stream, "SINKS": case.sinks, "BLOCK_M": case.rows, "GROUP": case.group, **of_v}
    if op == "reduce":
        return _compiled(_kernel(op), target, case.dtype, constants | {"ROWS": JOINED_ROWS}, {"num_warps": 4, "num_stages": 3})
    constants |= of_q | scaled | {"PAGE": case.page_size, "CAPPED": case.capped}
    options = compiler_options(tiles, target.startswith("sm_"))
    return _compiled(_kernel(op), target, case.dtype, constants, options, {"k_ptr": pages, "v_ptr": pages})


def _kernel(op: str) -> Any:
    room, name = KERNELS[op].split(".")
    return getattr(import_module(f"s2attn.kernels.{room}"), name)


def _compiled(
    kernel: Any, target: str, dtype: str, constants: dict[str, Any], options: dict[str, int], pointers: dict[str, str] | None = None
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    types, constants = signature(kernel, dtype, constants)
    types |= {name: "*" + kind for name, kind in (pointers or {}).items() if name in types}
    # What the launcher's specialisation would find: pointers and strides are multiples of 16.
    divisible = [name for name, kind in types.items() if kind == "i64" and not name.startswith(("lse_", "dlse_", "num_", "table_"))]
    aligned = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(types.items()) if name in divisible or kind.startswith("*")}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, types, constants, aligned)
    amd = target.startswith("gfx")
    device = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    made = triton.compile(source, target=device, options=options)
    text = made.asm["amdgcn" if amd else "ptx"]
    registers, spills, remarks = (*_written_down(text), ()) if amd else _assembled(text, device.arch)
    return Compiled(registers, spills, made.metadata.shared, made.metadata.num_warps, text, remarks)


def _constants(
    op: str, dtype: str, widths: tuple[int, int], block: int, tiles: Tiles | None, scoring: tuple[bool, bool]
) -> tuple[dict[str, Any], dict[str, int]]:
    """Compile-time numbers of a kernel, and the compiler's options, as a launch gives them."""
    (dim, dim_v), (capped, sinks) = widths, scoring
    of_q, of_v = {"D": dim, "BLOCK_D": next_power(dim)}, {"DV": dim_v, "BLOCK_DV": next_power(dim_v)}
    options = {"num_warps": 4, "num_stages": 3}
    if tiles is None:
        return {**of_v, "BLOCK_M": DELTA_ROWS, "HAS_DLSE": True}, options
    if op in ("merge", "sum"):
        constants = {"TILE": tiles.line_tokens, "ROWS": JOINED_ROWS, "SUBS": tiles.per_block(block)}
        return {**constants, **(of_v | {"SINKS": sinks} if op == "merge" else of_q)}, options
    lines, listed = ("BLOCK_N", "BLOCK_M") if op == "dkv" else ("BLOCK_M", "BLOCK_N")
    constants = {**of_q, **of_v, lines: tiles.line_tokens, listed: tiles.listed_tokens, "RB": block, "F": tiles.factor(block)}
    constants |= {"SUBS": tiles.per_block(block), "CAPPED": capped}
    constants |= {"SINKS": sinks} if op == "forward" else {}
    return constants, {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}


def _written_down(amdgcn: str) -> tuple[int, int]:
    """Vector registers per thread, and its bytes of private memory, from the notes of AMD's compiler."""
    registers, private = (int(re.findall(rf"\.{name}:\s*(\d+)", amdgcn)[0]) for name in ("vgpr_count", "private_segment_fixed_size"))
    return registers, private


def exponentials_beside_products(ptx: str) -> int:
    """Exponentials that stand in the machine code for Hopper after the begin of a product that is not yet waited for."""
    beside, under_way = 0, False
    for line in _machine_code(ptx):
        if "HGMMA" in line or "WARPGROUP.DEPBAR" in line:
            under_way = "HGMMA" in line
        beside += under_way and "MUFU.EX2" in line
    return beside


def _machine_code(ptx: str) -> list[str]:
    """The instructions that the assembler makes, one in a line."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        _tool(knobs.nvidia.ptxas, "--gpu-name=sm_90a", str(path), "-o", str(path.with_suffix(".cubin")))
        return _tool(knobs.nvidia.cuobjdump, "-sass", str(path.with_suffix(".cubin"))).stdout.splitlines()


def _tool(tool: Any, *words: str) -> subprocess.CompletedProcess[str]:
    """Run one of the programs that Triton brings."""
    return subprocess.run([shutil.which(tool.path) or tool.path, *words], capture_output=True, text=True, check=True)


def _assembled(ptx: str, arch: int) -> tuple[int, int, tuple[str, ...]]:
    """Registers per thread, bytes of spills and remarks, from the assembler that Triton brings."""
    from triton import knobs

    tool = knobs.nvidia.ptxas_blackwell if arch >= 100 and hasattr(knobs.nvidia, "ptxas_blackwell") else knobs.nvidia.ptxas
    target = re.search(r"\.target (sm_\w+)", ptx)
    name = target.group(1) if target else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        said = _tool(tool, "-v", f"--gpu-name={name}", str(path), "-o", str(path.with_suffix(".cubin"))).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", said))
    spills = sum(int(a) + int(b) for a, b in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said))
    return registers, spills, tuple(re.findall(r"\(C75\d\d\)[^\n]*", said))
