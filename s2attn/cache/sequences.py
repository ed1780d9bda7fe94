"""`Sequences`: what a cache knows about its sequences, which pages and tokens they have, changed as a whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from s2attn.cache.ledger import GONE, Ledger, undoing
from s2attn.core import bad_value


class Sequences:
    """The sequences of a `SparseCache`: a ledger of pages, and the tokens that steps brought."""

    ledger: Ledger
    texts: dict[int, list[int]]

    def open(self) -> int:
        """A new empty sequence; its number."""
        with self.whole():
            sequence = self.ledger.open()
            self.texts[sequence] = []
            return sequence

    def fork(self, sequence: int) -> int:
        """A new sequence with all tokens of another one, at no cost: pages are shared, and copied when one of the two writes to them."""
        with self.whole():
            twin = self.ledger.fork(sequence)
            self.texts[twin] = list(self.texts[sequence])
            return twin

    def free(self, sequence: int) -> None:
        """Forget a sequence and give its pages back."""
        with self.whole([sequence]):
            self.ledger.close(sequence)
            del self.texts[sequence]

    def checkpoint(self, sequences: Sequence[int], layer: int | None = None, *, opened: bool = True) -> Callable[[], None]:
        """Remember some sequences, in one layer or in all; calling the result makes them what they were: `Ledger.checkpoint`."""
        undo = self.ledger.checkpoint(sequences, layer, opened=opened)
        texts = [(sequence, self.texts[sequence], len(self.texts[sequence])) for sequence in sequences]

        def both() -> None:
            undo()
            for sequence, text, length in texts:
                del text[length:]
                self.texts[sequence] = text
            for sequence in self.texts.keys() - set(self.ledger.sequences):
                del self.texts[sequence]

        return both

    def whole(self, sequences: Sequence[int] = (), layer: int | None = None) -> undoing:
        """Undo what the block changes about these sequences, and free what it opens, when it raises anything at all."""
        return undoing(self.checkpoint(sequences, layer))

    def rollback(self, sequence: int, tokens: int) -> None:
        """Take the last tokens of a sequence back, in all layers, as if they had never come: drafts that were not accepted.

        Up to ``hold`` tokens, which every cache is made with, are always possible; more, as long as nothing has been given back that the
        shorter sequence reads. Pages that forks share stay as they are for the others.

        Raises:
            ValueError: more tokens than that. Nothing was changed.
        """
        self.ledger.check_rollback(sequence, tokens)
        with self.whole([sequence]):
            self.ledger.rollback(sequence, tokens)
            self.texts[sequence] = self.texts[sequence][: self.length(sequence)]

    def length(self, sequence: int, layer: int = 0) -> int:
        """Tokens of a sequence that a layer has been given."""
        return self.ledger.length(sequence, layer)

    def tokens(self, sequence: int) -> list[int]:
        """The tokens of a sequence, which :meth:`step` was given."""
        return list(self.text(sequence))

    def text(self, sequence: int) -> list[int]:
        """The list behind :meth:`tokens`; refused where a layer has been given other tokens."""
        lengths = {self.length(sequence, layer) for layer in range(len(self.ledger.needs))}
        text = self.texts[sequence]
        if lengths != {len(text)}:
            raise bad_value("sequence", "must have been filled by steps, which know its tokens", f"{sequence}, filled layer by layer")
        return text

    def trim(self, sequence: int, layer: int | None = None) -> None:
        """Give back the pages that no later query reads, of one layer or of all."""
        self.ledger.trim(sequence, layer)

    def table(self, sequences: Sequence[int], layer: int) -> np.ndarray:
        """Pages ``(B, G, max_pages)`` int32 of a layer, -1 where there is none."""
        width = max([1, *(-(-self.ledger.length(sequence, layer) // self.ledger.page_size) for sequence in sequences)])
        table = np.full((len(sequences), self.ledger.needs.shape[1], width), GONE, dtype=np.int32)
        for line, sequence in zip(table, sequences, strict=True):
            mine = self.ledger.table(sequence, layer)[:, :width]
            line[:, : mine.shape[1]] = mine
        return table
