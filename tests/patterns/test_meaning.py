"""Each pattern against its definition in the literature, written out here a second time."""

from __future__ import annotations

import numpy as np
import pytest

from s2attn.patterns import (
    Blocks,
    ByRange,
    Dense,
    Dilated,
    Global,
    Head,
    Local,
    LongNet,
    Pattern,
    PerHead,
    Power,
    Random,
    Shape,
    Sink,
    Stride,
    Window,
    preset,
)

S = 640
Q, K = np.arange(S)[:, None], np.arange(S)[None, :]
CAUSAL = K <= Q
QB, KB = Q // 16, K // 16


def seen(pattern: Pattern, causal: bool = True, head: Head | None = None) -> np.ndarray:
    return pattern.allowed(Q, K, Shape(S, causal), head)


@pytest.mark.parametrize(
    ("pattern", "mask"),
    [
        (Dense(), CAUSAL),
        (Window(100), CAUSAL & (Q - K < 100)),
        (Sink(7), CAUSAL & (K < 7)),
        (Global(7), CAUSAL & ((K < 7) | (Q < 7))),
        (Local(3, 16), CAUSAL & (QB - KB < 3)),
        (Stride(5, offset=2, block=16), CAUSAL & ((KB + 2) % 5 == 0)),
        (Stride(5, offset=2, shift=1, block=16), CAUSAL & ((KB + 3) % 5 == 0)),
        (Dilated(2, 20, 16), CAUSAL & ((QB - KB) % 2 == 0) & (QB - KB < 20)),
        (Dilated(6, block=16), CAUSAL & ((QB - KB) % 6 == 0)),
        (Power(block=16), CAUSAL & np.isin(QB - KB, [0, 1, 2, 4, 8, 16, 32])),
        (Power(3, block=16), CAUSAL & np.isin(QB - KB, [0, 1, 3, 9, 27])),
    ],
    ids=lambda value: repr(value) if isinstance(value, Pattern) else "",
)
def test_causal_definitions(pattern, mask):
    assert np.array_equal(seen(pattern), mask)


@pytest.mark.parametrize(
    ("pattern", "mask"),
    [
        (Dense(), np.ones((S, S), bool)),
        (Window(100), np.abs(Q - K) < 100),
        (Sink(7), np.broadcast_to(K < 7, (S, S))),
        (Global(7), (K < 7) | (Q < 7)),
        (Local(3, 16), np.abs(QB - KB) < 3),
        (Stride(5, offset=2, block=16), np.broadcast_to((KB + 2) % 5 == 0, (S, S))),
        (Power(block=16), np.isin(np.abs(QB - KB), [0, 1, 2, 4, 8, 16, 32])),
        (Dilated(2, 20, 16), ((QB - KB) % 2 == 0) & (np.abs(QB - KB) < 20)),
        (ByRange([(0, 50, Dense()), (100, None, Stride(3, 0, block=16))]), (np.abs(Q - K) < 50) | ((np.abs(Q - K) >= 100) & (KB % 3 == 0))),
    ],
    ids=lambda value: repr(value) if isinstance(value, Pattern) else "",
)
def test_bidirectional_definitions(pattern, mask):
    assert np.array_equal(seen(pattern, causal=False), mask)


def test_longnet_on_block_numbers():
    x = QB ^ KB
    mask = (x < 8) | ((x < 16) & (KB % 2 == 0)) | ((x < 32) & (KB & 3 == 0)) | ((x < 64) & (KB & 7 == 0)) | ((x < 128) & (KB & 15 == 0))
    assert np.array_equal(seen(LongNet(block=16)), CAUSAL & mask)


