"""`S2CoreAttention`: the place of Megatron's ``core_attention``, between the projections of a layer, taken by a recipe."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from s2attn.core import Unsupported, bad_kind, bad_value, check_int
from s2attn.integrations.megatron.refusals import is_causal, refuse_call, refuse_config
from s2attn.integrations.megatron.zigzag import zigzag_attention
from s2attn.integrations.spec import FIELD, read_spec
from s2attn.layout import HeadRange
from s2attn.ops import attention
from s2attn.patterns import Recipe


class S2CoreAttention(MegatronModule):
    """Attention of one Megatron layer over the keys that a recipe lets each head see.

    `with_s2` puts it into a layer spec; by hand it is ``ModuleSpec(module=S2CoreAttention, params={"recipe": recipe})`` in the place of
    ``core_attention``. Heads are addressed globally, so that a recipe means the same under every tensor-parallel size, and layers by
    their global number. Under context parallelism tokens lie zigzag over the ranks, as Megatron lays them.

    Args:
        config: of the model; its ``s2_attention`` is the recipe where none is given.
        layer_number: global, counted from 1.
        attn_mask_type, attention_type, attention_dropout, softmax_scale, cp_comm_type, pg_collection: as Megatron passes them.
        k_channels, v_channels: of latent attention, which is refused.
        recipe: as `s2attn.integrations.spec.read_spec` takes it.
        num_kv_heads: key/value heads of the whole model; needed where it cannot be told from ``config.num_query_groups``, which Megatron
            raises to the tensor-parallel size when that is larger.
        backend: as in `s2attn.attention`.

    Raises:
        Unsupported: a feature that is not honoured, with every reason.
        ValueError, TypeError: no recipe, or one for another model.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        recipe: Any = None,
        num_kv_heads: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        refuse_config(config, attention_type, dropout, cp_comm_type, (k_channels, v_channels))
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.tp_group = groups.tp
        self.cp_group = groups.cp if config.context_parallel_size > 1 else None
        if self.cp_group is not None and self.cp_group.size() != config.context_parallel_size:
            raise bad_value(
                "pg_collection.cp", f"must have context_parallel_size ({config.context_parallel_size}) ranks", self.cp_group.size()
            )
        self.attn_mask_type, self.softmax_scale, self.backend = attn_mask_type, softmax_scale, backend
        self.layer = check_int("layer_number", layer_number, 1) - 1
        kv_heads = whole_kv_heads(config, groups.tp.size(), num_kv_heads)
        self.pattern = find_recipe(config, recipe, kv_heads).pattern(self.layer)
        held = config.num_attention_heads // groups.tp.size()
        first = groups.tp.rank() * held
        self.heads = HeadRange(first, first + held, config.num_attention_heads, kv_heads)
        self._add_sinks(config, held)

    def _add_sinks(self, config: TransformerConfig, held: int) -> None:
        """One logit for each local head that joins the softmax denominator, under the name that Megatron's own attention gives it."""
        if config.softmax_type == "vanilla":
            self.softmax_offset = None
            return
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        zeros = torch.zeros(held, dtype=config.params_dtype, device=device)
        if config.softmax_type == "off-by-one":
            self.register_buffer("softmax_offset", zeros, persistent=False)
            return
        self.softmax_offset = nn.Parameter(zeros)
        set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)
        if config.perform_initialization:
            config.init_method(self.softmax_offset)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend: ``[s, b, heads, head_dim]`` to ``[s, b, heads * head_dim]``, or packed, without the axis b.

        Raises:
            Unsupported: a mask, a bias or a kind of mask that a recipe does not stand for; with every reason.
        """
        refuse_call(attention_mask, attention_bias, packed_seq_params)
        causal = is_causal(self.attn_mask_type, attn_mask_type, (query.shape[0], key.shape[0]), packed_seq_params is not None)
        cu_seqlens = None if packed_seq_params is None else packed_lengths(packed_seq_params, causal)

        def attend(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[Tensor, Tensor] | None) -> Tensor:
            how: dict[str, Any] = {
                "causal": causal,
                "scale": self.softmax_scale,
                "sinks": self.softmax_offset,
                "layer": self.layer,
                "heads": self.heads,
                "backend": self.backend,
            }
            if lengths is not None:
                return attention(q, k, v, self.pattern, cu_seqlens_q=lengths[0], cu_seqlens_k=lengths[1], **how)
            return attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), self.pattern, **how).transpose(0, 1)

        if self.cp_group is None:
            out = attend(query, key, value, None if cu_seqlens is None else (cu_seqlens, cu_seqlens))
        else:
            if not causal or query.shape[0] != key.shape[0]:
                reason = "only causal attention over whole sequences is spread over ranks"
                raise Unsupported("S2CoreAttention cannot run under context parallelism", {"attn_mask_type": [reason]})
            out = zigzag_attention(query, key, value, attend, self.cp_group, cu_seqlens)
        return out.flatten(-2).contiguous()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The learned sinks, if there are any, split over tensor-parallel ranks as Megatron's own attention splits them."""
        state = self.state_dict(prefix="", keep_vars=True)
        groups = {"tp_group": self.tp_group, "dp_cp_group": ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(state, prefix, {"softmax_offset": 0}, sharded_offsets, **groups)

    def extra_repr(self) -> str:
        return f"{self.pattern!r}, layer={self.layer}, heads={self.heads.start}..{self.heads.end - 1} of {self.heads.num_heads}"


def whole_kv_heads(config: TransformerConfig, ranks: int, given: int | None) -> int:
    """Key/value heads of the whole model; Megatron's core attention is told of at least one for each tensor-parallel rank."""
    if given is None:
        if 1 < ranks == config.num_query_groups:
            rule = (
                f"must be given where num_query_groups is the tensor-parallel size ({ranks}), since the model may have fewer; with_s2 does"
            )
            raise bad_value("num_kv_heads", rule, None)
        return config.num_query_groups
    if max(check_int("num_kv_heads", given, 1), ranks) != config.num_query_groups and given != config.num_query_groups:
        raise bad_value("num_kv_heads", f"must be num_query_groups of the model ({config.num_query_groups})", given)
    return given


def find_recipe(config: TransformerConfig, recipe: Any, num_kv_heads: int) -> Recipe:
    """The recipe that was given, or the one in the configuration; two that differ are refused."""
    shape = {"num_layers": config.num_layers, "num_heads": config.num_attention_heads, "num_kv_heads": num_kv_heads}
    kept = getattr(config, FIELD, None)
    if recipe is None and kept is None:
        raise bad_kind("recipe", f"must be given, or stand in config.{FIELD}", None)
    found = read_spec(kept if recipe is None else recipe, **shape)
    if recipe is not None and kept is not None and read_spec(kept, **shape) != found:
        raise bad_value("recipe", f"must be the one in config.{FIELD} where both are there", found)
    return found


def packed_lengths(packed: PackedSeqParams, causal: bool) -> Tensor:
    """The cumulative lengths of packed sequences, with the padding behind each where there is some: causal queries never see it."""
    reasons = []
    pairs = {"cu_seqlens": (packed.cu_seqlens_q, packed.cu_seqlens_kv)}
    if packed.cu_seqlens_q_padded is not None or packed.cu_seqlens_kv_padded is not None:
        pairs["cu_seqlens_padded"] = (packed.cu_seqlens_q_padded, packed.cu_seqlens_kv_padded)
        if not causal:
            reasons.append("padding between sequences would be seen by queries that are not causal")
    for name, (of_queries, of_keys) in pairs.items():
        if of_queries is not of_keys and (of_queries is None or of_keys is None or not torch.equal(of_queries, of_keys)):
            reasons.append(f"{name} must be the same for queries and keys")
    if reasons:
        raise Unsupported("S2CoreAttention cannot use these packed sequences", {"packed_seq_params": reasons})
    return pairs[list(pairs)[-1]][0]
