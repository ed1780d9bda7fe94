"""`PastKeyValues`: a `s2attn.SparseCache` where Transformers wants its cache, so that memory falls as the recipe allows."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from s2attn.cache.ledger import Ledger, undoing
from s2attn.cache.needs import pattern_of
from s2attn.cache.sparse import SparseCache
from s2attn.core import Unsupported, bad_kind, bad_value, check_int
from s2attn.integrations.transformers.attend import PAGED
from s2attn.integrations.transformers.places import Places
from s2attn.ops.checks import autocast
from s2attn.ops.step import LayerCall


class PastKeyValues(Cache):
    """The pages of a `s2attn.SparseCache` as the ``cache`` of a patched model, for its forward and for ``generate``.

    Before Transformers 5.24 the argument is named ``past_key_values``; `CACHE_ARGUMENT` is the name that the installed version has.

    Every row of a batch is a sequence of the cache, however it is padded; the first call says how many rows there are. Beams share pages
    and copy what they change. It cannot be compiled: what is kept differs from step to step.

    >>> import torch, transformers, s2attn
    >>> config = transformers.LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    >>> model = s2attn.patch(transformers.LlamaForCausalLM(config).eval(), s2attn.Sink(4) | s2attn.Window(32))
    >>> past, prompt = PastKeyValues.for_model(model, max_tokens=2000), torch.arange(1000)[None] % 64
    >>> tokens = model.generate(prompt, min_new_tokens=8, max_new_tokens=8, do_sample=False, cache=past, pad_token_id=0)
    >>> tokens.shape, past.bytes_used < past.bytes_allocated < past.bytes_dense
    (torch.Size([1, 1008]), True)
    """

    def __init__(self, pages: SparseCache) -> None:
        if not isinstance(pages, SparseCache):
            raise bad_kind("pages", "must be a s2attn.SparseCache", pages)
        self._mine = [_Layer(self, layer) for layer in range(pages.num_layers)]
        super().__init__(layers=[*self._mine])
        self.pages = pages
        self.sequences: list[int] = []
        self.waiting: _Layer | None = None
        self.real: Tensor | None = None  # (rows, slots) bool, which slots are no padding; None where all are real

    @classmethod
    def for_model(cls, model: PreTrainedModel, **sizes: Any) -> PastKeyValues:
        """A cache for a patched model, which is run over one token to see its layers.

        Args:
            sizes: ``max_tokens``, ``sequences``, ``hold`` and so on, as of `s2attn.SparseCache.for_model`. Each layer takes a prompt in one
                piece, so that ``chunk``, the tokens that come at a time, is ``max_tokens`` by default. Together they say how many pages
                there may be at most; memory is allocated in steps, for those that are in use. With ``num_pages`` it is allocated at once.
        """
        if "num_pages" not in sizes:
            sizes = {"chunk": sizes.get("max_tokens"), **sizes}
        return cls(SparseCache.for_model(model, **sizes))

    @property
    def bytes_allocated(self) -> int:
        """Bytes of the memory that is allocated for pages, in use or not."""
        return self.pages.bytes_allocated

    @property
    def bytes_used(self) -> int:
        """Bytes of all pages in use; a shared page counts once."""
        return self.pages.bytes_used

    @property
    def bytes_dense(self) -> int:
        """What the same tokens take where every key is kept and nothing is shared."""
        return self.pages.bytes_dense

    def checkpoint(self, layer: int | None = None) -> Callable[[], None]:
        """Remember the rows, in one layer or in all; calling the result makes them what they were, and closes those that were opened."""
        undo, rows, real = self.pages.checkpoint(self.sequences, layer), self.sequences, self.real
        slots = [one.slots for one in self._mine]

        def everything() -> None:
            undo()
            self.sequences, self.real, self.waiting = rows, real, None
            for one, count in zip(self._mine, slots, strict=True):
                one.slots = count

        return everything

    def reset(self) -> None:
        """Give all pages back."""
        with undoing(self.checkpoint()):
            for sequence in self.sequences:
                self.pages.free(sequence)
            self.sequences, self.real, self.waiting = [], None, None
            for layer in self._mine:
                layer.slots, layer.record_past = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows, each as often as it is named."""
        with undoing(self.checkpoint()):
            kept = [self.pages.fork(self.sequences[row]) for row in beam_idx.tolist()]
            for sequence in self.sequences:
                self.pages.free(sequence)
            self.sequences = kept
            self.real = None if self.real is None else self.real[beam_idx.to(self.real.device)]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these rows."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Go on with every row so many times."""
        self.reorder_cache(torch.arange(len(self.sequences)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last slots of all rows back, given as a negative number; of a row that was padded there, only its real tokens.

        What one call of the model brought under assisted decoding, and ``hold`` tokens of the `s2attn.SparseCache`, can always be taken
        back; more, as long as nothing has been given back that the shorter rows read.

        Raises:
            ValueError: more than that. Nothing was changed.
        """
        slots = self._mine[0].slots
        if tokens_to_remove > 0 and not hasattr(CacheLayerMixin, "is_croppable"):
            tokens_to_remove = min(0, tokens_to_remove - slots)  # older versions give the length that stays
        if not -slots <= tokens_to_remove <= 0:
            raise bad_value("tokens_to_remove", f"must be negative, or 0, and at least -{slots}", tokens_to_remove)
        left = slots + tokens_to_remove
        with undoing(self.checkpoint()):
            counts = [-tokens_to_remove] * len(self.sequences) if self.real is None else self.real[:, left:].sum(1).tolist()
            for sequence, count in zip(self.sequences, counts, strict=True):
                self.pages.rollback(sequence, count)
                self.pages.trim(sequence)
            for layer in self._mine:
                layer.slots += tokens_to_remove
            self.real = None if self.real is None else self.real[:, :left]

    def open(self, rows: int) -> list[int]:
        """The sequences of a batch with so many rows."""
        if not self.sequences:
            self.sequences = [self.pages.open() for _ in range(check_int("rows", rows, 1))]
        if len(self.sequences) != rows:
            raise bad_value("batch", f"must have {len(self.sequences)} rows, those of the cache; reset() empties it", rows)
        return self.sequences

    def check_room(self, counts: list[int]) -> None:
        """Check, before any layer changes, that all layers have room for new tokens of the rows.

        Layers give pages back one after another, so that a later layer can take what an earlier one
        gave back: where the free pages do not suffice for all layers at once, a copy of the ledger
        goes through the layers. Pages that move between memories are not foreseen.

        Raises:
            CacheFull: not enough pages. Nothing was changed: make room and repeat the call.
            ValueError: layers of different lengths, after a call of the model that an error ended.
        """
        if len({layer.slots for layer in self._mine}) > 1:
            rule = "must have layers of one length: an error ended the last call; reset() empties it"
            raise bad_value("past", rule, [layer.slots for layer in self._mine])
        ledger, pages = self.pages.ledger, self.pages
        most = sum(count // pages.page_size + 2 for count in counts) * pages.num_kv_heads
        enough = most * pages.num_layers <= pages.num_pages - ledger.used_pages
        if enough or type(ledger) is not Ledger:
            return
        trial = deepcopy(ledger)
        rows = self.sequences or [trial.open() for _ in counts]
        for layer in range(pages.num_layers):
            trial.reserve(layer, list(zip(rows, counts, strict=True)))
            for row in [] if self._mine[layer].record_past else rows:
                trial.trim(row, layer)


class _Layer(CacheLayerMixin):
    """One layer: keys wait until attention comes for them, since only then it is known which of them are padding."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, past: PastKeyValues, layer: int) -> None:
        super().__init__()
        self.past, self.layer, self.slots = past, layer, 0
        self.record_past = False  # keep what a call of the model brought until a crop; Transformers' name

    @property
    def is_croppable(self) -> bool:  # pyrefly: ignore[bad-override]
        """Whether the last tokens can be taken back."""
        return self.record_past or self.past.pages.hold > 0

    def activate_past_recording(self) -> None:
        """Transformers says so where it will take tokens back."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        waiting, self.past.waiting = self.past.waiting, None
        # A call that begins anew comes after one that an error ended.
        if waiting is not None and (self.layer > waiting.layer or self.past.pages.num_layers == 1):
            why = f"nobody attended to the keys of layer {waiting.layer}: the model does not run on s2attn, or changes keys on their way"
            raise Unsupported("PastKeyValues serves models that s2attn.patch has patched", {"model": [why]})
        self.past.waiting = self
        setattr(key_states, PAGED, self)
        return key_states, value_states

    def attend(self, call: LayerCall, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        """Store the real ones of the new keys, and attend; all of it or nothing."""
        for sequence in self.past.sequences:  # before, since pages that are taken again cannot be brought back
            self.past.pages.ledger.trim(sequence, self.layer)
        with undoing(self.past.checkpoint(self.layer)):
            self._check(call, places)
            if q.requires_grad and torch.is_grad_enabled():
                raise Unsupported("a cache has no gradient", {"autograd": ["call the model under torch.no_grad()"]})
            if self.layer == 0:
                every = [q.shape[1]] * len(q)
                self.past.check_room(every if places.queries is None else places.queries.tolist())
            q, k, v = autocast(q, k, v)
            out, real = self._attend(call, q, k, v, places)
            if self.layer == 0:
                self._note_padding(real, q)
            self.slots += q.shape[1]
            self.past.waiting = None
            return out

    def _attend(self, call: LayerCall, q: Tensor, k: Tensor, v: Tensor, places: Places) -> tuple[Tensor, Tensor | None]:
        """The result, and which of the new slots are real, ``(B, T)``; None where all are."""
        pages, sequences = self.past.pages, self.past.open(len(q))
        how: Any = {
            "scale": call.scale,
            "softcap": call.softcap,
            "sinks": call.sinks,
            "backend": call.backend,
            "trim": not self.record_past,
        }
        if places.key_order is None or places.queries is None:
            return pages.attend(sequences, self.layer, q, k, v, **how), None
        real = _real(places.key_order, places.query_order, places.queries, q)
        kept = real.flatten().nonzero()[:, 0]
        new_q, new_k, new_v = (x.flatten(0, 1)[kept] for x in (q, k, v))
        cu = torch.nn.functional.pad(places.queries.cumsum(0), (1, 0))
        packed = pages.attend(sequences, self.layer, new_q, new_k, new_v, cu_seqlens_q=cu, **how)
        out = packed.new_zeros(q.shape[0] * q.shape[1], *packed.shape[1:]).index_copy(0, kept, packed)
        return out.unflatten(0, q.shape[:2]), real

    def _note_padding(self, real: Tensor | None, q: Tensor) -> None:
        """Remember which slots are padding, for :meth:`PastKeyValues.crop`."""
        known = self.past.real
        if real is None and known is None:
            return
        before = torch.ones(len(q), self.slots, dtype=torch.bool, device=q.device) if known is None else known
        new = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if real is None else real
        self.past.real = torch.cat([before, new], dim=1)

    def _check(self, call: LayerCall, places: Places) -> None:
        pages, why = self.past.pages, []
        mine = pattern_of(pages.pattern, self.layer)
        if call.pattern != mine:
            why.append(f"layer {self.layer} sees {call.pattern}, the cache was made for {mine}")
        if (call.num_heads, call.num_kv_heads, call.heads) != (pages.num_heads, pages.num_kv_heads, pages.heads):
            why.append(f"{call.num_heads} over {call.num_kv_heads} heads ({call.heads}), the cache has others")
        if not call.causal:
            why.append("attention that is not causal")
        if places.cu is not None:
            why.append("packed rows")
        if why:
            raise Unsupported("this cache does not serve this model", {"PastKeyValues": why})

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Pages are there already."""
        self.is_initialized = True

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.slots + new, 0

    def get_seq_length(self, *args: Any) -> int:
        return self.slots

    def get_max_length(self) -> int:
        return self.past.pages.max_tokens

    get_max_cache_shape = get_max_length


def _real(key_order: Tensor, query_order: Tensor | None, queries: Tensor, q: Tensor) -> Tensor:
    """Which queries ``(B, T)`` are no padding."""
    tokens, place = q.shape[1], torch.arange(q.shape[1], device=q.device)
    if query_order is None:
        order, real = key_order, place < queries[:, None]
    else:
        order, real = query_order, place >= tokens - queries[:, None]
    return torch.zeros_like(real).scatter(1, order, real)
