"""`Blocks`: bools and nothing else, and a mask for each group of consecutive heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from s2attn import Blocks, attention, build_layout
from s2attn.patterns import Head
from s2attn.testing.masks import dense_mask

TRIANGLE = [[True, False], [True, True]]
EXPECTED = Blocks(["10", "11"])


@pytest.mark.parametrize(
    "mask",
    [
        TRIANGLE,
        tuple(map(tuple, TRIANGLE)),
        [TRIANGLE],
        np.array(TRIANGLE),
        torch.tensor(TRIANGLE),
        [np.array(row) for row in TRIANGLE],
        [torch.tensor(TRIANGLE)],
        [[np.True_, np.False_], [np.True_, np.True_]],
        ["10", "11"],
        [["10", "11"]],
        torch.tensor([[0.0, -torch.inf], [0.0, 0.0]]) == 0,
    ],
)
def test_bools_in_any_container(mask: Any) -> None:
    assert Blocks(mask) == EXPECTED


ADDITIVE = [[0.0, -np.inf], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("mask", "came"),
    [
        (torch.tensor(ADDITIVE), "an array of float32"),
        (np.array(ADDITIVE), "an array of float64"),
        (np.array(ADDITIVE, dtype=object), "an array of object"),
        (torch.tensor(ADDITIVE, dtype=torch.bfloat16), "an array of bfloat16"),
        (ADDITIVE, "0.0"),
        ([[float("nan")]], "nan"),
        ([[True, float("nan")]], "nan"),
        (torch.tensor([[1, 0], [1, 1]]), "an array of int64"),
        (
            np.array([[0, -1], [0, 1]], dtype=np.int32),
            "an array of int32",
        ),  # a table of indices, padded with -1
        ([[1, 0], [1, 1]], "1"),
        ([[[True], [0]]], "0"),
        ([[None]], "None"),
        ([torch.tensor([True]), torch.tensor([1])], "an array of int64"),
        (np.array([["10"]]), "an array of "),
    ],
)
def test_numbers_are_refused_with_what_to_do(mask: Any, came: str) -> None:
    with pytest.raises(
        TypeError,
        match=f"Blocks mask must hold bools, True where a block is seen .*mask == 0 .*; got {came}",
    ):
        Blocks(mask)


@pytest.mark.parametrize(
    "mask",
    [
        *([], [[]], [[[]]], [[], []], "", "10", 3, None, [True, False], [[[[True]]]]),
        *(np.zeros((0, 2), bool), np.zeros((1, 1, 1, 1), bool), np.array(True)),
        *(
            [[True, False], [True]],
            [[[True]], [[True], [True]]],
            [["10"], ["1"]],
            [TRIANGLE, [True]],
        ),
    ],
    ids=lambda mask: repr(mask).replace("\n", ""),
)
def test_other_shapes_are_refused(mask: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"Blocks mask must (be a non-empty|hold bools)"):
        Blocks(mask)


@pytest.mark.parametrize("masks", [1, 2, 4, 8])
@pytest.mark.parametrize("heads", ["kv", "query"])
def test_each_mask_serves_consecutive_heads(masks: int, heads: str) -> None:
    torch.manual_seed(0)
    given = torch.rand(masks, 4, 4) > 0.5
    pattern, total = Blocks(given, block=16, heads=heads), 8
    blocks = torch.arange(64) // 16
    seen = given[:, blocks][:, :, blocks].repeat_interleave(total // masks, dim=0) & torch.ones(64, 64, dtype=torch.bool).tril()
    num_kv_heads = total if heads == "kv" else 2
    assert torch.equal(dense_mask(pattern, total, num_kv_heads, 64, 64), seen)
    assert build_layout(pattern, total, num_kv_heads, 64, block=16).heads in (2, 8)
    q, k, v = (
        torch.randn(1, 64, total, 8),
        torch.randn(1, 64, num_kv_heads, 8),
        torch.randn(1, 64, num_kv_heads, 8),
    )
    many = (x.repeat_interleave(total // num_kv_heads, dim=2).transpose(1, 2).double() for x in (k, v))
    bias = torch.where(seen, 0.0, -torch.inf).double()
    k_all, v_all = many
    scores = q.transpose(1, 2).double() @ k_all.transpose(2, 3) * 8**-0.5 + bias
    expected = (scores.softmax(-1).nan_to_num(0.0) @ v_all).transpose(1, 2)
    torch.testing.assert_close(attention(q, k, v, pattern).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("masks", "total"), [(3, 8), (8, 4), (2, 3)])
def test_masks_that_do_not_divide_the_heads_are_refused(masks: int, total: int) -> None:
    pattern = Blocks(np.ones((masks, 2, 2), bool))
    with pytest.raises(
        ValueError,
        match=rf"Blocks mask must hold masks whose number divides the kv heads of the call \({total}\); got {masks} masks",
    ):
        pattern.at(Head(0, total, total))
