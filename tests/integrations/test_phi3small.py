"""Phi-3-small: logits against its arithmetic written out in float64, checkpoints as they are published, and texts through a cache."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import s2attn
from s2attn import Dense, Recipe, Sampling, Sink, SparseCache, Unsupported, Window
from s2attn.integrations.phi3small import Phi3Small, Phi3SmallConfig
from s2attn.integrations.spec import to_spec
from tests.support.oracle import assert_close

TINY: dict[str, Any] = {
    "architectures": ["Phi3SmallForCausalLM"],
    "model_type": "phi3small",
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rope_embedding_base": 1000000,
    "rope_position_scale": 1.0,
    "rope_scaling": None,
    "layer_norm_epsilon": 1e-5,
    "hidden_act": "gegelu",
    "gegelu_limit": 20.0,
    "gegelu_pad_to_256": True,
    "ff_dim_multiplier": None,
    "ff_intermediate_size": 80,
    "mup_use_scaling": True,
    "mup_attn_multiplier": 1.0,
    "mup_embedding_multiplier": 10.0,
    "mup_width_multiplier": 8.0,
    "blocksparse_block_size": 16,
    "blocksparse_homo_head_pattern": False,
    "blocksparse_num_local_blocks": 2,
    "blocksparse_triton_kernel_block_size": 64,
    "blocksparse_vert_stride": 4,
    "dense_attention_every_n_layers": 2,
    "embedding_dropout_prob": 0.1,
    "attention_dropout_prob": 0.0,
    "ffn_dropout_prob": 0.1,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
}
LONG = {
    "type": "su",
    "short_factor": [1.0, 1.25, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 8.0, 40.0],
    "original_max_position_embeddings": 128,
}


def random_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Weights in the names and shapes of a published checkpoint."""
    width, heads, groups = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    hidden = config["ff_intermediate_size"] or Phi3SmallConfig.from_dict(config).intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        sizes = {"query_key_value": ((heads + 2 * groups) * (width // heads), width), "dense": (width, width)}
        shapes |= {f"{name}.self_attn.{part}.weight": size for part, size in sizes.items()}
        shapes |= {f"{name}.self_attn.{part}.bias": size[:1] for part, size in sizes.items()}
        sizes = {"up_proj": (2 * hidden, width), "down_proj": (width, hidden)}
        shapes |= {f"{name}.mlp.{part}.weight": size for part, size in sizes.items()}
        shapes |= {f"{name}.mlp.{part}.bias": size[:1] for part, size in sizes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{name}.{norm}.weight": (width,), f"{name}.{norm}.bias": (width,)}
    shapes |= {"model.final_layernorm.weight": (width,), "model.final_layernorm.bias": (width,)}
    # Norms near 1 and wide projections: rows of attention are far from uniform, and what it adds to the stream counts.
    return {name: torch.randn(size) * 0.3 + (name.endswith("norm.weight")) for name, size in shapes.items()}


def mask_of(config: dict[str, Any], layer: int, length: int) -> Tensor:
    """The bool mask ``(H, T, T)`` by the published rule, without a pattern."""
    query, key = torch.arange(length)[:, None], torch.arange(length)
    causal = key <= query
    every, heads = config["dense_attention_every_n_layers"], config["num_attention_heads"]
    if every and (layer + 1) % every == 0:
        return causal.expand(heads, length, length)
    size, stride = config["blocksparse_block_size"], config["blocksparse_vert_stride"]
    step = 0 if config["blocksparse_homo_head_pattern"] else max(1, stride // heads)
    near = query // size - key // size < config["blocksparse_num_local_blocks"]
    stripes = torch.stack([(key // size + h * step + 1) % stride == 0 for h in range(heads)])
    return causal & (near | stripes[:, None])


def angles(config: dict[str, Any], length: int, long: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    width = config["hidden_size"] // config["num_attention_heads"]
    turns = 1.0 / config["rope_embedding_base"] ** (torch.arange(0, width, 2, dtype=dtype) / width)
    place, size = torch.arange(length, dtype=dtype) * config["rope_position_scale"], 1.0
    scaling = config["rope_scaling"]
    if scaling:
        turns = turns / torch.tensor(scaling["long_factor" if long else "short_factor"], dtype=dtype)
        grown, first = config["max_position_embeddings"] / scaling["original_max_position_embeddings"], 128
        size = math.sqrt(1 + math.log(grown) / math.log(first)) if long else 1.0
    both = torch.outer(place, turns).repeat(1, 2)
    return both.cos() * size, both.sin() * size


def written_out(config: dict[str, Any], weights: dict[str, Tensor], tokens: Tensor, dtype: torch.dtype, *, long: bool = False) -> Tensor:
    """Logits of one text ``(T, vocabulary)``: the model's arithmetic with a dense mask, from the names of the checkpoint alone."""
    w = {name: value.to(dtype) for name, value in weights.items()}
    heads, groups, width = config["num_attention_heads"], config["num_key_value_heads"], config["hidden_size"]
    head_dim, group, length = width // heads, heads // groups, len(tokens)
    cos, sin = angles(config, length, long, dtype)

    def turned(x: Tensor) -> Tensor:  # (heads, T, head_dim)
        swapped = torch.cat([-x[..., head_dim // 2 :], x[..., : head_dim // 2]], dim=-1)
        return x * cos + swapped * sin

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], config["layer_norm_epsilon"])

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["model.embed_tokens.weight"][tokens] * (config["mup_embedding_multiplier"] or 1.0)
    scale = config["mup_attn_multiplier"] / head_dim if config["mup_use_scaling"] else head_dim**-0.5
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        packed = linear(norm(x, f"{name}.input_layernorm"), f"{name}.self_attn.query_key_value").view(length, groups, group + 2, head_dim)
        q = turned(packed[:, :, :group].reshape(length, heads, head_dim).transpose(0, 1))
        k = turned(packed[:, :, group].transpose(0, 1)).repeat_interleave(group, dim=0)
        v = packed[:, :, group + 1].transpose(0, 1).repeat_interleave(group, dim=0)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~mask_of(config, layer, length), -math.inf)
        seen = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, width)
        x = x + linear(seen, f"{name}.self_attn.dense")
        up = linear(norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp.up_proj")
        gate, other = up[:, ::2], up[:, 1::2]
        if config["gegelu_limit"] is not None:
            limit = config["gegelu_limit"]
            gate, other = gate.clamp(max=limit), other.clamp(-limit, limit)
        x = x + linear(gate * torch.sigmoid(1.702 * gate) * (other + 1), f"{name}.mlp.down_proj")
    logits = norm(x, "model.final_layernorm") @ w["model.embed_tokens.weight"].T / (config["mup_width_multiplier"] or 1.0)
    unused = config.get("dummy_token_indices") or []
    logits[:, unused] = torch.finfo(dtype).min
    return logits


def model_of(config: dict[str, Any], weights: dict[str, Tensor], **settings: Any) -> Phi3Small:
    model = Phi3Small(Phi3SmallConfig.from_dict(config), **settings).to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights)
    return model.eval()


def save(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], shards: int = 1) -> Path:
    """A folder as checkpoints are published: ``config.json``, and one file or shards with their index."""
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: value.contiguous() for name, value in weights.items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    names = sorted(weights)
    where = {name: f"model-{i * shards // len(names) + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: weights[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"blocksparse_homo_head_pattern": True, "dense_attention_every_n_layers": None},
        {"num_attention_heads": 4, "num_key_value_heads": 4, "blocksparse_vert_stride": 9, "dense_attention_every_n_layers": 3},
        {"mup_use_scaling": False, "mup_embedding_multiplier": None, "mup_width_multiplier": None, "rope_position_scale": 0.5},
        {"ff_intermediate_size": None, "ff_dim_multiplier": 2, "gegelu_limit": None},
        {"gegelu_limit": 0.5, "mup_attn_multiplier": 4.0, "dummy_token_indices": [3, 95]},
        {"rope_scaling": LONG, "max_position_embeddings": 1024},
    ],
    ids=["published", "alike", "few heads", "no muP", "multiplier", "limits", "long"],
)
def test_logits_are_those_of_the_written_out_model(changes: dict[str, Any]) -> None:
    config = {**TINY, **changes}
    weights = {name: value.double() for name, value in random_weights(config).items()}
    tokens = torch.randint(96, (2, 200))
    with torch.no_grad():
        got = model_of(config, weights)(tokens)
    assert got.dtype == torch.float64 and got.shape == (2, 200, 96)
    for row, text in zip(got, tokens, strict=True):
        exact, plain = (written_out(config, weights, text, dtype, long=True) for dtype in (torch.float64, torch.float32))
        used = [token for token in range(96) if token not in config.get("dummy_token_indices", ())]
        assert_close("logits", row[:, used], plain[:, used], exact[:, used])  # its angles are float32, as those of `plain`
        assert exact[:, used].abs().max() < 1e3
        assert len(used) == 96 or (row[:, config["dummy_token_indices"]] == torch.finfo(torch.float64).min).all()


def test_a_context_within_the_first_length_takes_the_short_factors() -> None:
    config = {**TINY, "rope_scaling": LONG}
    weights = random_weights(config)
    tokens = torch.randint(96, (1, 100))
    with torch.no_grad():
        short, long = model_of(config, weights, context=128)(tokens)[0], model_of(config, weights)(tokens)[0]
    for got, is_long in ((short, False), (long, True)):
        exact, plain = (written_out(config, weights, tokens[0], dtype, long=is_long) for dtype in (torch.float64, torch.float32))
        assert_close("logits", got, plain, exact)
    assert (short - long).abs().max() > 0.1


@pytest.mark.parametrize("shards", [1, 3])
def test_a_published_folder_is_read(tmp_path: Path, shards: int) -> None:
    weights = random_weights(TINY)
    model = Phi3Small.from_folder(save(tmp_path, TINY, weights, shards))
    assert not model.training and model.recipe == Recipe.from_phi3small(TINY)
    assert set(model.state_dict()) == set(weights)
    tokens = torch.randint(96, (1, 180))
    with torch.no_grad():
        got = model(tokens)[0]
    exact, plain = (written_out(TINY, weights, tokens[0], dtype) for dtype in (torch.float64, torch.float32))
    assert_close("logits", got, plain, exact)
    dense = Phi3Small.from_folder(tmp_path, recipe=Recipe(Dense()))
    assert (dense(tokens)[0] - exact).abs().max() > 0.1  # so that the comparison above can tell patterns apart
    assert Phi3Small.from_folder(tmp_path, dtype=torch.bfloat16)(tokens).dtype == torch.float32


def test_what_a_checkpoint_carries_beside_its_weights_is_checked_and_dropped(tmp_path: Path) -> None:
    weights = random_weights(TINY)
    turns = 1.0 / 1000000 ** (torch.arange(0, 8, 2) / 8)
    extras = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    extras |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": turns.bfloat16() for layer in range(3)}
    model = Phi3Small.from_folder(save(tmp_path, TINY, {**weights, **extras}))
    assert set(model.state_dict()) == set(weights)
    for name, error in (("lm_head.weight", "must equal model.embed_tokens.weight"), (sorted(extras)[-1], "must hold the angles")):
        save(tmp_path, TINY, {**weights, **extras, name: extras[name] + 1})
        with pytest.raises(ValueError, match=error):
            Phi3Small.from_folder(tmp_path)


def test_a_model_in_bfloat16_keeps_exact_angles() -> None:
    model = model_of(TINY, random_weights(TINY)).to(torch.bfloat16)
    assert torch.equal(model.turns("cpu"), model_of(TINY, random_weights(TINY)).turns("cpu"))
    assert model.turns("cpu").dtype == torch.float32


def test_texts_are_those_of_the_whole_model_and_the_cache_shrinks() -> None:
    config = {**TINY, "dummy_token_indices": [0, 1, 2], "blocksparse_vert_stride": 8}
    model = model_of(config, random_weights(config))
    prompts = [torch.randint(3, 96, (length,)).tolist() for length in (600, 40)]
    cache = SparseCache.for_model(model, max_tokens=700, sequences=2, chunk=128)
    texts = s2attn.generate(model, prompts, Sampling(12), chunk=128, cache=cache)
    with torch.no_grad():
        for text in texts:
            whole = model(torch.tensor([text.tokens]))[0]
            # Each token is the likeliest after the ones before it, ties of rounding aside.
            for place, token in enumerate(text.new, start=len(text.prompt) - 1):
                assert whole[place].max() - whole[place, token] < 1e-4
                assert token > 2
    # A third of the layers is dense; in the others the four queries of a KV head read half of the stripes.
    assert cache.bytes_used < 0.75 * cache.bytes_dense
    written = [step[0].token for step in s2attn.stream(model, prompts[:1], Sampling(12), chunk=128)]
    assert written == texts[0].new


def test_other_recipes_take_the_place_of_its_own(tmp_path: Path) -> None:
    streaming = Recipe(Dense(), layers={0: Sink(4) | Window(32)})
    weights = random_weights(TINY)
    save(tmp_path, {**TINY, "s2_attention": to_spec(streaming)}, weights)
    assert Phi3Small.from_folder(tmp_path).recipe == streaming
    assert Phi3Small.from_folder(tmp_path, recipe=Recipe(Dense())).recipe == Recipe(Dense())
    with pytest.raises(ValueError, match="must name layers below 3, those of this model; got layer 7"):
        Phi3Small.from_folder(tmp_path, recipe=Recipe(Dense(), layers={7: Window(8)}))
    with pytest.raises(TypeError, match="s2_attention must be a recipe"):
        Phi3SmallConfig.from_dict({**TINY, "s2_attention": 3})


def test_it_is_judged_under_other_recipes() -> None:
    model, tokens = model_of(TINY, random_weights(TINY)), torch.randint(96, (1, 200))
    same = s2attn.compare(model, model.recipe, tokens)
    assert same.nll_change == 0 and same.notes == ()
    wider = s2attn.compare(model, Recipe(Dense()), tokens)  # sees all that it saw, and more
    assert wider.kl > 0 and wider.mass.min() == pytest.approx(1, abs=1e-5) and wider.notes == ()
    narrow = s2attn.compare(model, Recipe(Sink(4) | Window(16), dense_every=2), tokens)
    assert narrow.mass[0].max() < 1 and (narrow.mass[1] == 1).all()


def without(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if key != name}


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    weights = random_weights(TINY)
    bias = "model.layers.1.self_attn.dense.bias"
    for came, message in [
        (without(weights, bias), f"missing: {bias}"),
        ({**weights, "model.layers.3.mlp.up_proj.bias": torch.zeros(3)}, "not of this model: model.layers.3.mlp.up_proj.bias"),
        ({**weights, bias: torch.zeros(63)}, rf"of another shape: {bias} has \(63,\) for \(64,\)"),
        ({**weights, bias: torch.zeros(64, dtype=torch.int8)}, f"{bias} must be stored as floating-point numbers; got torch.int8"),
    ]:
        save(tmp_path, TINY, came)
        with pytest.raises(ValueError, match=message):
            Phi3Small.from_folder(tmp_path)


def test_files_that_are_missing_or_broken_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder must hold config\.json"):
        Phi3Small.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(ValueError, match=r"folder must hold model\.safetensors"):
        Phi3Small.from_folder(tmp_path)
    save(tmp_path, TINY, random_weights(TINY), shards=2)
    index = tmp_path / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    for broken, message in [
        ({**where, "more": "model-00001-of-00002.safetensors"}, "must name weights that its files hold; got more"),
        ({name: file for name, file in where.items() if "final" not in name}, "in the one file that the index names for it"),
        ({name: f"../{file}" for name, file in where.items()}, "must have a weight_map from names to files beside it"),
        ({**where, "more": "model-00003.safetensors"}, r"folder must hold model-00003\.safetensors"),
    ]:
        index.write_text(json.dumps({"weight_map": broken}))
        with pytest.raises(ValueError, match=message):
            Phi3Small.from_folder(tmp_path)
    index.unlink()
    (tmp_path / "model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        Phi3Small.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        Phi3Small.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "phi3"}, ValueError, "config must have the model_type 'phi3small'"),
        ({"hidden_act": "silu"}, Unsupported, "only gegelu is known, not silu"),
        ({"attention_dropout_prob": 0.1}, Unsupported, "attention has no dropout"),
        ({"tie_word_embeddings": False}, Unsupported, "the output reads the embeddings"),
        ({"hidden_size": 60}, ValueError, "hidden_size must be a multiple of twice num_attention_heads"),
        ({"num_key_value_heads": 3}, ValueError, "num_key_value_heads must divide"),
        ({"ff_dim_multiplier": 4}, ValueError, "must be given one without the other"),
        ({"dummy_token_indices": [96]}, ValueError, r"dummy_token_indices must be below vocab_size \(96\)"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ValueError, "rope_scaling must be an object of the type longrope"),
        ({"rope_scaling": {**LONG, "short_factor": [1.0]}}, ValueError, "rope_scaling short_factor must be 4 numbers above 0"),
        ({"layer_norm_epsilon": "small"}, ValueError, "layer_norm_epsilon must be a number above 0"),
    ],
)
def test_configurations_that_it_cannot_build_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Phi3SmallConfig.from_dict({**TINY, **changes})


def test_a_configuration_without_a_field_and_a_text_that_is_too_long_are_refused() -> None:
    with pytest.raises(ValueError, match="config must say mup_attn_multiplier"):
        Phi3SmallConfig.from_dict({name: value for name, value in TINY.items() if name != "mup_attn_multiplier"})
    config = Phi3SmallConfig.from_dict(TINY)
    with pytest.raises(ValueError, match=r"context must be at most max_position_embeddings \(1024\); got 2048"):
        Phi3Small(config, context=2048)
    with pytest.raises(ValueError, match="tokens must be at most 64 in a text, the context of this model; got 65"):
        Phi3Small(config, context=64)(torch.zeros(1, 65, dtype=torch.int64))


def test_the_published_vocabulary_says_which_tokens_are_unused() -> None:
    config = Phi3SmallConfig.from_dict({**TINY, "vocab_size": 100352})
    used = set(range(100352)) - set(config.unused_tokens)
    assert {100256, 100258, 100264, 100267, 100276, 100351}.isdisjoint(used)
    assert {100255, 100257, 100261, 100263, 100266} <= used
    assert Phi3SmallConfig.from_dict(TINY).unused_tokens == ()
