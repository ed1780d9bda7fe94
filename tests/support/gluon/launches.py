"""Launches of the Hopper kernels on a CPU: all that a launch on a GPU does, and the runner in the place of the start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from s2attn.backends.triton import Triton, hopper, hopper_backward, ways
from s2attn.backends.triton.backend import find_tiles
from s2attn.backends.triton.start import Call, Starts
from s2attn.backends.triton.table import Situation
from s2attn.backends.triton.tiles import Tiles
from tests.support.gluon import run_gluon


@contextmanager
def hopper_on_cpu(
    *, seed: int = 0, programs: int = 2, faulty: Any = None, of_dq: dict[str, int] | None = None, of_dkv: dict[str, int] | None = None,
    **form: int,
) -> Iterator[Triton]:  # fmt: skip
    """A backend whose kernels are Hopper's wherever there is one that can serve, started by `run_gluon`; the others are plain.

    Args:
        seed: of the order in which everything happens.
        programs: as many as the GPU would have multiprocessors.
        faulty: a kernel to run in the place of the one that is launched.
        form: numbers of the form (`s2attn.backends.triton.hopper.HopperForm`) that replace the chosen ones; ``of_dq`` and ``of_dkv`` for
            the forms of the backward kernels.
    """
    chosen = [
        ("choose_hopper_form", hopper.choose_hopper_form, form),
        ("choose_dq_form", hopper_backward.choose_dq_form, of_dq or {}),
        ("choose_column_form", hopper_backward.choose_column_form, of_dkv or {}),
    ]

    def changed(choose: Callable[..., Any], numbers: dict[str, int]) -> Callable[..., Any]:
        return lambda *given: replace(choose(*given), **numbers)

    def tiles(wanted: Situation, device: torch.device, capped: bool) -> Tiles:
        return replace(find_tiles(wanted, device, capped), form="hopper")

    def start(kernel: Any, pointers: tuple[Tensor, ...], starts: Starts, key: tuple, describe: Callable[[], Call]) -> None:
        call = describe()
        constants = {name: value for name, value in call.constants.items() if name in kernel.arg_names}
        run_gluon(faulty or kernel, call.grid, *pointers, *call.rest, seed=seed, **constants)

    with ExitStack() as stack:
        stack.enter_context(patch.object(ways, "can_take", lambda *given: True))
        for name, choose, numbers in chosen:
            stack.enter_context(patch.object(ways, name, changed(choose, numbers)))
        for room in (hopper, hopper_backward):
            stack.enter_context(patch.object(room, "programs_of", lambda index: programs))
            stack.enter_context(patch.object(room, "start", start))
        yield Triton(tiles)
