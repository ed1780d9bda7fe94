"""Rows of more keys than a backend takes in one step: rescaling, masks, cuts, and empty states."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from s2attn import Dense
from s2attn.backends import Backend
from s2attn.layout import Layout, build_layout
from s2attn.layout.blocks import from_blocks
from s2attn.testing import dense_mask
from s2attn.testing.problems import Problem, check_backend, make_problem

# The interpreter turns arrays of one element into scalars, which NumPy announces to refuse one day.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


def from_mask(mask: torch.Tensor, **more: torch.Tensor) -> Problem:
    return make_problem(Layout.from_dense(mask, block=64), mask, heads=1, kv_heads=1, width=16, **more)


@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("order", ["growing", "falling"])
def test_the_maximum_changes_from_step_to_step(backend: Backend, order: str, with_sinks: bool) -> None:
    """What was summed under an old maximum is scaled to the new one, in every step."""
    seqlen_k = 2500
    mask = torch.ones(1, 3, seqlen_k, dtype=torch.bool)
    mask[0, 1, 1::2] = False
    p = from_mask(mask, sinks=torch.tensor([2.0])) if with_sinks else from_mask(mask)
    rise = torch.linspace(0, 1, seqlen_k).double()
    rise = rise if order == "growing" else rise.flip(0)
    # Logits rise by about 3 over the keys: early keys keep a weight that a wrong factor would change.
    k = torch.cat([rise[:, None] * 12.0, 0.3 * p.k[0, :, 0, 1:]], dim=1)[None, :, None]
    check_backend(backend, replace(p, q=torch.cat([torch.ones_like(p.q[..., :1]), p.q[..., 1:]], -1), k=k))


def test_masks_differ_from_step_to_step(backend: Backend) -> None:
    """Every block of long rows is partial, and no two of their masks are equal."""
    mask = torch.rand(1, 20, 1500) < 0.5
    check_backend(backend, from_mask(mask))


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("more", [-2, -1, 0, 1])
def test_the_causal_cut_at_every_place_of_a_block(backend: Backend, block: int, more: int) -> None:
    """Queries that begin just before, at and just after a block of keys."""
    seqlen_q, seqlen_k = 2 * block + 3, 3 * block + 3 + more
    chosen = torch.ones(1, -(-seqlen_q // block), -(-seqlen_k // block), dtype=torch.bool)
    layouts = {
        "built": build_layout(Dense(), 1, 1, seqlen_q, seqlen_k, block=block),
        "chosen": from_blocks([chosen], [(seqlen_q, seqlen_k)], block=block),
    }
    mask = dense_mask(Dense(), 1, 1, seqlen_q, seqlen_k)
    for layout in layouts.values():
        check_backend(backend, make_problem(layout, mask, heads=1, kv_heads=1, width=16))


@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
def test_empty_states_merge_with_others(backend: Backend, with_sinks: bool) -> None:
    """Lists that are cut into splits of which a row sees only the first, only the last, or none."""
    mask = torch.zeros(1, 5, 3000, dtype=torch.bool)
    mask[0, 0, :70], mask[0, 1, -70:], mask[0, 3], mask[0, 4, 1500] = True, True, True, True
    check_backend(backend, from_mask(mask, sinks=torch.tensor([0.5])) if with_sinks else from_mask(mask))
