"""`compare`: the change of likelihood, the divergence and the mass kept, against masks written out; and models that it refuses."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import s2attn
from experiments.model import LanguageModel, ModelConfig
from s2attn import Dense, Local, PerHead, Recipe, Sink, SparseAttention, Stride, Unsupported, Window
from s2attn.analysis.compare import NeedsTraining, kind_of, ranges
from tests.support.masks import dense_mask

VOCABULARY = 64
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
STREAMING = Sink(4) | Window(24)


def hosted(kind: str = "Llama", implementation: str = "sdpa", **changes: Any) -> Any:
    """A tiny model of Transformers with random weights, whose attention is far from uniform."""
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")(
        **{**SHAPE, **changes}, attn_implementation=implementation
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=0.5 if "proj" in name or "query_key" in name else 0.3)
    return model


def texts(count: int = 2, length: int = 120) -> Tensor:
    return torch.randint(VOCABULARY, (count, length))


def quietly(*arguments: Any, **settings: Any) -> s2attn.Comparison:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NeedsTraining)
        return s2attn.compare(*arguments, **settings)


KINDS = {
    "Llama": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": None},
    "Phi3": {},
    "GPTNeoX": {"num_key_value_heads": 4},
    "Olmo2": {},
    "Gemma2": {"head_dim": 8, "attn_logit_softcapping": 2.0, "layer_types": ["full_attention"] * 2},
    "GptOss": {"head_dim": 8, "layer_types": ["full_attention"] * 2, "num_local_experts": 2, "num_experts_per_tok": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_is_judged_as_the_model_with_that_mask(kind: str) -> None:
    """The mask is given to the model's own eager attention: one of the two hosts' ways, and none of ours."""
    model = hosted(kind, "eager", **KINDS[kind])
    heads, groups = 4, model.config.num_key_value_heads
    pattern = PerHead({0: Dense()}, default=STREAMING)
    tokens = texts(1)
    found = s2attn.compare(model, Recipe(pattern), tokens)
    seen = dense_mask(pattern, heads, groups, 119, 119)
    with torch.no_grad():
        own = model(tokens[:, :-1], use_cache=False).logits[0].log_softmax(-1)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None]
        changed = model(tokens[:, :-1], attention_mask=mask, use_cache=False).logits[0].log_softmax(-1)
    targets = tokens[0, 1:]
    assert found.predictions == 119
    assert found.nll == pytest.approx(float(F.nll_loss(own, targets)), abs=2e-5)
    assert found.nll_recipe == pytest.approx(float(F.nll_loss(changed, targets)), abs=1e-4)
    assert found.kl == pytest.approx(float(F.kl_div(changed, own, log_target=True, reduction="batchmean")), abs=1e-4)
    assert found.kl > 1e-3


def test_mass_is_what_the_rows_of_attention_say() -> None:
    model = hosted(implementation="eager")
    tokens, recipe = texts(1), Recipe(Dense(), layers={1: STREAMING})
    found = s2attn.compare(model, recipe, tokens)
    with torch.no_grad():
        rows = model(tokens[:, :-1], output_attentions=True, use_cache=False).attentions[1][0].double()
    kept = (rows * dense_mask(STREAMING, 4, 2, 119, 119)).sum(-1)
    torch.testing.assert_close(torch.from_numpy(found.mass[1]), kept.mean(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(found.worst[1]), kept.amin(-1), rtol=0, atol=1e-5)
    assert (found.mass[0] == 1).all() and (found.worst[0] == 1).all() and found.worst[1].max() < 0.9
    pairs = dense_mask(STREAMING, 1, 1, 119, 119).sum() / (119 * 120 / 2)
    assert found.density[1].tolist() == pytest.approx([float(pairs)] * 4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_dense_recipe_changes_nothing_at_all(implementation: str) -> None:
    found = s2attn.compare(hosted(implementation=implementation), Recipe(Dense()), texts())
    assert found.nll_change == 0 and found.kl == 0 and (found.mass == 1).all() and found.notes == ()


def test_the_model_is_left_as_it_was() -> None:
    model = hosted("Gemma3", head_dim=8, sliding_window=256, layer_types=["sliding_attention", "full_attention"])
    tokens = texts(1)
    before = model(tokens).logits
    names = set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)
    s2attn.compare(model, Recipe(Dense(), layers={1: STREAMING}), tokens)
    with pytest.raises(Unsupported):
        s2attn.compare(model, Recipe(Dense(), layers={0: STREAMING}), texts(1, 400))
    assert (set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)) == names
    assert model.config._attn_implementation == "sdpa" and torch.equal(model(tokens).logits, before)


def test_a_layer_with_a_window_of_its_own_is_refused_where_it_bites() -> None:
    model = hosted("Mistral", sliding_window=64)
    s2attn.compare(model, Recipe(Dense(), layers={0: STREAMING}), texts(1, 60))
    s2attn.compare(model, Recipe(Dense()), texts(1, 100))  # nothing is changed, and nothing lost
    with pytest.raises(Unsupported, match="layer 0: it sees a sliding window of 64 tokens only"):
        s2attn.compare(model, Recipe(Dense(), layers={0: STREAMING}), texts(1, 100))


def test_attention_that_is_something_else_is_found_out() -> None:
    """A feature that nobody announces, here a bias in an implementation of one's own."""

    def biased(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> tuple[Tensor, None]:
        group = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
        place = torch.arange(query.shape[2])
        scores = (scores + 0.1 * (place - place[:, None])).masked_fill(place > place[:, None], -torch.inf)
        return (scores.softmax(-1) @ value.repeat_interleave(group, 1)).transpose(1, 2), None

    AttentionInterface.register("biased", biased)
    try:
        model = hosted(implementation="biased")
        assert s2attn.compare(model, Recipe(Dense()), texts()).nll_change == 0
        with pytest.raises(Unsupported, match=r"layer 0: its own output is .* away from causal softmax attention"):
            s2attn.compare(model, Recipe(Dense(), layers={0: STREAMING}), texts())
    finally:
        AttentionInterface._global_mapping.pop("biased")


def test_models_in_bfloat16_pass_their_own_check() -> None:
    found = s2attn.compare(hosted().to(torch.bfloat16), Recipe(Dense(), layers={0: STREAMING}), texts())
    assert 0 < found.mass[0].mean() < 1 and found.kl > 0


def test_our_own_models_are_judged_too() -> None:
    recipe = Recipe(STREAMING, dense_layers=[0])
    config = ModelConfig(layers=2, vocabulary=VOCABULARY)
    model, sparse = LanguageModel(config).eval(), LanguageModel(config.with_recipe(recipe)).eval()
    tokens = texts()
    found = s2attn.compare(model, recipe, tokens)
    with torch.no_grad():
        own, changed = (one(tokens[:, :-1]).log_softmax(-1).flatten(0, 1) for one in (model, sparse))
    targets = tokens[:, 1:].flatten()
    assert found.nll == pytest.approx(float(F.nll_loss(own, targets)), abs=1e-5)
    assert found.nll_recipe == pytest.approx(float(F.nll_loss(changed, targets)), abs=1e-5)
    assert found.kl == pytest.approx(float(F.kl_div(changed, own, log_target=True, reduction="batchmean")), abs=1e-5)
    # A model that is sparse as it stands, under its own recipe: nothing changes, and nothing is warned of.
    same = s2attn.compare(sparse, recipe, tokens)
    assert same.nll_change == 0 and same.kl == 0 and (same.mass == 1).all()
    # And under a narrower one: the share of what it saw, not of all.
    narrow = quietly(sparse, Recipe(Sink(4) | Window(8), dense_layers=[0]), tokens)
    assert (found.mass[1] < 1).all() and (narrow.mass[1] < 1).all() and (narrow.mass[0] == 1).all()


def test_only_the_last_predictions_and_texts_of_different_lengths() -> None:
    model, recipe = hosted(), Recipe(Dense(), layers={0: STREAMING})
    long, short = texts(1, 120)[0], texts(1, 70)[0]
    together = s2attn.compare(model, recipe, [long.tolist(), short.tolist()], last=10)
    apart = [s2attn.compare(model, recipe, one, last=10) for one in (long, short)]
    assert together.predictions == 20
    assert together.nll == pytest.approx(sum(one.nll for one in apart) / 2, abs=1e-6)
    for name in ("mass", "worst"):
        first, second, both = (getattr(one, name) for one in (*apart, together))
        expected = (first + second) / 2 if name == "mass" else torch.minimum(*map(torch.from_numpy, (first, second))).numpy()
        torch.testing.assert_close(torch.from_numpy(both), torch.from_numpy(expected))
    whole = s2attn.compare(model, recipe, long)
    assert whole.predictions == 119 and whole.nll != together.nll


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(Dense(), layers={0: Local(2) | Stride(4)}), r"Local.* is more than sinks and a window \(layers 0\)"),
        (Recipe(Dense(), layers={1: Window(32)}), r"Window\(n=32\) has a window without sinks \(layers 1\)"),
        (Recipe(STREAMING), "no head of any layer sees everything"),
    ],
)
def test_what_needs_training_is_said_loudly(recipe: Recipe, message: str) -> None:
    with pytest.warns(NeedsTraining, match=f"NEEDS TRAINING: .*{message}|NEEDS TRAINING: {message}"):
        found = s2attn.compare(hosted(), recipe, texts(1))
    assert any(note.startswith("NEEDS TRAINING") for note in found.notes)
    assert "NEEDS TRAINING" in str(found)


