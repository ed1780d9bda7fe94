"""Small problems of every kernel under NVIDIA's compute-sanitizer: memory that is not theirs (memcheck), races (racecheck).

python tests/gpu/sanitize.py                  both checks; reports into the output folder
python tests/gpu/sanitize.py --run            the problems alone, without a GPU in Triton's interpreter
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
TOOLS = ("memcheck", "racecheck")
# Without a cache every tensor is an allocation of its own, and a read beyond its end is seen.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}


def problems(on_gpu: bool) -> Iterator[tuple[str, object]]:
    """Every block size, ragged packed lengths, a short last block, lists in pieces and whole, an odd width, soft-cap and sinks."""
    import torch

    from s2attn import Global, Local, Sink, Window, build_layout
    from s2attn.testing.problems import make_problem

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


def run() -> None:
    """The problems, float16, forward and backward; pieces of 32 tokens, so that the joining kernels have work."""
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from s2attn.backends.triton import Triton, walk
    from s2attn.testing import problems as testing

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
        cut += sum(way.slots for way in backend._prepared[given.layout].ways.values())
        print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)
    run_paged(torch.device("cuda" if on_gpu else "cpu"), 64 if on_gpu else 16)
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


def sanitizer() -> str | None:
    """Where compute-sanitizer is, or None."""
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))


def check(tool: str, binary: str, out: Path, seconds: float) -> str:
    """One tool over all problems; a line that says what it found. Its report lies in the output folder."""
    report = out / f"sanitize-{tool}.txt"
    command = [binary, "--tool", tool, "--target-processes", "application-only", "--print-limit", "50", "--error-exitcode", "9"]
    command += [sys.executable, str(Path(__file__).resolve()), "--run"]
    with report.open("w") as file:
        try:
            code = subprocess.run(command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            code = 124
    text = report.read_text()
    summary = re.findall(r"ERROR SUMMARY: (.*)|RACECHECK SUMMARY: (.*)", text)
    said = "".join(summary[-1]) if summary else "no summary"
    finished = len(re.findall(r"(?m)^(?:block|batch|paged).*: [\d.]+ s$", text))
    return f"{tool}: {said}; {finished} problems; exit status {code}{' (time was over)' if code == 124 else ''}; see {report.name}"


def environment() -> dict[str, str]:
    paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path)
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": paths}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="the problems alone")
    parser.add_argument("--tools", nargs="+", default=list(TOOLS))
    parser.add_argument("--out", type=Path, default=ROOT / "out")
    parser.add_argument("--seconds", type=float, default=540, help="for everything together")
    given = parser.parse_args()
    if given.run:
        run()
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    end, binary = time.monotonic() + given.seconds, sanitizer()
    # Compiles everything once, so that the tools need not wait for it, and shows what does not run at all.
    alone = [sys.executable, str(Path(__file__).resolve()), "--run"]
    done = subprocess.run(alone, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    lines = [f"alone: exit status {done.returncode}; {(done.stdout.splitlines() or done.stderr.splitlines() or [''])[-1]}"]
    if binary is None:
        lines.append("compute-sanitizer: absent")
    elif done.returncode == 0:
        lines += [check(tool, binary, given.out, max(end - time.monotonic(), 1)) for tool in given.tools]
    (given.out / "sanitize.txt").write_text("\n".join([*lines, done.stderr[-3000:]]) + "\n")
    print("\n".join(lines))
    return int(done.returncode != 0 or any("exit status 9" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
