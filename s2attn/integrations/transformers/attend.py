"""The attention function for Transformers: shapes and places go in, `s2attn.attention` or `s2attn.decode` does the work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from s2attn.cache.checks import kept_pattern
from s2attn.core import Unsupported, bad_value
from s2attn.integrations.transformers.documents import Documents, find_documents
from s2attn.integrations.transformers.places import WINDOW, Places, read_places
from s2attn.integrations.transformers.plan import layer_plan
from s2attn.integrations.transformers.rows import as_pages, places_of, put, take
from s2attn.ops.attention import attention, autocast
from s2attn.ops.decode import decode
from s2attn.ops.step import Ask, LayerCall, current_step

PAGED = "_s2attn_pages"
"""The attribute of new keys by which `PastKeyValues` says that these go into its pages."""
MOST_DECODED = 16
_EVERYWHERE = Places()
_REFUSED = ("position_bias", "attention_bias", "head_mask", "layer_head_mask", "cache", "output_attentions")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention as Transformers asks for it, by the recipe in ``module.config.s2_attention``.

    Args:
        query, key, value: ``(B, H, T, D)``, ``(B, G, S, D)``, ``(B, G, S, Dv)``; KV heads are not repeated.
        attention_mask: None, or what our mask function made.
        sliding_window: the model's own window, which the pattern is cut to.
        softcap, s_aux: as ``softcap`` and ``sinks`` of `s2attn.attention`.
        cu_seq_lens_q: cumulative lengths of packed rows.

    Returns:
        ``(B, T, H, Dv)``, and None in the place of weights.

    Raises:
        Unsupported: dropout, weights as an output, a mask or a bias that no pattern can say, or whatever the ops refuse.
    """
    plan = layer_plan(module, query.shape[1], key.shape[1], sliding_window)
    causal = plan.causal if is_causal is None else bool(is_causal)
    _check_arguments(type(module).__name__, causal, dropout, sliding_window, more)
    call = LayerCall(plan.pattern, query.shape[1], key.shape[1], plan.layer, causal, plan.heads, scaling, softcap, s_aux, plan.backend)
    paged = getattr(key, PAGED, None)
    places = _EVERYWHERE
    if attention_mask is not None:
        places = read_places(attention_mask, query.shape[2], key.shape[2] if paged is None else key.shape[2] + paged.slots)
        if places.flags & WINDOW and sliding_window is None:
            raise Unsupported(
                "the model's mask is a window, of which its attention says nothing", {type(module).__name__: [f"{sliding_window=}"]}
            )
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    ask = current_step() if paged is None else None
    alone = places.keys is None and paged is None and ask is None
    if cu_seq_lens_q is not None and not alone:
        raise bad_value("cu_seq_lens_q", "must be given without padding or a cache", "both")
    position_ids = more.get("position_ids")
    if ask is not None:
        return _taken(ask, call, q, k, v, places, position_ids), None
    if cu_seq_lens_q is not None:
        documents = Documents(cu_seq_lens_q)
    else:
        shape = len(q), q.shape[1], k.shape[1] + (0 if paged is None else paged.slots)
        how = {"checks": plan.checks, "paged": paged is not None}
        documents = find_documents(position_ids, attention_mask, places, shape, **how)
    if paged is not None:
        return _paged(paged, call, q, k, v, places, documents), None
    if documents is not None:
        return _packed(call, q, k, v, documents), None
    if places.keys is not None and places.queries is not None:
        return _placed(call, query, key, value, places, places.keys, places.queries), None
    if query.shape[2] == key.shape[2] or not _decodes(query, key, value):
        return _attend(call, q, k, v), None
    slots = torch.full((len(key),), key.shape[2], device=key.device)
    return _decoded(call, query, key, value, places, slots, slots), None


def _check_arguments(name: str, causal: bool, dropout: float, sliding_window: int | None, more: dict[str, Any]) -> None:
    """Refuse what attention of the module called ``name`` asks for and no pattern can say."""
    if dropout:
        raise Unsupported("s2attn has no dropout", {name: [f"attention dropout {dropout}; set it to 0 in the config"]})
    for argument in _REFUSED:
        if more.get(argument) is not None and more[argument] is not False:
            raise Unsupported("s2attn cannot honour an argument of this attention", {name: [f"{argument} was given"]})
    if sliding_window is not None and not causal:
        raise Unsupported("windows that look both ways have several meanings", {name: ["not causal, sliding_window"]})


