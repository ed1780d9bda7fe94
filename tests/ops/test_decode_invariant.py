"""``batch_invariant=True``: a sequence's bits depend on that sequence alone, on every backend."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import s2attn
from s2attn import Dense, Local, Pattern, Sink, Stride, Window
from s2attn.backends import Pages, backend_names, get_backend
from s2attn.ops import paged

# The interpreter turns arrays of one element into scalars, which NumPy announces to refuse one day.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

S2 = Local(2, 16) | Stride(3, block=16)
HEADS, KV_HEADS, PAGE, WIDTH = 4, 2, 16, 16


def decoding() -> list[str]:
    """The backends that decode on this machine."""
    pages = torch.zeros(1, PAGE, KV_HEADS, WIDTH)
    given = torch.zeros(1, 1, HEADS, WIDTH), Pages(pages, pages, torch.zeros(1, 1, 1, dtype=torch.int32))
    return [name for name in backend_names() if not get_backend(name).paged_objections(*given)]


class Batch:
    """Sequences of (new, all) tokens in pages of their own."""

    def __init__(self, lengths: list[tuple[int, int]]):
        self.lengths = lengths
        self.q = [torch.randn(new, HEADS, WIDTH) for new, _ in lengths]
        self.pages = -(-max(tokens for _, tokens in lengths) // PAGE)
        self.k_pages, self.v_pages = torch.randn(2, self.pages * len(lengths), PAGE, KV_HEADS, WIDTH)
        self.table = torch.arange(self.pages * len(lengths)).view(len(lengths), -1)

    def run(self, some: list[int], pattern: Pattern, backend: str) -> list[tuple[Tensor, Tensor]]:
        """Results of some of the sequences, decoded together over a table as wide as they need."""
        cu = torch.tensor([0, *(len(self.q[i]) for i in some)]).cumsum(0)
        tokens = torch.tensor([self.lengths[i][1] for i in some])
        table = self.table[some, : -(-int(tokens.max()) // PAGE)]
        where: dict[str, Any] = {"block_table": table, "seq_lens": tokens, "cu_seqlens_q": cu, "backend": backend}
        q = torch.cat([self.q[i] for i in some])
        out, lse = s2attn.decode(q, self.k_pages, self.v_pages, pattern, **where, return_lse=True, batch_invariant=True)
        return [(out[low:high], lse[:, low:high]) for low, high in pairwise(cu.tolist())]


MANY = [(1, 1000), (40, 900), (16, 700), (17, 600), (4, 700), (0, 20), (1, 1), (48, 48)]
FEW = [(1, 70), (18, 40), (3, 20)]
"""The interpreter takes its time."""


@pytest.mark.parametrize("backend", decoding())
@pytest.mark.parametrize("pattern", [S2, Dense(), Window(300) | Sink(4)], ids=["S2", "dense", "window"])
def test_bits_depend_on_the_sequence_alone(backend: str, pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, chunks and single tokens in one batch, on both sides of every bound on lengths."""
    monkeypatch.setattr(paged, "LONGEST_BY_POSITION", 800)
    batch = Batch(FEW if backend == "triton" else MANY)
    everybody = list(range(len(batch.lengths)))
    together = batch.run(everybody, pattern, backend)
    groups = [[0], [1], [2, 0]] if backend == "triton" else [[0], [1], [4], [0, 2], [3, 4], [6, 5, 0], [7, 4, 0], everybody[::-1]]
    for some in groups:
        for number, (out, lse) in zip(some, batch.run(some, pattern, backend), strict=True):
            assert torch.equal(out, together[number][0]) and torch.equal(lse, together[number][1]), (some, number)


def test_tiles_do_not_follow_from_the_width_of_the_table() -> None:
    """A wider table has a longer and so sparser layout: another row of the tuned table."""
    pytest.importorskip("triton", reason="triton is not installed")
    from s2attn.backends import Requests, Scoring
    from s2attn.backends.triton.backend import Triton, find_tiles
    from s2attn.ops.paged import layout_by_position
    from s2attn.ops.source import pattern_text

    asked: list[str] = []
    backend = Triton(lambda situation, *rest: asked.append(situation.density) or find_tiles(situation, *rest))
    text = pattern_text(Window(30), None, True, 0, None)
    for invariant in (True, False):
        for width in (1, 256):
            pages = Pages(*torch.zeros(2, 4, PAGE, KV_HEADS, WIDTH), torch.zeros(1, 1, width, dtype=torch.int32))
            layout = layout_by_position(text, 16, width * PAGE, HEADS, KV_HEADS, torch.device("cpu"))
            requests = Requests(torch.tensor([9]), None, batch_invariant=invariant)
            backend.forward_paged(torch.zeros(1, 1, HEADS, WIDTH), pages, requests, layout, Scoring(0.25))
    assert asked[0] == asked[1] and asked[2] != asked[3]
