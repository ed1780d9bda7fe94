"""The kernel that writes into pages, in Triton's interpreter: the same bytes as the torch backend writes, slots of any kind."""

from __future__ import annotations

import pytest
import torch

import s2attn

# The interpreter turns arrays of one element into scalars, which NumPy announces to refuse one day.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.usefixtures("triton_backend"),
]


def both(k, v, pools, slots, **call):
    """Pages after the same call by both backends; memory before and after the pages must stay."""
    found = []
    for backend in ("triton", "torch"):
        whole = [torch.zeros(len(x) + 2, *x.shape[1:], dtype=x.dtype) for x in pools]
        for guarded, pool in zip(whole, pools, strict=True):
            guarded[1:-1] = pool
        inside = [x[1:-1] for x in whole]
        s2attn.store_kv(k, v, *inside, slots, backend=backend, **call)
        assert all(not x[0].view(torch.uint8).any() and not x[-1].view(torch.uint8).any() for x in whole)
        found.append([x.view(torch.uint8) for x in inside])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    return found[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads_first", [False, True])
def test_tokens_land_in_their_slots(dtype, heads_first):
    shape = (5, 2, 16) if heads_first else (5, 16, 2)
    pools = [torch.zeros(*shape, width, dtype=dtype) for width in (8, 24)]
    if heads_first:
        pools = [x.transpose(1, 2) for x in pools]
    k, v = torch.randn(2, 3, 2, 8).to(dtype), torch.randn(2, 24, 3, 2).to(dtype).permute(0, 2, 3, 1)  # strides of all kinds
    written = both(k, v, pools, torch.tensor([[3, -1, 79], [16, -5, 0]], dtype=torch.int32))
    assert int(written[0].ne(0).any(-1).any(-1).sum()) == 4


def test_slots_that_are_not_there_are_left_out():
    pools = [torch.zeros(3, 16, 1, 8), torch.zeros(3, 16, 1, 8)]
    slots = torch.tensor([48, -1, 47, 2**40, -(2**62), 2**62, 5])
    written = both(*torch.randn(2, 7, 1, 8), pools, slots, validate=False)
    assert int(written[0].ne(0).any(-1).any(-1).sum()) == 2
    with pytest.raises(ValueError, match="slot_mapping must name slots below 48"):
        s2attn.store_kv(*torch.randn(2, 7, 1, 8), *pools, slots, backend="triton")


def test_float8_rounds_as_torch_does():
    """Every number that float8 has, the middles between them and their neighbours, what is too large and what is none; and with a scale."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    positive = every[:127]
    middle = (positive[1:] + positive[:-1]) / 2
    near = [torch.nextafter(middle, torch.tensor(limit)) for limit in (0.0, 1e9)]
    odd = torch.tensor([449.0, 1e6, torch.inf, 1e-10, -0.0])
    numbers = torch.cat([positive, middle, *near, odd])
    numbers = torch.nn.functional.pad(torch.cat([numbers, -numbers]), (0, 2 * 520 - 2 * len(numbers)))
    k, pool = numbers.view(2, 1, 520), torch.zeros(1, 16, 1, 520, dtype=torch.float8_e4m3fn)
    both(k, k, [pool, pool.clone()], torch.tensor([3, 9]))
    k, pool = torch.randn(4, 3, 8) * 200, torch.zeros(1, 16, 3, 8, dtype=torch.float8_e4m3fn)
    both(k, k, [pool, pool.clone()], torch.arange(4), k_scale=torch.tensor([0.3, 1.0, 7.0]))
    nan = torch.full((1, 1, 16), torch.nan)
    pool = torch.zeros(1, 16, 1, 16, dtype=torch.float8_e4m3fn)
    s2attn.store_kv(nan, -nan, pool, pool.clone(), torch.tensor([0]), backend="triton")
    assert pool[0, 0, 0].float().isnan().all()
