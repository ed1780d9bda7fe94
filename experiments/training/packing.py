"""Documents packed into rows of equal length, none of which sees anything of another."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from experiments.data import Batch, generator_of
from experiments.place import ALONE, Place
from experiments.training.tokens import END, Tokens
from s2attn.core import bad_value, check_int


@dataclass(frozen=True)
class Rows:
    """How rows are cut.

    Attributes:
        batch: rows of a step, over all processes.
        context: tokens of a row.
        windows: rows to judge on.
        packed: documents in a row are apart; otherwise a row is one text, and only `END` marks where the next one begins.
    """

    batch: int
    context: int
    windows: int = 12
    seed: int = 0
    packed: bool = True


@dataclass(eq=False)
class Packed:
    """The feed of a run: in every epoch all documents in another order, one behind the other, cut into rows.

    What a step reads follows from the seed and its number alone, so that a run can go on anywhere. A document that does not fit goes on
    in the next row, where it sees nothing of its beginning. Each process gets its share of the rows.

    Raises:
        ValueError: rows longer than the training or the validation text.
    """

    tokens: Tokens
    unseen: Tokens
    rows: Rows
    place: Place = ALONE
    _epoch: tuple[int, Tensor, Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for name, part in (("training", self.tokens), ("validation", self.unseen)):
            if part.total < self.rows.context:
                rule = f"must not be above the tokens of the {name} text ({part.total})"
                hint = "; a larger data.percent may help" if name == "validation" else ""
                raise bad_value("train.context", rule + hint, self.rows.context)

    @property
    def rows_per_epoch(self) -> int:
        return self.tokens.total // self.rows.context

    def train(self, step: int) -> Batch:
        """The rows of this process in a step."""
        check_int("step", step, 0)
        share = self.rows.batch // self.place.ranks
        first = step * self.rows.batch + self.place.rank * share
        return self._batch([self._row(first + i) for i in range(share)])

    def validation(self) -> list[Batch]:
        """Evenly spaced rows of what was kept back, in the order of the files; the same in every process."""
        order = torch.arange(self.unseen.starts.numel() - 1)
        last = self.unseen.total - self.rows.context
        offsets = torch.linspace(0, last, min(self.rows.windows, last + 1)).long().tolist()
        return [self._batch([cut(self.unseen, order, self.unseen.starts, offset, self.rows.context)]) for offset in offsets]

    def _row(self, number: int) -> Tensor:
        epoch, row = divmod(number, self.rows_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            lengths = self.tokens.starts.diff()
            order = torch.randperm(lengths.numel(), generator=generator_of(self.rows.seed, epoch))
            self._epoch = (epoch, order, torch.cat((torch.zeros(1, dtype=torch.int64), lengths[order].cumsum(0))))
        _, order, starts = self._epoch
        return cut(self.tokens, order, starts, row * self.rows.context, self.rows.context)

    def _batch(self, rows: list[Tensor]) -> Batch:
        whole = torch.stack(rows).long()
        inputs, targets = whole[:, :-1].contiguous(), whole[:, 1:].contiguous()
        return Batch(inputs, targets, document_starts(inputs) if self.rows.packed else None)


def cut(tokens: Tokens, order: Tensor, starts: Tensor, offset: int, context: int) -> Tensor:
    """``context + 1`` tokens from ``offset`` on of the documents in this order; behind the last one stands `END`.

    Args:
        order: int64 ``(documents,)``.
        starts: int64 ``(documents + 1,)``, where documents begin in this order, and the total.
    """
    place = torch.arange(offset, offset + context + 1)
    inside = place.clamp(max=tokens.total - 1)
    which = torch.searchsorted(starts, inside, right=True) - 1
    found = tokens.flat[tokens.starts[order[which]] + inside - starts[which]]
    return found.where(place < tokens.total, END)


def document_starts(inputs: Tensor) -> Tensor:
    """Cumulative lengths, int32, of the documents in rows ``(B, T)``: they begin at each row's beginning, and wherever `END` stands.

    >>> document_starts(torch.tensor([[5, 0, 6, 7], [0, 8, 9, 9]])).tolist()
    [0, 1, 4, 8]
    """
    begins = inputs == END
    begins[:, 0] = True
    total = torch.tensor([inputs.numel()], dtype=torch.int32)
    return torch.cat((begins.flatten().nonzero().flatten().int(), total))
