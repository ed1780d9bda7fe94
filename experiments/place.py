"""Where a run takes place: one device, or several processes that share a model's weights out among themselves (FSDP2)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from s2attn.core import bad_value

CPU = torch.device("cpu")
PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others before it gives up."""


@dataclass(frozen=True)
class Place:
    """A device, and which of how many processes this is.

    >>> Place().is_first
    True
    """

    device: torch.device = CPU
    rank: int = 0
    ranks: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def spread(self, model: nn.Module, parts: Iterable[nn.Module]) -> None:
        """Move a model, the same one in every process, to the device; with several processes shard its weights, part by part."""
        model.to(self.device)
        if self.ranks == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.ranks,))
        for part in parts:
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def total(self, *values: float) -> list[float]:
        """Each of the values, summed over all processes."""
        if self.ranks == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def gather(self, thing: Any) -> list[Any]:
        """A small object of each process, in the order of the ranks."""
        if self.ranks == 1:
            return [thing]
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, thing)
        return found

    def first_does(self, work: Callable[[], None]) -> None:
        """Let the first process work while the others wait; what it raises, all of them raise, so that none waits for ever.

        Raises:
            OSError: in the other processes, with the words of the first one's error.
        """
        error: Exception | None = None
        if self.is_first:
            try:
                work()
            except Exception as raised:
                error = raised
        told = self.gather(None if error is None else f"{type(error).__name__}: {error}")[0]
        if error is not None:
            raise error
        if told is not None:
            raise OSError(f"the first process failed: {told}")


ALONE = Place()


@contextmanager
def place_of(device: str = "auto") -> Iterator[Place]:
    """The place that ``device`` and torchrun's environment variables name; groups of processes end with the block.

    Args:
        device: "cpu", "cuda", or "auto": a graphics card where there is one.

    Raises:
        ValueError: no such device here.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise bad_value("run.device", "must be auto, cpu or cuda", repr(device))
    if device == "cuda" and not torch.cuda.is_available():
        raise bad_value("run.device", "must be a device of this machine; torch sees no CUDA device", repr(device))
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        torch.cuda.set_device(local)
    here = torch.device(kind, local) if kind == "cuda" else CPU
    if ranks == 1:
        yield Place(here)
        return
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Place(here, dist.get_rank(), ranks)
    finally:
        dist.destroy_process_group()
