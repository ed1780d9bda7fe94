"""The majority vote of `select`, where votes and shares are equal: by its rule, written out head by head."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from s2attn.selectors import select


def vote(mass: list[list[int]], top_k: int) -> list[bool]:
    """More than half of the heads keep it, or it is the first block of highest mean share; in exact arithmetic."""
    blocks = range(len(mass[0]))
    kept = [set(sorted(blocks, key=lambda j, row=row: (-row[j], j))[:top_k]) for row in mass]
    kept = [{j for j in one if row[j]} for one, row in zip(kept, mass, strict=True)]
    shares = [sum(Fraction(row[j], max(1, sum(row))) for row in mass) for j in blocks]
    best = max(blocks, key=lambda j: (shares[j], -j)) if any(shares) else None
    return [2 * sum(j in one for one in kept) > len(mass) or j == best for j in blocks]


def chosen(mass: list[list[int]], top_k: int) -> list[bool]:
    tensor = torch.tensor(mass, dtype=torch.float32)[None, :, None]
    return select(tensor, top_k=top_k, share="majority", kv_heads=1)[0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("mass", "expected"),
    [
        ([[4, 0, 0, 0], [0, 4, 0, 0]], "1000"),  # one vote each, equal shares: the first
        ([[0, 0, 0, 4], [0, 4, 0, 0]], "0100"),
        ([[3, 1, 0, 0], [0, 4, 0, 0]], "0100"),  # one vote each: half is no majority, the share decides
        ([[4, 0, 0, 0], [4, 0, 0, 0], [0, 0, 4, 0], [0, 0, 4, 0]], "1000"),  # two of four are no majority
        ([[0, 0, 4, 0], [0, 0, 4, 0], [4, 0, 0, 0], [0, 4, 0, 0]], "0010"),
        ([[4, 0, 0, 0], [4, 0, 0, 0], [4, 0, 0, 0], [0, 0, 4, 0]], "1000"),
        ([[4, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0]], "1000"),  # three ways
        ([[2, 3, 3, 0], [3, 2, 0, 3], [0, 3, 3, 2], [3, 0, 2, 3]], "1000"),  # a best block that few heads keep
        ([[0, 0, 0, 0], [0, 0, 0, 0]], "0000"),  # nothing to see, nothing kept
        ([[0, 0, 0, 0], [0, 0, 1, 0]], "0010"),
        ([[9, 0, 0, 0]], "1000"),
    ],
)
def test_ties(mass: list[list[int]], expected: str) -> None:
    assert vote(mass, 1) == [bit == "1" for bit in expected]
    assert chosen(mass, 1) == vote(mass, 1)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_small_masses_full_of_ties(heads: int, top_k: int) -> None:
    drawn = torch.randint(0, 3, (60, heads, 5))
    drawn[..., 4] = 4 - drawn[..., :4].sum(-1).clamp(max=4)  # shares of fours and less are exact in float32
    drawn = drawn[(drawn.sum(-1) == 4).all(-1) | (heads == 1)]
    assert len(drawn) > 0
    for mass in drawn.tolist():
        assert chosen(mass, top_k) == vote(mass, top_k), mass


def test_groups_vote_for_themselves() -> None:
    mass = torch.tensor([[4.0, 0], [4, 0], [0, 4], [0, 4]]).view(1, 4, 1, 2)

    def of(kv_heads: int) -> Tensor:
        return select(mass, top_k=1, share="majority", kv_heads=kv_heads)[0, :, 0]

    assert of(2).tolist() == [[True, False], [False, True]]
    assert of(1).tolist() == [[True, False]]
    assert of(4).tolist() == [[True, False], [True, False], [False, True], [False, True]]


def test_what_is_forced_for_half_of_the_heads_has_no_majority() -> None:
    mass = torch.tensor([[4.0, 0, 0], [4, 0, 0]]).view(1, 2, 1, 3)
    forced = torch.tensor([[False, True, False], [False, False, False]]).view(1, 2, 1, 3)
    kept = select(mass, top_k=2, forced=forced, share="majority", kv_heads=1)
    assert kept[0, 0, 0].tolist() == [True, False, False]
    both = select(mass, top_k=2, forced=torch.tensor([False, True, False]), share="majority", kv_heads=1)
    assert both[0, 0, 0].tolist() == [True, True, False]
