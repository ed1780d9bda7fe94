"""Documents that share a row, over masks, caches, compilation and styles of positions, against masks spelled out by the rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import s2attn
from s2attn import Global, Local, Recipe, Sink, Stride, Unsupported, Window
from s2attn.integrations.transformers import CACHE_ARGUMENT, PastKeyValues
from s2attn.integrations.transformers.attend import attention_forward
from s2attn.integrations.transformers.rows import document_starts
from s2attn.nn import positions
from s2attn.nn.generation import generate
from s2attn.testing import dense_mask
from tests.integrations.transformers.models import text, tiny

SPARSE = Recipe(Local(2, block=16) | Stride(3, block=16), layers={0: Sink(3) | Window(12)})
TOKENS, PADDING = 48, 7
OLD = transformers.__version__.startswith("4.")


def restarts(tokens: int) -> list[int]:
    lengths = (13, 1, 1, 20)
    return [place for length in (*lengths, tokens - sum(lengths)) for place in range(length)]


STYLES = {
    "arange": lambda tokens: list(range(tokens)),
    "restarts": restarts,
    "restarts behind gaps": lambda tokens: [*range(10), *range(40, 50), *range(5, tokens - 15)],
    "gaps": lambda tokens: [*range(15), *range(40, tokens + 25)],
    "repeats": lambda tokens: [place // 2 for place in range(tokens)],
    "steps": lambda tokens: [2 * place for place in range(tokens)],
}
PACKED = ("restarts", "restarts behind gaps")
MASKS = ["none", "ones", "left", "right"]
CACHES = ["none", "dynamic", "static", "sparse"]


def documents(row: list[int], real: list[bool]) -> list[list[int]]:
    """The rule, token by token: a document ends where positions decrease; a lone 0 in front of another 0 is one by itself."""
    runs: list[list[int]] = []
    for token in (token for token, counts in enumerate(real) if counts):
        if not runs or row[token] < row[runs[-1][-1]]:
            runs.append([])
        runs[-1].append(token)
    found = []
    for run in runs:
        places = [row[token] for token in run]
        zeros = places.count(0)
        if zeros > 1 and len(set(places)) == len(places) - zeros + 1:  # nothing but 0 repeats
            found += [[token] for token in run[: zeros - 1]]
            run = run[zeros - 1 :]
        found.append(run)
    return found


def batch(style: str, mask: str) -> tuple[Tensor, Tensor, Tensor | None, list[list[list[int]]]]:
    """Tokens, position_ids, attention_mask and the documents of two rows, of which the first is padded."""
    real = torch.ones(2, TOKENS, dtype=torch.int64)
    if mask in ("left", "right"):
        real[0, slice(PADDING) if mask == "left" else slice(TOKENS - PADDING, None)] = 0
    places = torch.full((2, TOKENS), 1 if mask == "left" else 0)
    for row, counts in zip(places, real.bool(), strict=True):
        row[counts] = torch.tensor(STYLES[style](int(counts.sum())))
    found = [documents(row.tolist(), counts.bool().tolist()) for row, counts in zip(places, real, strict=True)]
    return text(2, TOKENS), places, None if mask == "none" else real, found


def expected_logits(model: Any, tokens: Tensor, places: Tensor, found: list[list[list[int]]]) -> Tensor:
    """Logits of a model whose attention sees what the pattern allows within each document."""
    shape = model.config.num_attention_heads, model.config.num_key_value_heads

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any) -> tuple[Tensor, None]:
        k, v = (x.repeat_interleave(shape[0] // shape[1], dim=1) for x in (key, value))
        out = torch.zeros_like(query)
        for row, parts in enumerate(found):
            for part in parts:
                mask = dense_mask(
                    SPARSE.pattern(module.layer_idx),
                    *shape,
                    len(part),
                    len(part),
                    causal=True,
                    layer=module.layer_idx,
                )
                scores = (query[row, :, part] @ k[row, :, part].transpose(1, 2)) * more["scaling"]
                out[row, :, part] = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[row, :, part]
        return out.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("documents", attend)
    model.set_attn_implementation("documents")
    return model(tokens, position_ids=places, use_cache=False).logits


def make_cache(kind: str, model: Any) -> Any:
    if kind == "static":
        return transformers.StaticCache(config=model.config, max_cache_len=TOKENS + 16)
    return transformers.DynamicCache() if kind == "dynamic" else PastKeyValues.for_model(model, max_tokens=128, sequences=2)


def arguments(kind: str, model: Any, begin: int = 0, end: int = TOKENS) -> dict[str, Any]:
    if kind == "none":
        return {"use_cache": False}
    more = {"cache_position": torch.arange(begin, end)} if OLD else {}
    return {"use_cache": True, CACHE_ARGUMENT: make_cache(kind, model), **more}


def assert_equal_documents(got: Tensor, expected: Tensor, found: list[list[list[int]]]) -> None:
    for row, parts in enumerate(found):
        kept = [token for part in parts for token in part]
        torch.testing.assert_close(got[row, kept], expected[row, kept], atol=2e-6, rtol=0)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_every_document_is_alone(mask: str, cache: str, style: str) -> None:
    model = tiny()
    tokens, places, real, found = batch(style, mask)
    assert [len(parts) for parts in found] == [{"restarts": 5, "restarts behind gaps": 2}.get(style, 1)] * 2
    expected = expected_logits(model, tokens, places, found)
    s2attn.patch(model, SPARSE)
    got = model(tokens, attention_mask=real, position_ids=places, **arguments(cache, model)).logits
    assert got.isfinite().all()
    assert_equal_documents(got, expected, found)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
@torch.no_grad()
def test_compiled_models_keep_the_rule_or_raise(cache: str, masked: bool, fresh_compiler: None) -> None:
    model = tiny(num_hidden_layers=1)
    plain = tiny(num_hidden_layers=1)
    recipe = SPARSE.default
    compiled = torch.compile(s2attn.patch(model, Recipe(recipe)), fullgraph=True, backend="aot_eager")
    s2attn.patch(plain, Recipe(recipe))
    for mask in ["ones", "left", "right"] if masked else ["none"]:
        for style in STYLES:
            tokens, places, real, found = batch(style, mask)
            call = {"attention_mask": real, "position_ids": places}
            if style in PACKED:
                with pytest.raises(RuntimeError, match="rows are packed: compiled s2attn needs their cu_seq_lens_q"):
                    compiled(tokens, **call, **arguments(cache, model))
                continue
            expected = plain(tokens, **call, use_cache=False).logits  # as the test above has it
            assert_equal_documents(compiled(tokens, **call, **arguments(cache, model)).logits, expected, found)


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_of_documents(mask: str) -> None:
    model, grads = tiny(), []
    tokens, places, real, found = batch("restarts", mask)
    kept = torch.zeros(2, TOKENS, dtype=torch.bool)
    for row, parts in zip(kept, found, strict=True):
        row[[token for part in parts for token in part]] = True
    for ours in (False, True):
        model.zero_grad()
        if ours:
            logits = s2attn.patch(model, SPARSE)(tokens, attention_mask=real, position_ids=places).logits
        else:
            logits = expected_logits(model, tokens, places, found)
        logits[kept].square().sum().backward()
        grads.append([weight.grad.clone() for weight in model.parameters()])
    for got, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static", "sparse"])
@torch.no_grad()
def test_a_cache_after_a_packed_prompt(cache: str) -> None:
    model = s2attn.patch(tiny(), SPARSE)
    tokens, places, real, found = batch("restarts", "left")
    call = arguments(cache, model)
    model(tokens, attention_mask=real, position_ids=places, **call)
    new, mask = text(2, 1, seed=1), torch.cat([real, torch.ones(2, 1, dtype=torch.int64)], dim=1)
    call |= {"cache_position": torch.tensor([TOKENS])} if OLD else {}
    call |= {"attention_mask": mask, "position_ids": places[:, -1:] + 1}
    if cache != "sparse":  # what they keep of the other documents cannot be told from the last one
        with pytest.raises(Unsupported, match=r"(?s)cannot continue these rows of a cache.*the prompt was packed"):
            model(new, **call)
        return
    got = model(new, **call).logits
    for row, parts in enumerate(found):
        alone = torch.cat([tokens[row, parts[-1]], new[row]])[None]
        torch.testing.assert_close(got[row], model(alone, use_cache=False).logits[0, -1:], atol=2e-6, rtol=0)


@pytest.mark.parametrize("cache", ["dynamic", "static", "sparse"])
@torch.no_grad()
def test_a_document_that_begins_behind_a_cache_is_refused(cache: str) -> None:
    model = s2attn.patch(tiny(), SPARSE)
    for places, message in (
        ([20, 21, 0, 1], "only its first call"),
        ([0, 1, 2, 3], "the prompt was packed"),
    ):
        call = arguments(cache, model, 0, 20)
        model(text(2, 20), **call)
        call |= {"cache_position": torch.arange(20, 24)} if OLD else {}
        with pytest.raises(Unsupported, match=message):
            model(text(2, 4), position_ids=torch.tensor([places]), **call)


@torch.no_grad()
def test_pages_continue_positions_that_repeat() -> None:
    model = s2attn.patch(tiny(), SPARSE)
    tokens, places, _, found = batch("repeats", "none")
    call, parts = arguments("sparse", model), []
    for begin, end in ((0, 40), (40, 41), (41, TOKENS)):
        parts.append(model(tokens[:, begin:end], position_ids=places[:, begin:end], **call).logits)
    assert_equal_documents(torch.cat(parts, 1), model(tokens, position_ids=places, use_cache=False).logits, found)


@torch.no_grad()
def test_cu_seq_lens_and_pages_are_refused_together() -> None:
    model = s2attn.patch(tiny(), SPARSE)
    cu = torch.tensor([0, 20, 48, 96], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q must be given without padding or a cache"):
        model(text(2, TOKENS), cu_seq_lens_q=cu, **arguments("sparse", model))


@torch.no_grad()
def test_positions_are_read_again_in_every_call() -> None:
    model = s2attn.patch(tiny(), SPARSE)
    tokens, places = text(1, TOKENS), torch.arange(TOKENS)[None].clone()
    call: dict[str, Any] = {"attention_mask": torch.ones_like(tokens), "use_cache": False}
    whole = model(tokens, position_ids=places, **call).logits
    places.numpy()[:] = restarts(TOKENS)  # torch does not count this change
    packed = model(tokens, position_ids=places, **call).logits
    assert torch.equal(packed, model(tokens, position_ids=places.clone(), **call).logits)
    assert not torch.equal(packed, whole)


@torch.no_grad()
def test_documents_that_look_both_ways() -> None:
    model = tiny(num_hidden_layers=1, num_key_value_heads=4)
    model.model.layers[0].self_attn.is_causal = False
    attention = s2attn.patch(model, Recipe(Global(1) | Window(9))).model.layers[0].self_attn
    q, k, v = torch.randn(3, 1, 4, 20, 8)
    places = torch.tensor([[*range(8), *range(12)]])
    got, _ = attention_forward(attention, q, k, v, None, position_ids=places)
    for part in (slice(8), slice(8, 20)):
        alone, _ = attention_forward(attention, q[:, :, part], k[:, :, part], v[:, :, part], None)
        torch.testing.assert_close(got[:, part], alone, atol=1e-6, rtol=0)


STARTS = {
    "one": ([0, 1, 2, 3], [0]),
    "documents of one token": ([0, 0, 0, 1, 2], [0, 1, 2]),
    "zeros alone": ([0, 0, 0], [0, 1, 2]),
    "repeats": ([0, 0, 1, 1, 2, 2], [0]),
    "gaps": ([0, 1, 40, 41], [0]),
    "a decrease to more than 0": ([5, 6, 7, 3, 4], [0, 3]),
    "a document of one token behind repeats": ([0, 0, 1, 1, 0, 0, 1], [0, 4, 5]),
}


@pytest.mark.parametrize(("row", "starts"), STARTS.values(), ids=STARTS)
def test_the_rule(row: list[int], starts: list[int]) -> None:
    assert document_starts(torch.tensor([row])).nonzero()[:, 1].tolist() == starts
    padded = torch.tensor([[9, 0, *row, 0, 0]])
    real = torch.tensor([[False, False, *[True] * len(row), False, False]])
    assert (document_starts(padded, real).nonzero()[:, 1] - 2).tolist() == starts


class Logits(torch.nn.Module):
    """A patched model as `generate` calls models."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, position_ids=positions(tokens), use_cache=False).logits


@torch.no_grad()
def test_texts_of_different_lengths_in_a_step() -> None:
    model = s2attn.patch(tiny(), SPARSE)
    prompts = [text(1, length, seed=length)[0].tolist() for length in (1, 40, 23)]
    together = generate(Logits(model), prompts, s2attn.Sampling(max_new_tokens=6), chunk=16)
    for prompt, written in zip(prompts, together, strict=True):
        alone = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=[],
        )
        assert written.new == alone[0, len(prompt) :].tolist()
