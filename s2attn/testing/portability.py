"""What works on which class of device: one table, made by running what can be run here and compiling the rest.

``python -m s2attn.testing.portability`` makes the record anew, and the page ``docs/reference/portability.md`` from it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from s2attn.backends import get_backend
from s2attn.backends.triton.backend import DTYPES
from s2attn.backends.triton.tiles import SHARED_MEMORY
from s2attn.core import Unsupported
from s2attn.ops import attention
from s2attn.ops.decode import decode
from s2attn.ops.score import antidiagonal
from s2attn.ops.store import store_kv
from s2attn.patterns import Local, Stride
from s2attn.testing.masks import dense_mask
from s2attn.testing.oracle import oracle

RECORD = Path(__file__).with_suffix(".json")
OPERATIONS = ("attention", "gradients", "decode", "store_kv", "antidiagonal")
KERNELS = {
    "attention": ("forward",),
    "gradients": ("delta", "dq", "dkv"),
    "decode": ("decode", "count", "reduce"),
    "store_kv": ("store",),
    "antidiagonal": ("pieces", "rows", "mass"),
}
"""The Triton kernels of each operation."""
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
PATTERN = Local(2, block=32) | Stride(3, block=32)
WIDTH, BLOCK, STRIDE = 128, 64, 16
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of the largest number of the exact result; a result beyond it is wrong, not inexact."""


@dataclass(frozen=True)
class Finding:
    """One cell of the table.

    Attributes:
        device: a class of devices, such as "CPU" or "CUDA sm_90".
        dtype, operation: what was asked of it.
        result: "right" where it ran here and agrees with float64; "compiles"; or "no".
        backend: which one it was.
        notes: why not, or what a user should know.
    """

    device: str
    dtype: str
    operation: str
    result: str
    backend: str
    notes: tuple[str, ...] = ()


def run_here(device: torch.device, label: str) -> Iterator[Finding]:
    """Every operation in every dtype on a device of this machine, by the backend that "auto" takes."""
    for dtype in DTYPES:
        for operation in OPERATIONS:
            ask = {"device": label, "dtype": str(dtype).removeprefix("torch."), "operation": operation}
            try:
                backend, error = _CALLS[operation](device, dtype)
            except (Unsupported, RuntimeError) as reason:
                yield Finding(**ask, result="no", backend="-", notes=(str(reason).splitlines()[0],))
                continue
            wrong = () if error <= TOLERANCE[dtype] else (f"off by {error:.0e} of the largest number",)
            yield Finding(**ask, result="no" if wrong else "right", backend=backend, notes=wrong)


def _attend(device: torch.device, dtype: torch.dtype) -> tuple[str, float]:
    q, k, v = _inputs(device, dtype)
    out = attention(q, k, v, PATTERN)
    return _taken(q), _error(out, oracle(q.cpu(), k.cpu(), v.cpu(), _mask(q, k))[0])


def _differentiate(device: torch.device, dtype: torch.dtype) -> tuple[str, float]:
    q, k, v = (x.requires_grad_() for x in _inputs(device, dtype))
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    found = torch.autograd.grad(attention(q, k, v, PATTERN), (q, k, v), dout)
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    wanted = torch.autograd.grad(oracle(exact[0], exact[1], exact[2], _mask(q, k))[0], exact, dout.cpu().double())
    return _taken(q), max(_error(a, b) for a, b in zip(found, wanted, strict=True))


def _decode(device: torch.device, dtype: torch.dtype) -> tuple[str, float]:
    q, k, v = (x[:, -n:] for x, n in zip(_inputs(device, dtype), (3, 224, 224), strict=True))
    k_pages, v_pages = (x.unflatten(1, (-1, 32)).flatten(0, 1) for x in (k, v))
    table = torch.arange(len(k_pages), device=device).view(2, -1)
    lens = torch.full((2,), 224, device=device)
    out = decode(q, k_pages, v_pages, PATTERN, block_table=table, seq_lens=lens)
    return _taken(q), _error(out, oracle(q.cpu(), k.cpu(), v.cpu(), _mask(q, k))[0])


def _store(device: torch.device, dtype: torch.dtype) -> tuple[str, float]:
    _, k, v = _inputs(device, dtype)
    pages = [torch.zeros(8, 32, *k.shape[2:], dtype=dtype, device=device) for _ in range(2)]
    slots = torch.randperm(256, generator=torch.Generator().manual_seed(2))[: k.shape[1]].to(device)
    store_kv(k[0], v[0], pages[0], pages[1], slots)
    return _taken(k), float(sum((page.flatten(0, 1)[slots] != x[0]).sum() for page, x in zip(pages, (k, v), strict=True)))


def _score(device: torch.device, dtype: torch.dtype) -> tuple[str, float]:
    q, k, _ = _inputs(device, dtype)
    found = antidiagonal(q, k, stride=8, block=32)
    return _taken(q), _error(found, antidiagonal(q.cpu().double(), k.cpu().double(), stride=8, block=32, backend="reference"))


_CALLS: dict[str, Callable[[torch.device, torch.dtype], tuple[str, float]]] = {
    "attention": _attend,
    "gradients": _differentiate,
    "decode": _decode,
    "store_kv": _store,
    "antidiagonal": _score,
}


