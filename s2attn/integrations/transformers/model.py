"""`patch`, `unpatch` and `patched`: a recipe for a model that is there already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from s2attn.backends import get_backend
from s2attn.core import Unsupported, bad_kind
from s2attn.integrations.spec import FIELD, to_spec
from s2attn.integrations.transformers.interface import NAME, register
from s2attn.integrations.transformers.plan import BACKEND, KEPT, keep_plan, kv_heads_of, model_recipe
from s2attn.patterns import Pattern, Recipe

_BEFORE = "_s2attn_before"


def patch(model: PreTrainedModel, recipe: Recipe | Pattern, *, backend: str = "auto") -> PreTrainedModel:
    """Let a Transformers model attend by a recipe, in place: weights stay as they are.

    The recipe goes into ``model.config.s2_attention``, is saved with the model, and is what other hosts of s2attn read. A model that is
    patched already gets another recipe.

    Args:
        backend: as of `s2attn.attention`; a choice of this process, which is not saved.

    Returns:
        the model.

    Raises:
        ValueError, TypeError: no recipe, or one for another number of layers or heads.
        Unsupported: a model whose attention cannot be replaced, or is more than self-attention; an untested version of Transformers.
    """
    check_model(model)
    spec = to_spec(recipe)
    model_recipe(model.config, spec)
    if backend != "auto":
        get_backend(backend)
    register()
    before, former = model.config._attn_implementation, _state(model)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        why = "its class does not use Transformers' AttentionInterface"
        raise Unsupported("s2attn cannot serve this model", {type(model).__name__: [why]})
    if before != NAME:
        setattr(model, _BEFORE, before)
    setattr(model.config, FIELD, spec)
    _forget_plans(model)
    try:
        for module in model.modules():
            if _is_attention(module):
                module.__dict__[BACKEND] = backend
                _plan_ahead(module)
    except Exception:
        _restore(model, former)
        raise
    return model


def unpatch(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model attend as it did before :func:`patch`, and forget the recipe.

    One that was loaded with s2attn gets torch's own attention, or the model's where it has none for that.
    """
    if not isinstance(model, PreTrainedModel):
        raise bad_kind("model", "must be a model of Transformers", model)
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation(model.__dict__.pop(_BEFORE, None) or ("sdpa" if model._supports_sdpa else "eager"))
    if hasattr(model.config, FIELD):
        delattr(model.config, FIELD)
    _forget_plans(model)
    for module in model.modules():
        module.__dict__.pop(BACKEND, None)
    return model


@contextmanager
def patched(model: PreTrainedModel, recipe: Recipe | Pattern, *, backend: str = "auto") -> Iterator[PreTrainedModel]:
    """The model with another recipe inside the block; afterwards it is as it was, also if it had a recipe before.

    >>> import transformers, s2attn
    >>> config = transformers.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> model = transformers.LlamaForCausalLM(config)
    >>> with patched(model, s2attn.Window(64)):
    ...     model.config._attn_implementation
    's2attn'
    >>> model.config._attn_implementation
    'sdpa'
    """
    check_model(model)
    former = _state(model)
    patch(model, recipe, backend=backend)
    try:
        yield model
    finally:
        _restore(model, former)


def check_model(model: Any) -> None:
    """Refuse what no recipe has a meaning for."""
    if not isinstance(model, PreTrainedModel):
        raise bad_kind("model", "must be a model of Transformers", model)
    config: Any = model.config
    why = []
    if config.get_text_config() is not config:
        why.append("it is made of several models; patch the language model inside, such as model.model.language_model")
    elif not any(_is_attention(module) for module in model.modules()):
        why.append("none of its modules is an attention layer of Transformers' AttentionInterface, with a layer_idx and is_causal")
    elif not all(hasattr(config, name) for name in ("num_hidden_layers", "num_attention_heads")):
        why.append("its configuration does not say how many layers and heads it has")
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        why.append("it has cross attention, which patterns have no meaning for")
    if getattr(config, "attention_chunk_size", None) is not None:
        why.append(f"it attends within chunks of {config.attention_chunk_size} tokens")
    if why:
        raise Unsupported("s2attn cannot serve this model", {type(model).__name__: why})


def _state(model: PreTrainedModel) -> tuple[Any, list[tuple[Any, str]]]:
    """The recipe by which a model runs at present, or None, and the backends of its attention modules."""
    spec = getattr(model.config, FIELD, None) if model.config._attn_implementation == NAME else None
    return spec, [(module, module.__dict__.get(BACKEND, "auto")) for module in model.modules() if _is_attention(module)]


def _restore(model: PreTrainedModel, state: tuple[Any, list[tuple[Any, str]]]) -> None:
    """Back to what a model was, with a recipe or without one."""
    spec, backends = state
    if spec is None:
        unpatch(model)
        return
    setattr(model.config, FIELD, spec)
    _forget_plans(model)
    for module, name in backends:
        module.__dict__[BACKEND] = name


def _is_attention(module: Any) -> bool:
    return (
        isinstance(getattr(module, "layer_idx", None), int) and getattr(module, "config", None) is not None and hasattr(module, "is_causal")
    )


def _plan_ahead(module: Any) -> None:
    """Plans of whole modules are made before the first call, so that compiled code finds them; those of slices wait for their tensors."""
    whole = module.config.num_attention_heads, kv_heads_of(module.config)
    if not any(hasattr(weight, "device_mesh") for weight in module.parameters()):
        keep_plan(module, *whole, window=None)


def _forget_plans(model: PreTrainedModel) -> None:
    for module in model.modules():
        module.__dict__.pop(KEPT, None)
