"""What Megatron offers and s2attn does not honour: everything that would be a silently different result is refused with its reason."""

from __future__ import annotations

from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from s2attn.core import Unsupported

CAUSAL = {AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.causal_bottom_right}

_TITLE = "S2CoreAttention cannot stand in for this attention"

# What must hold of a field of the configuration, and what to do where it does not.
_FIELDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "window_size": ((None,), "write the window into the recipe, as Window(n)"),
    "softmax_type": (("vanilla", "off-by-one", "learnable"), "no other softmax is known"),
    "attention_backend": ((AttnBackend.auto, AttnBackend.local), "the kernel is chosen by s2attn: with_s2(..., backend=)"),
    "qk_clip": ((False, None), "the largest logits are not returned"),
    "log_max_attention_logit": ((False, None), "the largest logits are not returned"),
    "multi_latent_attention": ((False, None), "latent attention has another core attention"),
    "fp8_dot_product_attention": ((False, None), "attention runs in the dtype of its tensors"),
    "fp8_multi_head_attention": ((False, None), "attention runs in the dtype of its tensors"),
    "use_kitchen_attention": ((False, None), "it asks for another core attention"),
    "flash_decode": ((False, None), "it passes the core attention by, so that decoding would be dense"),
    "batch_invariant_mode": ((False, None), "equal bits for every size of a batch are not promised"),
    "hybrid_context_parallel": ((False, None), "the context-parallel group must be one for all batches"),
    "mtp_num_layers": ((None, 0), "its layers count from 1 again, so that a recipe cannot tell them from the first ones"),
}
_COMMUNICATION = (None, "p2p", "all_gather")


def refuse_config(config: TransformerConfig, attention_type: str, dropout: float, cp_comm_type: Any, channels: tuple[Any, Any]) -> None:
    """Refuse a configuration that asks for what is not honoured.

    Args:
        config: of the model.
        attention_type: "self" or "cross".
        dropout: probability of attention dropout that holds for this layer.
        cp_comm_type: how context-parallel ranks exchange keys.
        channels: ``k_channels`` and ``v_channels`` of latent attention.

    Raises:
        Unsupported: with one reason for every field.
    """
    reasons = {}
    for name, (honoured, why) in _FIELDS.items():
        value = getattr(config, name, honoured[0])
        if value not in honoured:
            reasons[name] = [f"{why}; got {value}"]
    if dropout:
        reasons["attention_dropout"] = [f"must be 0, since attention weights are never written down; got {dropout}"]
    if attention_type != "self":
        reasons["attention_type"] = [f"must be 'self', since recipes are for the queries and keys of one sequence; got {attention_type!r}"]
    if config.context_parallel_size > 1 and cp_comm_type not in _COMMUNICATION:
        reasons["cp_comm_type"] = [f"must be left out, 'p2p' or 'all_gather' (keys are gathered in every case); got {cp_comm_type!r}"]
    if channels != (None, None):
        reasons["k_channels and v_channels"] = [f"must be left out: latent attention is not supported; got {channels}"]
    if reasons:
        raise Unsupported(_TITLE, reasons)


def is_causal(layer_type: AttnMaskType, asked: AttnMaskType | None, lengths: tuple[int, int], packed: bool) -> bool:
    """Whether a call is causal with its queries at the end of the keys; masks that are neither this nor open to all are refused.

    Args:
        layer_type, asked: the mask type of the layer and of the call (None: the layer's).
        lengths: queries and keys in the tensors.
        packed: whether they are packed sequences.
    """
    mask_type = layer_type if asked is None else asked
    queries, keys = lengths
    reasons = []
    if mask_type not in CAUSAL | {AttnMaskType.no_mask, AttnMaskType.padding}:
        reasons.append(f"{mask_type} needs a mask, and a recipe is the mask")
    elif mask_type in (AttnMaskType.padding, AttnMaskType.padding_causal) and not packed:
        reasons.append(f"{mask_type} is for padded batches: pack the sequences (PackedSeqParams with qkv_format='thd')")
    elif queries != keys and layer_type in CAUSAL and mask_type == AttnMaskType.no_mask and queries == 1:
        return True  # one new token after cached ones sees all of them, as Megatron's no_mask says: they are all before it
    elif queries != keys and mask_type != AttnMaskType.causal_bottom_right:
        reasons.append(f"{mask_type} of {queries} queries and {keys} keys does not say where the queries stand")
    elif mask_type in (AttnMaskType.no_mask, AttnMaskType.padding) and layer_type in CAUSAL:
        reasons.append(f"{mask_type} in a layer that was made as {layer_type}")
    if reasons:
        raise Unsupported(_TITLE, {"attn_mask_type": reasons})
    return mask_type in CAUSAL


def refuse_call(attention_mask: Tensor | None, attention_bias: Tensor | None, packed: PackedSeqParams | None) -> None:
    """Refuse masks and biases as tensors, and packings that are not understood.

    Raises:
        Unsupported: with every reason.
    """
    reasons = {}
    if attention_mask is not None:
        why = "must be None, since a recipe is the mask; Megatron-LM makes none with --no-create-attention-mask-in-dataloader"
        reasons["attention_mask"] = [f"{why}; got one of shape {tuple(attention_mask.shape)}"]
    if attention_bias is not None:
        reasons["attention_bias"] = [f"must be None; got one of shape {tuple(attention_bias.shape)}"]
    if packed is not None:
        if packed.qkv_format != "thd":
            reasons["packed_seq_params.qkv_format"] = [f"must be 'thd'; got {packed.qkv_format!r}"]
        if packed.cp_group is not None or packed.local_cp_size is not None:
            reasons["packed_seq_params.cp_group"] = ["must be None, as local_cp_size: the group of the model holds for all batches"]
    if reasons:
        raise Unsupported(_TITLE, reasons)
