"""Megatron-core: a core attention that follows a recipe, put into the layer spec of a GPT model."""

from s2attn.integrations.megatron.versions import check_version  # isort: skip - it asks before anything else of Megatron is touched

check_version()

from s2attn.integrations.megatron.core_attention import S2CoreAttention  # noqa: E402
from s2attn.integrations.megatron.layer_spec import S2SelfAttention, with_s2  # noqa: E402

__all__ = ["S2CoreAttention", "S2SelfAttention", "check_version", "with_s2"]
