"""`with_s2`: a recipe put into the layer spec of a Megatron model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from s2attn.core import Unsupported, bad_kind
from s2attn.integrations.megatron.core_attention import S2CoreAttention, find_recipe
from s2attn.integrations.megatron.refusals import refuse_config
from s2attn.integrations.spec import to_spec


class S2SelfAttention(SelfAttention):
    """Megatron's self-attention without the two ways around its core attention, which would make generation silently dense."""

    def flash_decode(self, *args: Any, **kwargs: Any) -> Any:
        """Refused."""
        raise Unsupported("generation would be dense", {"flash_decode": ["it passes the core attention by"]})

    def flash_decode_and_prefill(self, *args: Any, **kwargs: Any) -> Any:
        """Refused."""
        reason = "it passes the core attention by; use a StaticInferenceContext, or serve the model in vLLM"
        raise Unsupported("generation would be dense", {"dynamic batching": [reason]})


def with_s2(spec: ModuleSpec | TransformerBlockSubmodules, config: TransformerConfig, recipe: Any = None, *, backend: str = "auto") -> Any:
    """A copy of a layer spec, or of a block of them, whose self-attention follows a recipe.

    Args:
        spec: of a transformer layer, as ``get_gpt_layer_local_spec`` and ``get_gpt_layer_with_transformer_engine_spec`` make it, or the
            ``TransformerBlockSubmodules`` of ``get_gpt_decoder_block_spec``. It is not changed.
        config: of the model that will be built from it.
        recipe: a `Recipe`, a `Pattern`, or their JSON; by default ``config.s2_attention``.
        backend: as in `s2attn.attention`.

    Raises:
        Unsupported: a layer without the self-attention that is known, or a feature of the configuration that is not honoured.
        ValueError, TypeError: no spec, no recipe, or one for another number of layers or heads.
    """
    refuse_config(config, "self", config.attention_dropout, None, (None, None))
    found = find_recipe(config, recipe, config.num_query_groups)
    params = {"recipe": to_spec(found), "num_kv_heads": config.num_query_groups, "backend": backend}
    if isinstance(spec, TransformerBlockSubmodules):
        return replace(spec, layer_specs=[_with_core(layer, params) for layer in spec.layer_specs or []])
    return _with_core(spec, params)


def _with_core(spec: Any, params: dict[str, Any]) -> ModuleSpec:
    if not isinstance(spec, ModuleSpec):
        raise bad_kind("spec", "must be the ModuleSpec of a transformer layer, or TransformerBlockSubmodules", spec)
    attention: Any = getattr(spec.submodules, "self_attention", None)
    module = getattr(attention, "module", None)
    if module not in (SelfAttention, S2SelfAttention):
        reason = f"self_attention must be a ModuleSpec of Megatron's SelfAttention; got {getattr(module, '__name__', attention)}"
        raise Unsupported("with_s2 does not know this layer", {"spec": [reason]})
    core = replace(attention.submodules, core_attention=ModuleSpec(module=S2CoreAttention, params=params))
    sparse = replace(attention, module=S2SelfAttention, submodules=core)
    return replace(spec, submodules=replace(spec.submodules, self_attention=sparse))
