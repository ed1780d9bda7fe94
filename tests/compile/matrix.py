"""Every configuration that a launch can choose, compiled for GPUs that are not there; run by hand, or by `make compile-matrix`.

One line of JSON per compiled kernel, and a table last. `test_compile.py` runs a part of it, one representative of each kind.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from s2attn.backends.triton.tiles import SHARED_MEMORY, Tiles, choose_tiles, next_power

LARGE = ("forward", "dq", "dkv")
WIDTHS = (16, 32, 48, 64, 80, 128, 160, 256)
"""Every power of two that holds a width, filled and not."""
BLOCKS = (16, 32, 64, 128, 256)
STRICT = ("sm_80", "sm_90", "sm_100")
"""Where nothing may spill at widths 64 and 128: at block 64 plain and with a soft-cap, at others plain."""
ALIKE = ("sm_86", "sm_89", "sm_120")
"""The same tiles and the same kind of products: their representatives are dealt out."""


@dataclass(frozen=True)
class Job:
    """One kernel for one target."""

    op: str
    target: str
    dtype: str
    dim: int
    dim_v: int
    block: int
    capped: bool = False
    sinks: bool = False

    @property
    def tiles(self) -> Tiles:
        """What a launch would choose; ValueError where it refuses."""
        size = 4 if self.dtype == "fp32" else 2
        return choose_tiles(self.op, self.dim, self.dim_v, size, self.block, SHARED_MEMORY[self.target], self.capped)

    @property
    def kind(self) -> tuple:
        """All that the compiler sees, but for widths and blocks that differ in their numbers only."""
        tiles, widths = self.tiles, (next_power(self.dim), next_power(self.dim_v))
        shape = (tiles.factor(self.block), tiles.per_block(self.block), self.block >= tiles.listed_tokens)
        filled = (self.dim == widths[0], self.dim_v == widths[1])
        return self.op, self.target, self.dtype, tiles, shape, widths, filled, self.capped, self.sinks


def half(target: str) -> str:
    """The 16-bit type that a target has."""
    return "fp16" if target == "sm_75" else "bf16"


def everything(target: str) -> list[Job]:
    """The first job of every kind, and what joins cut lists."""
    jobs: dict[tuple, Job] = {}
    widths = [*((width, width) for width in WIDTHS), (64, 128), (192, 128)]
    for op, dtype, (dim, dim_v), block in itertools.product(LARGE, (half(target), "fp32"), widths, BLOCKS):
        for capped, sinks in ((False, False), (True, op == "forward")):
            job = Job(op, target, dtype, dim, dim_v, block, capped, sinks)
            try:
                jobs.setdefault(job.kind, job)
            except ValueError:  # a tile that does not fit; the backend objects to such a call
                continue
    return [*jobs.values(), *joins(target, (64, 80, 128, 256))]


def one_each(target: str) -> list[Job]:
    """The first of those jobs for every choice of tiles: with and without a soft-cap, in every type."""
    jobs: dict[tuple, Job] = {}
    for job in everything(target):
        tiles = job.tiles if job.op in LARGE else None
        shape = None if tiles is None else (tiles, tiles.factor(job.block), tiles.per_block(job.block))
        jobs.setdefault((job.op, job.dtype, job.capped, job.sinks, shape), job)
    return list(jobs.values())


def joins(target: str, widths: tuple[int, ...]) -> list[Job]:
    """What surrounds the large kernels: pieces joined with and without sinks, gradients summed, delta."""
    kinds = [(op, block, sinks) for block in (16, 256) for op, sinks in (("merge", False), ("merge", True), ("sum", False))]
    small = [Job(op, target, half(target), width, width, block, sinks=sinks) for width in widths for op, block, sinks in kinds]
    return [*small, *(Job("delta", target, half(target), width, width, 64) for width in widths)]


def representatives(target: str) -> list[Job]:
    """A part that compiles in seconds: tiles chosen at widths 64 and 128 for block 64, wide and odd widths, and the joins."""
    widths = (64,) if target == "sm_75" else (64, 128)  # there products are single multiplications, and compile slowly
    common = [Job(op, target, half(target), dim, dim, 64, capped) for op in LARGE for dim in widths for capped in (False, True)]
    if target not in STRICT:
        common = list({(job.op, job.tiles): job for job in reversed(common)}.values())
        common = common[ALIKE.index(target) :: len(ALIKE)] if target in ALIKE else common
        return [*common, *joins(target, (80,))[::2]]
    more = {
        "sm_80": [Job("forward", target, "bf16", 80, 80, 16, True, True), Job("dkv", target, "fp16", 256, 256, 128)],
        "sm_90": [
            *(Job(op, target, "bf16", 128, 128, 16) for op in LARGE),
            Job("dq", target, "bf16", 128, 128, 256),
            Job("forward", target, "fp32", 64, 64, 32),
        ],
    }
    return [*common, *more.get(target, []), *joins(target, (64,))[::2]]


def facts(job: Job) -> dict[str, Any]:
    """What the compiler said, or its error."""
    from tests.support.compiling import compile_kernel

    start = time.perf_counter()
    limit = SHARED_MEMORY[job.target]
    row: dict[str, Any] = {**asdict(job), "limit": limit}
    try:
        made = compile_kernel(job.op, job.target, job.dtype, job.dim, job.block, limit, job.dim_v, capped=job.capped, sinks=job.sinks)
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {error}"[-1000:]}
    said = {"registers": made.registers, "spills": made.spill_bytes, "shared": made.shared_bytes, "wgmma": made.wgmma}
    if job.op in LARGE:
        row["tiles"] = asdict(job.tiles)
    return {**row, **said, "products": made.matrix_products, "seconds": round(time.perf_counter() - start, 2)}


def compiled(jobs: list[Job], workers: int) -> Iterator[dict[str, Any]]:
    if workers == 1:
        yield from map(facts, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(facts, jobs)


def table(rows: list[dict[str, Any]]) -> str:
    """One line per target."""
    lines = ["target   kernels  failed  over the limit  with spills  most shared / limit"]
    for target in dict.fromkeys(row["target"] for row in rows):
        mine = [row for row in rows if row["target"] == target]
        made = [row for row in mine if "error" not in row]
        over, spilled = sum(row["shared"] > row["limit"] for row in made), sum(row["spills"] > 0 for row in made)
        most = max((row["shared"] for row in made), default=0)
        lines.append(f"{target:8} {len(mine):7}  {len(mine) - len(made):6}  {over:14}  {spilled:11}  {most} / {SHARED_MEMORY[target]}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(SHARED_MEMORY), help="sm_90, gfx942, ...; all of them by default")
    parser.add_argument("--representatives", action="store_true", help="the part that the tests take")
    parser.add_argument("--one-each", action="store_true", help="one kernel for each choice of tiles")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the lines there too, each as soon as it is known")
    given = parser.parse_args()
    if given.out:
        given.out.unlink(missing_ok=True)
    choose = representatives if given.representatives else one_each if given.one_each else everything
    rows = []
    for row in compiled([job for target in given.targets for job in choose(target)], given.workers):
        rows.append(row)
        line = json.dumps(row)
        print(line, flush=True)
        if given.out:
            with given.out.open("a") as file:
                file.write(line + "\n")
    print(table(rows), file=sys.stderr)
    return int(any("error" in row or row["shared"] > row["limit"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
