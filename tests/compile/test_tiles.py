"""The choice of tiles: fits every device, for every width, dtype and block."""

from __future__ import annotations

import itertools

import pytest

from s2attn.backends.triton.tiles import SHARED_MEMORY, choose_tiles, shared_bytes


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_every_choice_fits(target):
    limit = SHARED_MEMORY[target]
    for op, dim, itemsize, block in itertools.product(
        ("forward", "dq", "dkv"), (16, 48, 64, 128, 192, 256), (2, 4), (16, 32, 64, 128, 256)
    ):
        if limit == 65536 and itemsize == 4 and dim > 128 and op != "forward":
            with pytest.raises(ValueError, match="shared_limit must hold one tile"):
                choose_tiles(op, dim, dim, itemsize, block, limit)
            continue
        tiles = choose_tiles(op, dim, dim, itemsize, block, limit)
        assert shared_bytes(op, tiles, dim, dim, itemsize) <= limit
        assert tiles.line_tokens >= 16 and tiles.listed_tokens >= 16
        assert tiles.factor(block) * block == max(block, tiles.line_tokens) and tiles.per_block(block) * tiles.line_tokens == max(
            block, tiles.line_tokens
        )


def test_too_little_memory_is_an_error():
    with pytest.raises(ValueError, match="shared_limit must hold one tile of 16 x 16 tokens; got 100"):
        choose_tiles("forward", 64, 64, 2, 64, 100)
