"""What one attention module of a model does: its pattern, its global heads, and whether it is causal; found once and kept on the module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from s2attn.core import Unsupported, bad_value
from s2attn.integrations.spec import FIELD, read_spec
from s2attn.layout import HeadRange
from s2attn.patterns import And, ByRange, Dense, Or, Pattern, PerHead, Recipe, Window

KEPT, BACKEND = "_s2attn_plan", "_s2attn_backend"
"""What is kept on a module: its plan, and the backend that `patch` was told."""
_NO_ATTENTION = ("linear_attention", "mamba", "conv", "moe")  # kinds of layers in a configuration's layer_types


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """An attention module and the recipe of its model.

    Attributes:
        spec: the object in the configuration that this was read from; another one there makes the plan stale.
        given: query heads, KV heads and the model's own window, as attention was called with them.
        pattern: cut to that window.
        heads: the global heads that these are; None for all of the model.
        backend: as of `s2attn.attention`.
        checks: whether it is the first attention layer of the model, which in compiled code checks what concerns all of them.
    """

    spec: Any
    given: tuple[int, int, int | None]
    layer: int
    pattern: Pattern
    causal: bool
    heads: HeadRange | None
    backend: str
    checks: bool


def layer_plan(module: nn.Module, heads: int, kv_heads: int, window: int | None) -> LayerPlan:
    """The plan of a module whose tensors have these heads, in a model with that sliding window; in compiled code too."""
    if torch.compiler.is_compiling():
        _keep_while_compiling(module, heads, kv_heads, window)
        plan = getattr(module, KEPT)
        if plan.spec is not getattr(module.config, FIELD, None):  # never so now; that it is asked makes another recipe compile again
            raise bad_value(f"config.{FIELD}", "must stay as it is while a model is compiled", "another recipe")
        return plan
    return keep_plan(module, heads, kv_heads, window)


def keep_plan(module: nn.Module, heads: int, kv_heads: int, window: int | None) -> LayerPlan:
    """The plan that a module keeps; made when there is none, or when it is of another recipe or of another call."""
    plan, given = module.__dict__.get(KEPT), (heads, kv_heads, window)
    if plan is None or plan.given != given or plan.spec is not getattr(module.config, FIELD, None):
        plan = module.__dict__[KEPT] = make_plan(module, given)
    return plan


@torch.compiler.assume_constant_result
def _keep_while_compiling(module: nn.Module, heads: int, kv_heads: int, window: int | None) -> bool:
    """Keep it for real while code is compiled, which then finds it on the module, and compiles again when it is another one."""
    keep_plan(module, heads, kv_heads, window)
    return True


def make_plan(module: nn.Module, given: tuple[int, int, int | None]) -> LayerPlan:
    """Read the recipe of a module's configuration.

    Raises:
        ValueError, TypeError: there is none, or one of another model.
        Unsupported: a module that is no numbered self-attention, or heads of nobody knows which rank.
    """
    config: Any = module.config
    spec = getattr(config, FIELD, None)
    if spec is None:
        rule = f"must hold a recipe for models that run on s2attn: call s2attn.patch(model, recipe), or write one into config.{FIELD}"
        raise bad_value(f"config.{FIELD}", rule, "nothing")
    recipe = model_recipe(config, spec)
    layer: Any = getattr(module, "layer_idx", None)
    causal = getattr(module, "is_causal", True)
    why = []
    if not isinstance(layer, int):
        why.append(f"its layer_idx is {layer}, so that nobody knows its pattern")
    if causal and not getattr(config, "is_causal", True):
        why.append("its configuration says is_causal=False, the module itself is causal")
    if why:
        raise Unsupported("s2attn cannot serve this attention module", {type(module).__name__: why})
    heads = head_range(module, given[:2], (config.num_attention_heads, kv_heads_of(config)))
    pattern = recipe.pattern(layer) if given[2] is None else within(recipe.pattern(layer), given[2])
    kinds = getattr(config, "layer_types", None) or ()
    checks = layer == next((i for i, kind in enumerate(kinds) if kind not in _NO_ATTENTION), 0)
    return LayerPlan(spec, given, layer, pattern, bool(causal), heads, module.__dict__.get(BACKEND, "auto"), checks)


def kv_heads_of(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def model_recipe(config: Any, spec: Any) -> Recipe:
    """A recipe checked against a configuration."""
    return read_spec(spec, num_layers=config.num_hidden_layers, num_heads=config.num_attention_heads, num_kv_heads=kv_heads_of(config))


def head_range(module: nn.Module, local: tuple[int, int], whole: tuple[int, int]) -> HeadRange | None:
    """The global heads of a module whose tensors have ``local`` query and KV heads of ``whole``, by the rank of its slice."""
    if local == whole:
        return None
    ranks = whole[0] // local[0]
    if local[0] * ranks != whole[0] or local[1] * ranks != whole[1]:
        raise Unsupported("heads are not cut evenly over ranks", {"tensor parallelism": [f"{local} of {whole} query and KV heads"]})
    found = {rank for size, rank in _slices(module) if size == ranks}
    if len(found) != 1:
        why = f"attention was given {local[0]} of {whole[0]} heads, and no weight of {type(module).__name__} is cut over {ranks} ranks"
        raise Unsupported("nobody knows which heads these are", {"tensor parallelism": [why]})
    start = found.pop() * local[0]
    return HeadRange(start, start + local[0], whole[0], whole[1])


def _slices(module: nn.Module) -> list[tuple[int, int]]:
    """(ranks, rank) of every device mesh that the module's weights say they are cut over."""
    weights: list[Any] = [x for x in module.parameters() if hasattr(x, "device_mesh")]
    found = []
    for weight in weights:
        mesh = weight.device_mesh
        names = mesh.mesh_dim_names or (None,) * mesh.ndim
        for axis, (name, placement) in enumerate(zip(names, weight.placements, strict=True)):
            if name == "tp" or (name is None and placement.is_shard()):
                found.append((mesh.size(axis), mesh.get_local_rank(axis)))
    for part in module.modules():  # before Transformers 5 weights are plain tensors, and the modules know the mesh
        mesh = getattr(part, "_hf_device_mesh", None)
        if mesh is not None and mesh.ndim == 1:
            found.append((mesh.size(), mesh.get_local_rank()))
    return found


def within(pattern: Pattern, tokens: int) -> Pattern:
    """A pattern within the model's own sliding window."""
    return Window(tokens) if isinstance(pattern, Dense) else pattern & Window(tokens)


def keeps_distance(pattern: Pattern) -> bool:
    """Whether what is seen depends on the distance alone, so that it may be asked of the last keys of a sequence."""
    if isinstance(pattern, (And, Or, PerHead, ByRange)):
        return all(keeps_distance(part) for part in pattern.parts)
    return isinstance(pattern, (Dense, Window))


@torch.compiler.assume_constant_result
def check_trimmed(config: Any) -> bool:
    """Caches of sliding layers forget the first keys: refused where the patterns of such layers look at places, not distances."""
    recipe, kinds = model_recipe(config, getattr(config, FIELD, None)), getattr(config, "layer_types", None)
    sliding = [i for i in range(config.num_hidden_layers) if kinds is None or "sliding" in kinds[i]]
    wrong = [f"layer {i}: {recipe.pattern(i)}" for i in sliding if not keeps_distance(recipe.pattern(i))]
    if wrong:
        wrong.append("pass transformers.DynamicCache() without a config as the cache, or s2attn's PastKeyValues, which know all places")
        raise Unsupported("a cache that forgets keys outside of the window has no places for these patterns", {"sliding layers": wrong})
    return True
