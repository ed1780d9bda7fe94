"""Small problems of every kernel under NVIDIA's compute-sanitizer: memory that is not theirs (memcheck), races (racecheck).

python tests/gpu/sanitize.py                  both checks; reports into the output folder
python tests/gpu/sanitize.py --run plain      the problems alone, without a GPU in Triton's interpreter
python tests/gpu/sanitize.py --run hopper     those of the kernels for Hopper, without a GPU in the project's own runner

The kernels for Hopper come last, in processes of their own: warps that wait for each other wrongly would wait until the time is over.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from s2attn.backends.triton import Triton

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
TOOLS = ("memcheck", "racecheck")
SHARES = {"plain": 0.65, "hopper": 1.0}
"""What is run, and by which part of the time each has to be done."""
# Without a cache every tensor is an allocation of its own, and a read beyond its end is seen.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}


def problems(on_gpu: bool) -> Iterator[tuple[str, object]]:
    """Every block size, ragged packed lengths, a short last block, lists in pieces and whole, an odd width, soft-cap and sinks."""
    import torch

    from s2attn import Global, Local, Sink, Window, build_layout
    from tests.support.problems import make_problem

    lengths = [150, 0, 1, 67] if on_gpu else [40, 0, 1, 19]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    total = sum(lengths)
    mask = torch.ones(4, total, total, dtype=torch.bool)  # of no use here: nothing is compared
    for block in (16, 32, 64, 128, 256):
        for name, pattern in (("pieces", Global(8) | Window(20)), ("per query head", Local(2, block) | Sink(3))):
            causal = name != "pieces"
            layout = build_layout(pattern, 4, 2, block=block, causal=causal, cu_seqlens_q=cu, cu_seqlens_k=cu)
            width, odd = (64, 80) if on_gpu else (16, 24)
            for label, shape in {"plain": {"width": width}, "scored": {"width": odd, "softcap": 5.0, "sinks": torch.randn(4)}}.items():
                yield f"block {block}, {name}, {label}", make_problem(layout, mask, heads=4, kv_heads=2, **shape)
    layout = build_layout(Window(40), 4, 2, 77, 90, block=16)
    yield "batch, a past", make_problem(layout, mask[:, :77, :90].new_ones(4, 77, 90), heads=4, kv_heads=2, batch=2, width=width)


def run_plain() -> None:
    """The problems, float16, forward and backward; pieces of 32 tokens, so that the joining kernels have work."""
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from s2attn.backends.triton import Triton, walk
    from tests.support import problems as testing

    walk.LEAST_TOKENS = 32
    walk.piece_limits = lambda counts, seq, copies, least: torch.full((len(seq),), max(least, 1)).numpy()
    torch.manual_seed(0)
    cut = 0
    for name, problem in problems(on_gpu):
        begin, backend = time.perf_counter(), Triton()
        given = problem.on(torch.device("cuda" if on_gpu else "cpu")).to(torch.float16)
        found = testing.run(backend, given)
        for label in ("out", "dq", "dk", "dv"):
            if not torch.isfinite(getattr(found, label)).all():
                raise SystemExit(f"{name}: {label} is not finite")
        cut += sum(way.slots for way in backend.ways(given.layout))
        print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)
    run_paged(torch.device("cuda" if on_gpu else "cpu"), 64 if on_gpu else 16)
    run_score(torch.device("cuda" if on_gpu else "cpu"), 80 if on_gpu else 24)
    print(f"done; {cut} pieces were joined")


def run_paged(device: torch.device, width: int) -> None:
    """Storing and decoding in every form, with lengths, tables and slots of which some make no sense and nobody looks at any."""
    import torch

    from s2attn import Local, Stride, build_layout
    from s2attn.backends import Pages, Requests, Scoring, Writes
    from s2attn.backends.triton import Triton, decode
    from s2attn.schedule import Cut

    lengths = torch.tensor([200, 0, 10**6, -5], dtype=torch.int32, device=device)
    table = torch.tensor([[1, 2, 3, 0], [-1, 9, 4, 4], [0, 5, 2**31 - 1, 3], [1, -(2**31), 3, 2]], dtype=torch.int32, device=device)
    counts = torch.tensor([0, 3, 4, 24, 99], dtype=torch.int32, device=device)
    for form, cut in {"direct": Cut("direct"), "split": Cut("split", 3, 32), "stream": Cut("stream", programs=7)}.items():
        decode.choose_cut = lambda *given, cut=cut, **more: cut
        for block in (16, 64):
            begin, backend = time.perf_counter(), Triton()
            k, v = torch.randn(2, 6, 64, 2, width, device=device).half()
            new = torch.randn(2, 4, 2, width, device=device).half()
            backend.store(Writes(*new, k, v, torch.tensor([7, -1, 10**9, 383], device=device)))
            layout = build_layout(Local(2, block) | Stride(3, block=block), 4, 2, 256, block=block, device=device)
            for cu in (None, counts):
                q = torch.randn(1, 24, 4, width, device=device).half()
                requests = Requests(lengths, cu, checked=False)
                out, _ = backend.forward_paged(q, Pages(k, v, table.unsqueeze(1)), requests, layout, Scoring(0.1))
                if not torch.isfinite(out).all():
                    raise SystemExit(f"paged, {form}: out is not finite")
            print(f"paged, {form}, block {block}: {time.perf_counter() - begin:.1f} s", flush=True)


def run_score(device: torch.device, odd: int) -> None:
    """Estimates of block mass: short last groups and blocks, calls in parts, an odd width, a past."""
    import torch

    from s2attn.backends.triton import score
    from s2attn.ops import antidiagonal

    # Few sums at once, so that a call comes in several parts.
    score.AT_ONCE = 1 << 9
    for stride, block, causal, softcap in ((1, 16, True, None), (4, 64, False, 5.0), (8, 256, True, 5.0), (16, 128, True, None)):
        begin = time.perf_counter()
        q, k = torch.randn(2, 75, 4, odd, device=device).half(), torch.randn(2, 90, 2, odd, device=device).half()
        mass = antidiagonal(q, k, stride=stride, block=block, causal=causal, softcap=softcap, backend="triton")
        groups = mass.sum(-1)[..., :-1] * stride  # a row sums to the number of its groups
        if not torch.allclose(groups, torch.full_like(groups, block)):
            raise SystemExit(f"score, stride {stride}: rows have another mass than their groups")
        print(f"score, stride {stride}, block {block}: {time.perf_counter() - begin:.1f} s", flush=True)


def run_hopper() -> None:
    """Every form of an item: heads stacked, rows paired, blocks of 128 and 256; packed and padded, a past, soft-cap and sinks."""
    import torch

    from s2attn import Dense, Local, Sink, Stride, Window, build_layout
    from s2attn.backends.triton import Triton
    from s2attn.backends.triton.backend import find_tiles
    from tests.support import problems as testing

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # for the kernels between Hopper's
    if on_gpu and torch.cuda.get_device_capability() != (9, 0):
        print("done; kernels for Hopper alone")
        return
    torch.manual_seed(0)
    cu = torch.tensor([0, *([150, 0, 1, 329] if on_gpu else [70, 0, 1, 20])]).cumsum(0)
    packed = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    of_length = {"seqlen_q": 300, "seqlen_k": 333} if on_gpu else {"seqlen_q": 70, "seqlen_k": 90}
    scored, wide = {"softcap": 5.0, "sinks": torch.randn(4)}, 128 if on_gpu else 64
    cases = {
        "two heads stacked, packed": (Local(2) | Stride(3), 2, 64, packed, {"width": 64}),
        "two heads stacked, scored": (Window(90) | Sink(5), 2, 64, of_length, {"width": wide, "batch": 2, **scored}),
        "two rows paired, packed": (Local(2) | Stride(3), 4, 64, packed, {"width": wide, **scored}),
        "block 128": (Window(90) | Sink(5), 2, 128, packed, {"width": 64}),
        "block 256, dense": (Dense(), 1, 256, of_length | {"causal": False}, {"width": wide}),
    }
    with hopper_backend(on_gpu, lambda: Triton(lambda *given: replace(find_tiles(*given), form="hopper"))) as backend:
        for name, (pattern, kv_heads, block, tokens, shape) in cases.items():
            begin = time.perf_counter()
            layout = build_layout(pattern, 4, kv_heads, block=block, **tokens)
            mask = torch.ones(4, layout.seqlen_q, layout.seqlen_k, dtype=torch.bool)  # of no use here: nothing is compared
            problem = testing.make_problem(layout, mask, heads=4, kv_heads=kv_heads, **shape)
            given = problem.on(torch.device("cuda" if on_gpu else "cpu")).to(torch.float16)
            found = testing.run(backend, given)
            if not all(torch.isfinite(getattr(found, label)).all() for label in ("out", "dq", "dk", "dv")):
                raise SystemExit(f"hopper, {name}: a result is not finite")
            plain = [way.op for way in backend.ways(given.layout) if way.special is None]
            if plain:
                raise SystemExit(f"hopper, {name}: {', '.join(plain)} had no kernel for Hopper")
            print(f"hopper, {name}: {time.perf_counter() - begin:.1f} s", flush=True)
    print(f"done; {len(cases)} problems")


@contextmanager
def hopper_backend(on_gpu: bool, make: Callable[[], Triton]) -> Iterator[Triton]:
    """The backend of Hopper's kernels, on a CPU with the project's own runner for them."""
    if on_gpu:
        yield make()
        return
    from tests.support.gluon.launches import hopper_on_cpu

    with hopper_on_cpu() as backend:
        yield backend


def sanitizer() -> str | None:
    """Where compute-sanitizer is, or None."""
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))


def alone(part: str) -> list[str]:
    """The command that runs problems by themselves."""
    return [sys.executable, str(Path(__file__).resolve()), "--run", part]


def check(tool: str, part: str, binary: str, out: Path, seconds: float) -> str:
    """One tool over some problems; a line that says what it found. Its report lies in the output folder."""
    report = out / f"sanitize-{tool}-{part}.txt"
    command = [binary, "--tool", tool, "--target-processes", "application-only", "--print-limit", "50", "--error-exitcode", "9"]
    with report.open("w") as file:
        code = ended([*command, *alone(part)], file, seconds)
    text = report.read_text()
    summary = re.findall(r"ERROR SUMMARY: (.*)|RACECHECK SUMMARY: (.*)", text)
    said = "".join(summary[-1]) if summary else "no summary"
    finished = len(re.findall(r"(?m)^(?:block|batch|paged|score|hopper).*: [\d.]+ s$", text))
    return f"{tool}, {part}: {said}; {finished} problems; {status(code)}; see {report.name}"


def ended(command: list[str], file: IO[str], seconds: float) -> int:
    """Run a command into a file, and end it with all that it started after so many seconds; its exit status, 124 when it was ended."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return 124