def test_kinds_of_patterns() -> None:
    kinds = [
        kind_of(one) for one in (Dense(), STREAMING, Sink(4) | Local(2), Window(9), Local(3), Sink(4), STREAMING | Stride(4, offset=0))
    ]
    assert kinds == ["dense", "streaming", "streaming", "window", "window", "other", "other"]
    assert ranges([0, 2, 3, 4, 9]) == "0, 2 to 4, 9"


def test_no_matrix_of_queries_and_keys_is_held() -> None:
    """The largest tensor that the model and the comparison make around attention, which is an op that streams."""
    length, largest = 2500, [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            largest[0] = max([largest[0], *(x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, Tensor))])
            return out

    model = hosted(num_hidden_layers=1, max_position_embeddings=4096)
    with Watch():
        s2attn.compare(model, PerHead({0: STREAMING}), texts(1, length))
    assert 0 < largest[0] < length * length  # as bytes: a bool mask for one head would be as much


def test_a_recipe_that_leaves_nothing_out_says_so() -> None:
    found = s2attn.compare(hosted(), Recipe(Dense(), layers={0: Sink(4) | Window(500)}), texts(1))
    assert found.notes == ("the recipe leaves no key out of texts of 120 tokens: this says nothing about it",)
    assert found.nll_change == pytest.approx(0, abs=1e-5)