@pytest.mark.parametrize(("segment", "levels"), [(8, 5), (8, 4), (8, 7), (1, 6), (2, 8), (16, 3)])
@pytest.mark.parametrize("causal", [True, False])
def test_longnet_at_every_level(segment, levels, causal):
    """600 blocks, so that level 6 of segments of 8 blocks still differs from level 5; pair by pair, and as lists of blocks."""
    q, k = np.arange(600)[:, None], np.arange(600)[None, :]
    mask = np.zeros((600, 600), bool)
    for level in range(levels):
        width, thin = segment * 2**level, 2**level
        found = (q // width == k // width) & (k % thin == 0)
        assert (found & ~mask).any() or level == 0  # a level that adds nothing would test nothing
        mask |= found
    pattern, shape = LongNet(segment, levels, block=16), Shape(600 * 16, causal)
    assert np.array_equal(pattern.sees(q, k, shape), mask)
    listed = np.zeros_like(mask)
    listed[pattern.lists(np.arange(600), shape).expand()] = True
    assert np.array_equal(listed, mask)
    assert np.array_equal(pattern.allowed(q * 16, k * 16, shape), mask & (k <= q) if causal else mask)


def test_power_attention_of_the_paper():
    n = 32768
    q = np.arange(0, n, 97)[:, None]
    k = np.arange(0, n, 89)[None, :]
    block = q // 256 - k // 256
    mask = (k <= q) & ((block < 5) | np.isin(block, 2 ** np.arange(8)) | (k < 256))
    assert np.array_equal(preset("power_attention").allowed(q, k, Shape(n)), mask)


def test_phi3_small_is_per_query_head_with_offset_one():
    pattern = preset("phi3_small", local=2, stride=8, block=16).pattern(0)
    for h in range(32):
        mask = CAUSAL & ((QB - KB < 2) | ((KB + h + 1) % 8 == 0))
        for layer in (0, 2):
            assert np.array_equal(seen(pattern, head=Head(h, 32, 8, layer)), mask)


def test_ranges_are_half_open_distances():
    pattern = ByRange([(0, 50, Dense()), (50, 200, Stride(2, 0, block=16)), (200, None, Stride(4, 1, block=16))])
    d = Q - K
    mask = (d < 50) | ((d < 200) & (KB % 2 == 0)) | ((d >= 200) & ((KB + 1) % 4 == 0))
    assert np.array_equal(seen(pattern), CAUSAL & mask)


def test_per_head_counts_kv_heads_by_default():
    pattern = PerHead({1: Window(3)}, default=Sink(5))
    for h in range(8):
        expected = Window(3) if h // 4 == 1 else Sink(5)
        assert pattern.at(Head(h, 8, 2)) == expected
    by_query = PerHead({1: Window(3)}, default=Sink(5), heads="query")
    assert [by_query.at(Head(h, 8, 2)) == Window(3) for h in range(8)] == [h == 1 for h in range(8)]


@pytest.mark.parametrize(("heads", "stride"), [(8, 8), (8, 4), (12, 8), (32, 16), (3, 2)])
def test_stride_offsets_cover_every_residue_when_heads_allow_it(heads, stride):
    residues = {Stride(stride).at(Head(h, heads, heads, layer)).offset for h in range(heads) for layer in (0,)}
    assert residues == set(range(stride))


@pytest.mark.parametrize(("heads", "stride"), [(8, 16), (4, 16), (3, 8), (2, 5)])
def test_stride_offsets_continue_across_layers(heads, stride):
    layers = -(-stride // heads)
    offsets = [Stride(stride).at(Head(h, heads, heads, layer)).offset for layer in range(layers) for h in range(heads)]
    assert offsets[:stride] == list(range(stride))


def test_groups_share_their_keys():
    # 32 query heads over 8 KV heads: a stripe per KV head, so that a cache can drop blocks, and the union still covers 8 residues.
    offsets = [Stride(8).at(Head(h, 32, 8)).offset for h in range(32)]
    assert offsets == [h // 4 for h in range(32)]


def test_blocks_by_head_and_outside():
    mask = np.zeros((2, 3, 3), bool)
    mask[0, 1, 0] = mask[1, 2, 2] = True
    pattern = Blocks(mask, block=16)
    for h in range(2):
        blocks = np.zeros((S // 16, S // 16), bool)
        blocks[:3, :3] = mask[h]
        assert np.array_equal(seen(pattern, head=Head(h, 2, 2)), CAUSAL & blocks[QB, KB])


def test_random_is_a_pure_function_of_head_and_row():
    pattern = Random(3, seed=5, block=16)
    one, two = Head(0, 2, 2), Head(1, 2, 2)
    assert not np.array_equal(seen(pattern, head=one), seen(pattern, head=two))
    assert not np.array_equal(seen(pattern, head=one), seen(Random(3, seed=6, block=16), head=one))
    blocks = seen(pattern, head=one)[::16, ::16] | seen(pattern, head=one)[15::16, 15::16]
    assert blocks.sum(axis=1).tolist() == [min(3, i + 1) for i in range(S // 16)]
    both_ways = seen(pattern, causal=False, head=one)[::16, ::16]
    assert both_ways.sum(axis=1).tolist() == [3] * (S // 16)


@pytest.mark.parametrize("name", ["s2", "power_attention", "streaming_llm", "longnet", "bigbird", "longformer", "duo_attention"])
def test_a_row_reads_the_same_keys_whatever_comes_after(name):
    pattern = preset(name)
    head = Head(1, 4, 4, layer=1)
    long, short = Shape(2000), Shape(700)
    q, k = np.arange(700)[:, None], np.arange(700)[None, :]
    assert np.array_equal(pattern.allowed(q, k, long, head), pattern.allowed(q, k, short, head))


def test_unresolved_heads_are_an_error():
    with pytest.raises(TypeError, match=r"must be resolved with \.at"):
        Stride(4).sees(np.array([3]), np.array([2]), Shape(100))