def status(code: int) -> str:
    return f"exit status {code}{' (time was over)' if code == 124 else ''}"


def environment() -> dict[str, str]:
    paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path)
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": paths}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", choices=list(SHARES), help="these problems alone")
    parser.add_argument("--tools", nargs="+", default=list(TOOLS))
    parser.add_argument("--out", type=Path, default=ROOT / "out")
    parser.add_argument("--seconds", type=float, default=540, help="for everything together")
    given = parser.parse_args()
    if given.run:
        {"plain": run_plain, "hopper": run_hopper}[given.run]()
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    begin, binary, lines, failed = time.monotonic(), sanitizer(), list[str](), False
    for part, share in SHARES.items():
        left = lambda end=begin + share * given.seconds: end - time.monotonic()  # noqa: E731
        # Compiles everything once, so that the tools need not wait for it, and shows what does not run at all.
        report = given.out / f"sanitize-alone-{part}.txt"
        with report.open("w") as file:
            code = ended(alone(part), file, left())
        failed |= code != 0
        lines.append(f"alone, {part}: {status(code)}; {(report.read_text().splitlines() or [''])[-1]}")
        if code == 0 and binary is not None:
            lines += [check(tool, part, binary, given.out, left()) for tool in given.tools]
    lines += ["compute-sanitizer: absent"] if binary is None else []
    (given.out / "sanitize.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(failed or any("exit status 9" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
