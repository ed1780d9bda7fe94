"""Ranks compare what they call, so that a disagreement is an error on every rank, not a hang or a wrong result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from s2attn.core import bad_kind, bad_value
from s2attn.patterns import Pattern

T = TypeVar("T")
OWN = 2
"""Numbers of a row that may differ between ranks: their tokens of q and of k."""
WIDTH = OWN + 22
"""Numbers of a row: every function sends as many, so that calls of different functions meet."""
SHOWN = 160
"""Characters of a value that an error shows."""

_calls: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()
"""Comparisons of each group so far."""


def all_gather(whole: Tensor, part: Tensor, group: dist.ProcessGroup) -> None:
    """`torch.distributed.all_gather_into_tensor`, which torch 2.13 renamed."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, part, group=group)


@dataclass(frozen=True)
class Ranks:
    """A group of ranks and a function that all of them call.

    Attributes:
        compare: whether ranks compare their calls; alike on all ranks.
    """

    function: str
    group: dist.ProcessGroup
    device: torch.device
    compare: bool

    @classmethod
    def of(cls, function: str, group: Any, compare: Any, *tensors: Any) -> Ranks:
        """Check the group (the default group when None); the first tensor says on which device ranks compare.

        Raises:
            ValueError, TypeError: no process group, or no member of it; validate is not a bool.
        """
        if not dist.is_available() or not dist.is_initialized():
            rule = "must be a process group; call torch.distributed.init_process_group first"
            raise bad_value("group", rule, "no process group")
        group = dist.group.WORLD if group is None else group
        if not isinstance(group, dist.ProcessGroup):
            raise bad_kind("group", "must be a ProcessGroup or None", group)
        if dist.get_rank(group) < 0:
            raise bad_value("group", "must hold this rank", f"rank {dist.get_rank()}")
        if not isinstance(compare, bool):
            raise bad_kind("validate", "must be a bool", compare)
        found = next((tensor.device for tensor in tensors if isinstance(tensor, Tensor)), None)
        kind = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
        return cls(function, group, torch.device(kind) if found is None else found, compare)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    def checked(self, checks: Callable[[], T]) -> T:
        """Run this rank's checks; if they raise, tell the ranks that wait in :meth:`agree`, and raise."""
        try:
            return checks()
        except Exception as error:
            if self.compare:
                self._compare({}, (), error)
            raise

    def agree(self, fields: Mapping[str, object], own: Sequence[int] = ()) -> Agreed:
        """Compare the fields of a call with those of the other ranks: one all-gather of 192 bytes.

        Args:
            fields: what must be alike, by name; values are compared by their ``repr``, patterns by their JSON.
            own: at most two numbers that may differ.

        Raises:
            ValueError: on every rank, with the names and values of the fields that differ.
        """
        if not self.compare:
            return Agreed(self, 0, [])
        number = _calls.get(self.group, 0)
        return Agreed(self, number, self._compare(fields, own))

    def _compare(self, fields: Mapping[str, object], own: Sequence[int], error: Exception | None = None) -> list[list[int]]:
        if self.ranks == 1 or _capturing(self.device):
            return [list(own)]
        number = _calls.get(self.group, 0)
        _calls[self.group] = number + 1
        raised = "" if error is None else f"{type(error).__name__}: {error}"
        call = {"function": self.function, "raised": raised, "number of the call": number, **fields}
        texts = {name: _text(value) for name, value in call.items()}
        hashes = [_hash(text) for text in texts.values()]
        row = [*own, *[0] * (OWN - len(own)), *hashes]
        row += [0] * (WIDTH - len(row))
        everyone = torch.zeros(self.ranks * WIDTH, dtype=torch.int64, device=self.device)
        all_gather(everyone, torch.tensor(row, device=self.device), self.group)
        rows = everyone.view(self.ranks, WIDTH).tolist()
        if any(other[OWN:] != rows[0][OWN:] for other in rows):
            shown = {name: text[:SHOWN] for name, text in texts.items()}
            told: list[Any] = [None] * self.ranks
            dist.all_gather_object(told, (shown, hashes), group=self.group)
            if error is None:
                raise bad_value(self.function, "must be called alike on all ranks", _difference(told))
        return [other[: len(own)] for other in rows]


@dataclass(frozen=True)
class Agreed:
    """A call that all ranks make alike.

    Attributes:
        own: of each rank, the numbers that may differ.
    """

    ranks: Ranks
    number: int
    own: list[list[int]]

    def backward(self, part: str = "") -> None:
        """Compare, before anything of a backward is sent, which call it belongs to."""
        ranks = self.ranks
        name = " ".join(filter(None, ["the backward of", part and f"{part} of", ranks.function]))
        Ranks(name, ranks.group, ranks.device, ranks.compare).agree({"number of the forward call": self.number})


def _difference(told: list[tuple[dict[str, str], list[int]]]) -> str:
    """What differs, the same text on all ranks: an error, else the function, else every field."""
    names = list(told[0][0])
    if any(texts["raised"] for texts, _ in told):
        names = ["raised"]
    elif len({texts["function"] for texts, _ in told}) > 1:
        names = ["function"]
    parts = []
    for name in names:
        ranks_of: dict[tuple[int, str], list[int]] = {}
        for rank, (texts, hashes) in enumerate(told):
            at = list(texts).index(name)
            ranks_of.setdefault((hashes[at], texts[name]), []).append(rank)
        values = [
            f"{text} on {'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks[:8]))}"
            for (_, text), ranks in ranks_of.items()
            if text
        ]
        if len(ranks_of) > 1:
            parts.append(" and ".join(values) if name == "raised" else f"{name} {' and '.join(values)}")
    return "; ".join(parts)


def _text(value: object) -> str:
    if isinstance(value, Pattern):
        return _pattern_text(value)
    return value if isinstance(value, str) else repr(value)


@lru_cache(maxsize=256)
def _pattern_text(pattern: Pattern) -> str:
    return pattern.to_json()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _capturing(device: torch.device) -> bool:
    """Validation is skipped during CUDA graph capture, which no number can leave."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