def _placed(call: LayerCall, query: Tensor, key: Tensor, value: Tensor, places: Places, keys: Tensor, queries: Tensor) -> Tensor:
    """Attention of rows with padding, or with slots behind their last token."""
    order = places.key_order
    if order is None or places.query_order is not None:
        return _decoded(call, query, key, value, places, keys, queries)
    q, k, v = (take(x.transpose(1, 2), order) for x in (query, key, value))
    if call.causal:
        out = _attend(call, q, k, v)
    else:  # real tokens and padding of a row are two sequences, which do not see each other
        first = torch.arange(len(q), device=q.device) * q.shape[1]
        cu = pad(torch.stack([first + keys, first + q.shape[1]], dim=1).flatten(), (1, 0))
        out = _attend_packed(call, q, k, v, cu)
    return put(out, order, places_of(q) < keys[:, None])


def _decoded(call: LayerCall, query: Tensor, key: Tensor, value: Tensor, places: Places, keys: Tensor, queries: Tensor) -> Tensor:
    """Queries at the end of the real keys of their rows: a cache seen as pages, in place where its length allows."""
    pattern = kept_pattern(call)
    batch, kv_heads, slots, _ = key.shape
    query, key, value = autocast(query, key, value)
    q, order = query.transpose(1, 2), places.query_order if query.shape[2] > 1 else None
    if order is not None:
        q = take(q, order)
    if places.key_order is not None:
        key, value = (take(x.transpose(1, 2), places.key_order).transpose(1, 2) for x in (key, value))
    length = -(-slots // 16) * 16
    size = next(size for size in (128, 64, 32, 16) if length % size == 0)
    k_pages, v_pages = (as_pages(x, length, size) for x in (key, value))
    table = torch.arange(batch * kv_heads * (length // size), device=key.device).view(batch, kv_heads, -1)
    how: Any = {"scale": call.scale, "softcap": call.softcap, "sinks": call.sinks, "layer": call.layer, "heads": call.heads}
    out = decode(q, k_pages, v_pages, pattern, block_table=table, seq_lens=keys, **how, backend=call.backend, validate=False)
    return out if order is None else put(out, order, places_of(q) >= q.shape[1] - queries[:, None])


def _packed(call: LayerCall, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Rows that hold several documents, one after another; padding gets 0."""
    kept = documents.queries
    if kept is None or documents.keys is None:
        if q.shape[:2] != k.shape[:2]:
            raise Unsupported("packed rows have no cache", {"cu_seq_lens_q": [f"{q.shape[1]} queries over {k.shape[1]} keys"]})
        return _attend_packed(call, q, k, v, documents.cu)
    new_q, (new_k, new_v) = q.flatten(0, 1)[kept], (x.flatten(0, 1)[documents.keys] for x in (k, v))
    out = _attend(call, new_q, new_k, new_v, documents.cu)
    return out.new_zeros(q.shape[0] * q.shape[1], *out.shape[1:]).index_copy(0, kept, out).unflatten(0, q.shape[:2])


def _paged(paged: Any, call: LayerCall, q: Tensor, k: Tensor, v: Tensor, places: Places, documents: Documents | None) -> Tensor:
    """Attention through pages, which get the last document of each row: later tokens continue that one and see no other."""
    if documents is None or documents.last is None:
        return paged.attend(call, q, k, v, places)
    last = documents.last
    order = torch.argsort(last.to(torch.int8), dim=1, stable=True)
    count = last.sum(1)
    kept = paged.attend(call, q, k, v, Places(places.flags, None, count, count, order, order))
    return torch.where(last[:, :, None, None], kept, _packed(call, q, k, v, documents))


def _attend(call: LayerCall, q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None = None) -> Tensor:
    how: Any = {"causal": call.causal, "scale": call.scale, "softcap": call.softcap, "sinks": call.sinks, "backend": call.backend}
    return attention(q, k, v, call.pattern, **how, cu_seqlens_q=cu, cu_seqlens_k=cu, layer=call.layer, heads=call.heads)


def _attend_packed(call: LayerCall, q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None) -> Tensor:
    return _attend(call, q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu).unflatten(0, q.shape[:2])


def _taken(ask: Ask, call: LayerCall, q: Tensor, k: Tensor, v: Tensor, places: Places, position_ids: Tensor | None) -> Tensor:
    """Attention through the `s2attn.SparseCache` whose step is on; the model must have been told the places of its tokens."""
    if places.keys is not None:
        raise bad_value("attention_mask", "must be left out while a SparseCache takes a step, which has counts for padding", "a mask")
    expected = ask("positions", q[:, :, 0, 0])
    if position_ids is not None and not torch.equal(position_ids.expand(len(expected), -1), expected):
        raise bad_value("position_ids", "must be s2attn.nn.positions(tokens) while a SparseCache takes a step", "others")
    return ask("attend", call, q, k, v)[0]


def _decodes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a few new tokens are better served by lists for all positions, which cost one copy of the keys, than by lists of their own.

    On a CPU a copy costs more than lists do.
    """
    wanted = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return query.device.type != "cpu" and query.shape[2] <= MOST_DECODED and not wanted
