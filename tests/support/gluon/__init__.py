"""Run Gluon kernels for Hopper on a CPU: their own source, with the rules of barriers, copies and products enforced.

Gluon has no interpreter, but its kernels are Python functions. `run_gluon` calls the same functions with other globals: tensors are NumPy
arrays with Triton's types and roundings, the partitions of ``gl.warp_specialize`` are threads, and

* an mbarrier counts arrivals and bytes and flips its phase; when nobody can go on, `ProtocolError` names who waits for what;
* a TMA copy makes its target no number at once and lands later; what lies beyond a descriptor is zero;
* an asynchronous product may read its operands at any time until it is waited for, and has no result before;
* partitions take turns, and copies land, in an order that the seed draws; for most seeds somebody is far behind.

Beyond wrong numbers it finds what hardware punishes only sometimes, in whatever order things happened to run, since every access to shared
memory is compared with the earlier ones (vector clocks that barriers hand on). `ProtocolError` is raised for

* a read of shared memory that was never written, is being written, or whose writer was not waited for; a wait that lets a product slip;
* a stage overwritten (by a copy or a store) while a product or another partition may still read it;
* an unfinished product that is used, a partition that ends with products or stores under way, a copy that nobody waited for;
* too many arrivals, barriers used before they are initialised, phases other than 0 and 1; waits that nothing will end;
* stores to shared memory that copies or products read with no ``fence_async_shared`` between;
* reads and writes outside of a tensor argument, two lanes of a store that write one element; boxes, addresses and strides that TMA refuses;
* a descriptor made anew in a loop while copies through the old one may be under way: it has one place in memory.

It proves meaning and protocol. Layouts, registers, shared memory in all and speed stay with the compiler (`tests.support.compiling`) and
the device; products are float32 sums, 16-bit numbers are rounded where the kernel rounds them. Names that it does not know raise
`ProtocolError` too: add them in ``language.py``.

>>> import torch
>>> from triton.experimental import gluon
>>> from triton.experimental.gluon import language as gl
>>> def double(x_ptr, n, SIZE: gl.constexpr):
...     lane = gl.program_id(0) * SIZE + gl.arange(0, SIZE)
...     gl.store(x_ptr + lane, gl.load(x_ptr + lane, mask=lane < n) * 2, mask=lane < n)
>>> x = torch.arange(5.0)
>>> run_gluon(gluon.jit(double), (2,), x, 5, SIZE=4)
>>> x.tolist()
[0.0, 2.0, 4.0, 6.0, 8.0]
"""

from __future__ import annotations

import random
from itertools import product
from typing import Any

from tests.support.gluon.program import Program, argument
from tests.support.gluon.values import ProtocolError

__all__ = ["ProtocolError", "run_gluon"]


def run_gluon(kernel: Any, grid: tuple[int, ...], *args: Any, seed: int = 0, **constants: Any) -> None:
    """Run every program of ``grid``, one after another, and write into the tensors among ``args`` as the kernel does.

    Args:
        kernel: what ``gluon.jit`` made.
        grid: programs along one to three axes.
        args: CPU tensors (they become pointers to their elements), numbers, host tensor descriptors; in the kernel's order.
        seed: of the order in which programs, partitions and copies take turns.
        constants: compile-time numbers, and other arguments by name. Compiler options (``num_warps``) are not for it.

    Raises:
        ProtocolError: the kernel broke a rule, in words that name the partition and the memory.
    """
    given = [argument(param.name, value, param.annotation_type) for param, value in zip(kernel.params, args, strict=False)]
    whole = (*grid, 1, 1)[:3]
    programs = list(product(*(range(n) for n in whole)))
    turn = random.Random(seed)
    turn.shuffle(programs)
    for ids in programs:
        Program(ids, whole, turn.randrange(2**31)).run(kernel, given, constants)
