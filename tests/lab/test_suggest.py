"""`suggest`: heads that look near are made sparse, heads that look far stay dense, and the cost is what the model says.

Retrieval heads are near on average and far where it matters: their worst query shows it, and needles that they alone find.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import s2attn
from s2attn import Dense, PerHead, Recipe, Sink, SparseAttention, Unsupported, Window, XAttention
from s2attn.lab.asking import Asked
from s2attn.lab.asking_transformers import Hosted
from s2attn.lab.needles import needles

FILLER, MARKERS, WIDTH = 16, 16, 16
"""Tokens 0 to 15 fill the text; one of 16 to 31 stands far back in it, and is its last token again."""
SETTINGS: dict[str, Any] = {"sink": 4, "window": 32, "last": 1}
STREAMING = Sink(4) | Window(32)


def marked(count: int = 6, length: int = 160) -> Tensor:
    text = torch.randint(FILLER, (count, length))
    text[:, 30] = text[:, -1] = FILLER + torch.arange(count)
    return text


def looking_model(layers: list[list[str]], sure: float = 40.0) -> LlamaForCausalLM:
    """A Llama whose heads are given: "near" ones see what stands just before, "far" ones the marker, which they then say.

    Embeddings are one-hot. The 16 rotary pairs of a head turn by 1, 0.1, 0.01, ... radians per token: queries and keys that are constant
    on the third pair agree the less the further they are apart, and the last pair hardly turns at all.
    """
    tokens, heads = FILLER + MARKERS, len(layers[0])
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=2 * tokens,
        intermediate_size=8,
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=2 * WIDTH,
        attention_bias=True,
        rope_theta=1e16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e16},
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    state |= {name: torch.ones_like(value) for name, value in state.items() if "norm" in name}
    state["model.embed_tokens.weight"][:, :tokens] = torch.eye(tokens)
    state["lm_head.weight"][:, tokens:] = sure * torch.eye(tokens)  # what heads write is what is said
    for number, kinds in enumerate(layers):
        name = f"model.layers.{number}.self_attn"
        for head, kind in enumerate(kinds):
            at = head * 2 * WIDTH
            if kind == "near":
                state[f"{name}.q_proj.bias"][at + 2] = 60.0
                state[f"{name}.k_proj.bias"][at + 2] = 60.0
            else:
                state[f"{name}.q_proj.bias"][at + WIDTH - 1] = 30.0
                state[f"{name}.k_proj.weight"][at + WIDTH - 1, FILLER:tokens] = 1.0
                state[f"{name}.v_proj.weight"][at : at + MARKERS, FILLER:tokens] = torch.eye(MARKERS)
                state[f"{name}.o_proj.weight"][tokens + FILLER : 2 * tokens, at : at + MARKERS] = torch.eye(MARKERS)
    model.load_state_dict(state)
    return model


def test_a_head_that_looks_near_is_sparse_and_one_that_looks_far_stays_dense() -> None:
    model, text = looking_model([["near", "near"], ["near", "far"]]), marked()
    found = s2attn.suggest(model, text, 0.01, **SETTINGS)
    assert found.recipe == Recipe(Dense(), layers={0: STREAMING, 1: PerHead({0: STREAMING})})
    by_unit = {(unit.layer, unit.head): unit for unit in found.units}
    for place in [(0, 0), (0, 1), (1, 0)]:
        assert by_unit[place].sparse and by_unit[place].mass == pytest.approx(1, abs=1e-4)
    assert not by_unit[1, 1].sparse and by_unit[1, 1].mass < 0.01
    assert found.comparison.nll < 0.1 and abs(found.comparison.nll_change) < 1e-3
    assert found.sparse == 3 and dict(found.tried)[3] == pytest.approx(found.comparison.nll_change, abs=1e-6)
    # Without the far head it no longer knows what to say, which a comparison tells.
    both = s2attn.compare(model, Recipe(Dense(), layers={1: STREAMING}), text, last=1)
    assert both.nll_change > 1 and both.mass[1, 1] < 0.01


def test_whole_layers() -> None:
    found = s2attn.suggest(looking_model([["near", "near"], ["near", "far"]]), marked(), 0.01, by="layer", **SETTINGS)
    assert found.recipe == Recipe(Dense(), layers={0: STREAMING})
    assert [(unit.layer, unit.head, unit.sparse) for unit in found.units] == [(0, None, True), (1, None, False)]
    assert "| 0 | all | 100.00 % | 100.00 %" in str(found) and "1 of 2 can be sparse" in str(found)


def test_a_model_that_only_looks_near_keeps_one_head_all_the_same() -> None:
    found = s2attn.suggest(looking_model([["near", "near"], ["near", "near"]]), marked(), 1e-4, **{**SETTINGS, "last": None})
    assert found.sparse == 3 and [unit.sparse for unit in found.units] == [True, True, True, False]
    assert found.tried[-1][0] == 3 and found.comparison.notes == ()
    assert found.comparison.mass.min() > 1 - 1e-4


def test_a_budget_that_nothing_fits_leaves_all_dense() -> None:
    # Both heads say the marker, and without either the model is less sure of it.
    found = s2attn.suggest(looking_model([["far", "far"]], sure=0.25), marked(), 0.001, **SETTINGS)
    assert found.tried[1][0] == 1 and found.tried[1][1] > 0.001
    assert found.recipe == Recipe(Dense()) and found.sparse == 0
    assert found.comparison.nll_change == 0 and found.comparison.kl == 0


class Own(nn.Module):
    """Layers of `SparseAttention` over embeddings, the later ones as given."""

    def __init__(self, *later: Any) -> None:
        super().__init__()
        self.token = nn.Embedding(32, 32)
        self.attend = nn.ModuleList(SparseAttention(p, 2, 1, layer=i) for i, p in enumerate([Dense(), *later]))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        for attend in self.attend:
            q = x.unflatten(-1, (2, 16))
            x = x + attend(3 * q, q[:, :, :1], q[:, :, 1:]).flatten(2)
        return x @ self.token.weight.T


def test_layers_that_are_sparse_as_they_stand_are_left() -> None:
    torch.manual_seed(3)
    found = s2attn.suggest(Own(Window(16)).eval(), marked(), 1.0, sink=4, window=32)
    assert {unit.layer for unit in found.units} == {0}
    assert found.recipe.pattern(1) == Window(16) and found.left == ("layer 1 is left as it is: it does not see everything as it stands",)
    assert (found.comparison.mass[1] == 1).all()
    with pytest.raises(Unsupported, match="no layer of this model can be changed"):
        s2attn.suggest(_sliding(), marked(), 0.1, **SETTINGS)
    with pytest.raises(Unsupported, match="a recipe cannot say what this model has"):
        s2attn.suggest(Own(XAttention(stride=4, block=16)).eval(), marked(), 1.0, sink=4, window=32)


def _sliding() -> MistralForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return MistralForCausalLM(MistralConfig(vocab_size=32, **shape, sliding_window=16, bos_token_id=0, eos_token_id=0)).eval()


def test_the_recipe_is_the_one_that_was_measured() -> None:
    torch.manual_seed(1)
    model = Own(Dense(), Dense()).eval()
    found = s2attn.suggest(model, marked(), 0.2, sink=4, window=32)
    assert found.comparison.nll_change <= 0.2
    fits = [count for count, change in found.tried if change <= 0.2]
    over = [count for count, change in found.tried if change > 0.2]
    assert found.sparse == max(fits) and (min(over) == found.sparse + 1 if over else found.sparse == len(found.units) - 1)
    assert np.all(np.diff([unit.worst for unit in found.units]) <= 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budget": -0.1}, ValueError, "budget must be 0 to 1 nats per token; got -0.1"),
        ({"budget": 3}, ValueError, "budget must be 0 to 1 nats per token; got 3"),
        ({"budget": float("nan")}, ValueError, "budget must be 0 to 1"),
        ({"budget": "0.1"}, TypeError, "budget must be a number of nats per token; got str"),
        ({"by": "group"}, ValueError, "by must be 'head' or 'layer'; got 'group'"),
        ({"sink": 0}, ValueError, "sink must be an integer >= 1"),
        ({"window": 200}, ValueError, "tokens must be texts of 206 tokens or more; got 6 texts, the shortest of 160"),
        ({"last": 500}, ValueError, "last must be at most 159"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    settings = {"budget": 0.1, **SETTINGS, **change}
    with pytest.raises(error, match=message):
        s2attn.suggest(looking_model([["near", "far"]]), marked(), settings.pop("budget"), **settings)


ASK = FILLER - 1
"""The token of the word "is", behind which a retrieval head looks for a number."""
SEEN: dict[str, Any] = {"sink": 4, "window": 32}


class Words:
    """Words as tokens: a number is one of 16 markers, "is" asks, all else fills."""

    chat_template: str | None = None

    def __init__(self, begin: list[int], end: list[int]) -> None:
        self.begin, self.end = begin, end

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        found = [self.token(word) for word in re.findall(r"\w+", text)]
        return {"input_ids": [*self.begin, *found, *self.end] if add_special_tokens else found}

    def token(self, word: str) -> int:
        if word.isdecimal():
            return FILLER + int(word) % MARKERS
        return ASK if word == "is" else int(word[1:]) if re.fullmatch(r"w\d+", word) else len(word) % ASK

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(f"w{token}" for token in tokens)


class Chat(Words):
    chat_template = "a template"

    def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize and add_generation_prompt and [message["role"] for message in messages] == ["user"]
        return f"user says {messages[0]['content']} assistant says "


def model_of(kinds: list[str]) -> LlamaForCausalLM:
    """`looking_model` with more kinds of heads: "blurred" near ones, "flat" ones, and those that are near but behind ASK."""
    model = looking_model([["near"] * len(kinds)])
    attention, tokens = model.model.layers[0].self_attn, FILLER + MARKERS
    for head, kind in enumerate(kinds):
        at = head * 2 * WIDTH
        with torch.no_grad():
            if kind in ("blurred", "flat"):
                attention.q_proj.bias[at + 2] = attention.k_proj.bias[at + 2] = 20.0 if kind == "blurred" else 0.0
            if kind == "seldom":  # the norm makes 8 of a one-hot 1
                attention.q_proj.weight[at + 2, ASK] = -60.0 / 8
                attention.q_proj.weight[at + WIDTH - 1, ASK] = 30.0 / 8
                attention.k_proj.weight[at + WIDTH - 1, FILLER:tokens] = 1.0
                attention.v_proj.weight[at : at + MARKERS, FILLER:tokens] = torch.eye(MARKERS)
                attention.o_proj.weight[tokens + FILLER : 2 * tokens, at : at + MARKERS] = torch.eye(MARKERS)
    return model


def text_without_needles(length: int = 200) -> Tensor:
    text = torch.randint(ASK, (1, length))
    text[0, length - 20] = ASK
    return text


def test_heads_are_ordered_by_their_worst_query() -> None:
    found = s2attn.suggest(model_of(["near", "near", "seldom", "blurred"]), text_without_needles(), 1.0, **SEEN)
    near, blurred, seldom = found.units[1:]
    assert [unit.head for unit in found.units[2:]] == [3, 2]
    assert seldom.mass > blurred.mass and seldom.worst < blurred.worst - 0.3  # the mean says the opposite
    assert near.worst > 0.999
    assert found.recipe == Recipe(Dense(), layers={0: PerHead(dict.fromkeys([0, 1, 3], STREAMING))})


@pytest.mark.parametrize("tokenizer", [Words([], []), Words([13], [12]), Chat([13], [])], ids=["plain", "with ends", "chat"])
def test_a_recipe_that_loses_a_needle_is_refused(tokenizer: Words) -> None:
    """The flat head is the last to become sparse, and the text does not need the one before it."""
    model, text = model_of(["near", "seldom", "blurred", "flat"]), text_without_needles()
    blind = s2attn.suggest(model, text, 1.0, **SEEN)
    assert [unit.head for unit in blind.units if unit.sparse] == [0, 2, 1] and blind.needles == () and blind.lost == ()
    assert blind.notes()[0].startswith("no needles were looked for")
    found = s2attn.suggest(model, text, 1.0, **SEEN, tokenizer=tokenizer)
    assert [unit.head for unit in found.units if unit.sparse] == [0, 2]
    assert found.lost == (3,) and dict(found.tried)[3] == pytest.approx(0, abs=1e-5)
    assert [(one.before, one.after) for one in found.needles] == [(True, True)] * 4
    assert [one.depth for one in found.needles] == sorted({one.depth for one in found.needles})
    assert "4 of 4 found before, 4 after" in str(found)


def test_a_model_that_finds_nothing_is_said_to() -> None:
    found = s2attn.suggest(model_of(["near", "flat"]), text_without_needles(), 1.0, **SEEN, tokenizer=Words([], []))
    assert [(one.before, one.after) for one in found.needles] == [(False, False)] * 4
    assert "0 of 4 found before, 0 after; a model that finds none shows no loss of them" in found.notes()[0]
    assert s2attn.suggest(model_of(["near", "flat"]), text_without_needles(), 1.0, **SEEN, tokenizer=Words([], []), depths=0).needles == ()


@pytest.mark.parametrize("tokenizer", [Words([13], [12]), Chat([13], [12])], ids=["plain", "chat"])
@pytest.mark.parametrize("count", [1, 3])
def test_needles_lie_where_sinks_and_window_do_not_show_them(tokenizer: Words, count: int) -> None:
    filler = text_without_needles()[0].tolist()
    made = needles(tokenizer, filler, first=4, last=32, count=count)
    assert len(made) == count and len({tuple(one.tokens.tolist()) for one in made}) == count
    for one in made:
        tokens = one.tokens.tolist()
        markers = [i for i, token in enumerate(tokens) if token >= FILLER]
        assert one.answer == 1 and len(markers) == 3 and len({tokens[i] for i in markers}) == 1
        assert markers[-1] == len(tokens) - 1 and tokens[-2] == ASK
        assert markers[0] >= 4 and len(tokens) - 2 - markers[1] >= 32
        assert len(tokens) == len(filler) + 1
        assert (tokens[0] == 13) == (tokenizer.chat_template is None) and 12 not in tokens[-8:]


def test_a_needle_is_found_only_when_every_token_is_right() -> None:
    model = Hosted(model_of(["seldom"]))
    one = needles(Words([], []), text_without_needles()[0].tolist(), first=4, last=32, count=1)[0]
    assert one.found(model, lambda _: None)
    wrong = type(one)(one.depth, torch.cat([one.tokens[:-1], torch.tensor([FILLER + (int(one.tokens[-1]) + 1) % MARKERS])]), 1)
    assert not wrong.found(model, lambda _: None)
    two = type(one)(one.depth, torch.cat([one.tokens, torch.tensor([2])]), 2)  # the number, and a word that is not said
    assert not two.found(model, lambda _: None)

    def sparse(asked: Asked) -> Any:
        return STREAMING

    assert not one.found(model, sparse)


def test_progress_is_told_before_each_reading() -> None:
    calls: list[tuple[int, int, str]] = []
    model, text = model_of(["near", "seldom", "blurred", "flat"]), text_without_needles()
    found = s2attn.suggest(model, text, 1.0, **SEEN, tokenizer=Words([], []), depths=2, progress=lambda *call: calls.append(call))
    total = calls[0][1]
    assert {call[1] for call in calls} == {total} and calls[-1] == (total, total, "done")
    assert [call[0] for call in calls[:-1]] == list(range(len(calls) - 1)) and len(calls) - 1 <= total
    tried = len(found.tried) - 1
    assert [call[2] for call in calls].count("tries a recipe") == tried
    assert [call[2] for call in calls].count("looks for a needle") == 2 * len([change for _, change in found.tried if change <= 1])
    calls.clear()
    s2attn.compare(model, Recipe(Dense()), text, progress=lambda *call: calls.append(call))
    assert calls == [(0, 2, "reads as the model stands"), (1, 2, "reads with the recipe"), (2, 2, "done")]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokenizer": 3}, TypeError, "tokenizer must be a tokenizer of Transformers; got int"),
        ({"tokenizer": str}, TypeError, "tokenizer must be a tokenizer of Transformers; got type"),
        ({"depths": -1}, ValueError, "depths must be an integer >= 0; got -1"),
        (
            {"depths": 500, "tokenizer": Words([], [])},
            ValueError,
            r"tokens must have a text of \d+ tokens or more .*500 needles",
        ),
        ({"progress": 3}, TypeError, r"progress must be a function of \(done, total, what\) or None; got int"),
    ],
)
def test_wrong_needles_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        s2attn.suggest(model_of(["near", "flat"]), text_without_needles(), 0.1, **{**SEEN, **change})
