"""Where the recipe of a served model stands, and which heads a rank holds; without vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2attn.backends import backend_names
from s2attn.core import Unsupported, bad_value
from s2attn.distributed.heads import head_range
from s2attn.integrations.spec import FIELD
from s2attn.layout import HeadRange

BACKEND_FIELD = "s2_attention_backend"


def find_recipe(configs: list[Any], additional: Any) -> Any:
    """What stands under ``s2_attention``: in a model's configurations, the innermost first, or in vLLM's ``additional_config``.

    Raises:
        ValueError: it stands nowhere, or two places disagree.

    >>> find_recipe([], {"s2_attention": "recipe"})
    'recipe'
    """
    found = [value for config in configs if (value := getattr(config, FIELD, None)) is not None][:1]
    if isinstance(additional, Mapping) and additional.get(FIELD) is not None:
        found.append(additional[FIELD])
    if not found:
        raise ValueError(
            f"{FIELD} must hold a recipe (s2attn.integrations.spec.to_spec writes one) in the model's config.json, in --hf-overrides, "
            "which makes a dense checkpoint sparse, or in --additional-config; got none. The recipe of Dense() leaves a model as it is"
        )
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError(f"{FIELD} must be the same in the model's configuration and in additional_config, or stand in one of them")
    return found[0]


def find_backend(additional: Any) -> str:
    """The backend of `s2attn.decode` that is asked for in vLLM's ``additional_config``, under ``s2_attention_backend``.

    >>> find_backend({"s2_attention_backend": "triton"}), find_backend(None)
    ('triton', 'auto')
    """
    name = additional.get(BACKEND_FIELD, "auto") if isinstance(additional, Mapping) else "auto"
    if name not in ("auto", *backend_names()):
        raise bad_value(BACKEND_FIELD, f"must be one of {', '.join(['auto', *backend_names()])}", repr(name))
    return name


def held_heads(rank: int, ranks: int, num_heads: int, num_kv_heads: int, total_kv_heads: int) -> HeadRange:
    """The heads of a layer that tensor-parallel rank ``rank`` of ``ranks`` holds.

    Args:
        num_heads, num_kv_heads: query and KV heads of this rank; a KV head is copied to several ranks where there are fewer than ranks.
        total_kv_heads: of the model.

    >>> held_heads(1, 2, num_heads=4, num_kv_heads=1, total_kv_heads=2)
    HeadRange(start=4, end=8, num_heads=8, num_kv_heads=2)
    """
    if num_kv_heads != max(1, total_kv_heads // ranks):
        reason = f"a layer has {num_kv_heads} KV heads on each of {ranks} ranks, the model {total_kv_heads}: heads must not differ by layer"
        raise Unsupported("s2attn cannot tell which heads a rank holds", {"vllm": [reason]})
    return head_range(rank, ranks, num_heads=ranks * num_heads, num_kv_heads=total_kv_heads)