def _inputs(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return [torch.randn(2, 224, heads, 32, generator=drawn).to(device, dtype) for heads in (4, 2, 2)]


def _mask(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return dense_mask(PATTERN, q.shape[2], k.shape[2], q.shape[1], k.shape[1])


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    found, exact = found.detach().cpu().double(), exact.detach().double()
    return float((found - exact).abs().max() / exact.abs().max())


def _taken(q: torch.Tensor) -> str:
    """The backend that "auto" takes for such tensors: the first without objections."""
    from s2attn.backends.registry import backend_names

    return next(name for name in backend_names() if not get_backend(name).objections(q, q, q))


def compile_for(target: str) -> Iterator[Finding]:
    """Every operation in every dtype compiled by Triton for a GPU that is not there, at the usual widths."""
    from s2attn.backends.triton.backend import _device_objections

    label = f"CUDA {target}" if target.startswith("sm_") else f"ROCm {target}"
    capability = divmod(int(target.removeprefix("sm_")), 10) if target.startswith("sm_") else (9, 0)
    for dtype in DTYPES:
        for operation in OPERATIONS:
            ask = {"device": label, "dtype": str(dtype).removeprefix("torch."), "operation": operation}
            why = _device_objections(capability, dtype)
            if why:
                yield Finding(**ask, result="no", backend="triton", notes=tuple(why))
                continue
            yield _compiled(ask, target, NAMES[dtype])


def _compiled(ask: dict[str, str], target: str, dtype: str) -> Finding:
    limit, notes = SHARED_MEMORY[target], []
    for kernel in KERNELS[ask["operation"]]:
        try:
            made = _compile(kernel, target, dtype, limit)
        except Exception as error:  # whatever a compiler throws is the finding
            return Finding(**ask, result="no", backend="triton", notes=(f"{kernel}: {type(error).__name__}: {str(error).splitlines()[0]}",))
        if made.shared_bytes > limit:
            return Finding(**ask, result="no", backend="triton", notes=(f"{kernel} asks for {made.shared_bytes} of {limit} bytes",))
        if made.spill_bytes:
            notes.append(f"{kernel} spills {made.spill_bytes} bytes")
        if kernel in ("forward", "dq", "dkv", "decode", "pieces") and dtype != "fp32" and not made.matrix_products:
            notes.append(f"{kernel} has no matrix instructions")
    return Finding(**ask, result="compiles", backend="triton", notes=tuple(notes))


def _compile(kernel: str, target: str, dtype: str, limit: int) -> Any:
    from s2attn.testing import compiling

    if kernel in ("forward", "dq", "dkv", "delta"):
        return compiling.compile_kernel(kernel, target, dtype, WIDTH, BLOCK, limit)
    if kernel in ("pieces", "rows", "mass"):
        return compiling.compile_score(kernel, target, dtype, WIDTH, STRIDE, 128)
    return compiling.compile_decode(kernel, target, compiling.DecodeCase(dtype, WIDTH, BLOCK), limit)


def survey() -> dict[str, Any]:
    """Everything that this machine can tell, as plain values."""
    import triton

    found = list(run_here(torch.device("cpu"), "CPU"))
    ran = set()
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        label = f"CUDA sm_{major}{minor}"
        if label not in ran:
            ran.add(label)
            found += run_here(torch.device("cuda", index), label)
    for target in SHARED_MEMORY:
        if f"CUDA {target}" not in ran:
            found += compile_for(target)
    versions = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "s2attn": metadata.version("s2attn"),
    }
    return {"made_with": versions, "findings": [asdict(one) for one in found]}


def page(record: dict[str, Any]) -> str:
    """The record as a page of the documentation."""
    keys = ("device", "dtype", "operation", "result", "backend")
    findings = [Finding(*(one[key] for key in keys), notes=tuple(one["notes"])) for one in record["findings"]]
    versions = ", ".join(f"{name} {number}" for name, number in record["made_with"].items())
    lines = ["# What works where", ""]
    lines += [f"Made by `python -m s2attn.testing.portability` with {versions}. Do not edit: run it again."]
    lines += ["", "* **right**: ran on such a device here, and agrees with float64."]
    lines += ["* **compiles**: Triton compiles it for such a device and it fits its shared memory; no such device was there to run it."]
    lines += ['* **no**: refused, for the reason below. `torch`, in plain torch, then serves a call with `backend="auto"`.']
    lines += ["* Other torch devices, and shapes that a kernel refuses, are served by `torch`, in plain torch; none was there to run it."]
    lines += ["", f"| device | dtype | {' | '.join(OPERATIONS)} |", "|---|---|" + "---|" * len(OPERATIONS)]
    rows: dict[tuple[str, str], dict[str, Finding]] = {}
    for one in findings:
        rows.setdefault((one.device, one.dtype), {})[one.operation] = one
    notes: dict[str, int] = {}
    for (device, dtype), cells in rows.items():
        texts = []
        for operation in OPERATIONS:
            one = cells[operation]
            marks = [str(notes.setdefault(note, len(notes) + 1)) for note in one.notes]
            texts.append(f"{one.result} ({one.backend})" + (f" [{', '.join(marks)}]" if marks else ""))
        lines.append(f"| {device} | {dtype} | {' | '.join(texts)} |")
    lines += ["", "Notes:", ""] + [f"{number}. {note}" for note, number in notes.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the record and the page."""
    record = survey()
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    path = Path("docs/reference/portability.md")
    path.write_text(page(record), encoding="utf-8")
    print(f"{len(record['findings'])} findings in {RECORD} and {path}")


if __name__ == "__main__":
    main()