def test_a_comparison_is_read_as_a_table_and_as_json() -> None:
    found = s2attn.compare(hosted(), Recipe(Dense(), layers={0: STREAMING}), texts(1))
    assert r"| 0 | Sink(n=4) \| Window(n=24) |" in str(found) and "nats a token, 119 predictions" in str(found)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["nll_change"] == found.nll_change and len(data["mass"]) == 2 and Recipe.from_dict(data["recipe"]) == found.recipe


class Plain(nn.Module):
    """A model with attention of its own making."""

    def forward(self, tokens: Tensor) -> Tensor:
        return F.one_hot(tokens, VOCABULARY).float()


class Twice(nn.Module):
    """A model whose second layer has the first one's number."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = SparseAttention(Dense(), 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.one_hot(tokens, VOCABULARY).float().unflatten(-1, (2, 32))
        return self.attend(self.attend(x, x, x), x, x).flatten(2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Plain, "Plain: no layer asks s2attn.nn.SparseAttention or Transformers' attention interface"),
        (Twice, r"Twice: these asked: \[0, 0\]"),
        (lambda: nn.Sequential(hosted()).eval(), "Sequential: it returns CausalLMOutputWithPast, not logits"),
        (lambda: hosted().train(), "LlamaForCausalLM: it is in training mode"),
        (lambda: hosted().model, "LlamaModel: it returns no logits"),
        (
            lambda: transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)).eval(),
            "no layer asks",
        ),
    ],
    ids=["no attention", "numbers", "wrapped", "training", "no head", "no interface"],
)
def test_models_that_cannot_be_looked_at_are_refused(make: Any, message: str) -> None:
    model = make()
    if isinstance(model, (Plain, Twice)):
        model.eval()
    with pytest.raises(Unsupported, match=message):
        s2attn.compare(model, Recipe(Dense()), texts(1, 20))


@pytest.mark.parametrize(
    ("recipe", "tokens", "last", "error", "message"),
    [
        (Recipe(Dense(), dense_layers=[5]), [1, 2, 3], None, ValueError, "must name layers below 2, those of this model; got layer 5"),
        (PerHead({3: Window(4)}), [1, 2, 3], None, ValueError, "does not fit 4 heads over 2 KV heads"),
        (None, [1, 2, 3], None, TypeError, "s2_attention must be a recipe"),
        (Recipe(Dense()), [1], None, ValueError, "tokens must be texts of 2 tokens or more; got 1 texts, the shortest of 1"),
        (Recipe(Dense()), [], None, ValueError, "tokens must be one or more texts of integers"),
        (Recipe(Dense()), "text", None, ValueError, "tokens must be one or more texts of integers"),
        (Recipe(Dense()), torch.rand(1, 5), None, ValueError, r"tokens must be integers \(texts, T\) or \(T,\)"),
        (Recipe(Dense()), torch.tensor([1, -1]), None, ValueError, "tokens must be integers from 0 on; got -1"),
        (Recipe(Dense()), [1, 64], None, ValueError, "tokens must be below 64, the vocabulary of the model; got 64"),
        (Recipe(Dense()), [[1, 2, 3], [1, 2]], 2, ValueError, "last must be at most 1, the predictions of the shortest text; got 2"),
    ],
)
def test_wrong_arguments_are_refused(recipe: Any, tokens: Any, last: int | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        s2attn.compare(hosted(), recipe, tokens, last=last)
