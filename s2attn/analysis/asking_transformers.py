"""Models of Transformers, looked at through its attention interface; nothing of them is changed for longer than one text."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from s2attn.analysis.asking import Asked, Layer, Visit, found_layers
from s2attn.cache.probe import device_of
from s2attn.core import Unsupported, bad_value
from s2attn.patterns import Dense

PREFIX = "s2attn_looks_at_"
INTERNAL = "_attn_implementation_internal"


def is_hosted(model: Any) -> bool:
    """Whether it is a model of Transformers; that library is not loaded to find out."""
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(model, library.PreTrainedModel)


@dataclass(eq=False)
class Hosted:
    """A causal language model of Transformers, with whatever implementation of attention it has been given."""

    model: Any

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        found = found_layers(self, self.model)
        expected = getattr(self.model.config.get_text_config(), "num_hidden_layers", len(found))
        if expected != len(found):
            why = f"{len(found)} of its {expected} layers ask the attention interface"
            raise Unsupported("this model's attention cannot be looked at", {type(self.model).__name__: [why]})
        return found

    @torch.no_grad()
    def logits(self, text: Tensor, visit: Visit, rows: int) -> Tensor:
        forward = inspect.signature(self.model.forward).parameters
        how = {"logits_to_keep": rows} if "logits_to_keep" in forward else {}
        known = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        if known is not None and int(text.max()) >= known:
            raise bad_value("tokens", f"must be below {known}, the vocabulary of the model", int(text.max()))
        tokens = text[None].to(device_of(self.model, text.device))
        with looking(self.model, visit):
            out = self.model(input_ids=tokens, use_cache=False, **how)
        if not isinstance(getattr(out, "logits", None), Tensor) or out.logits.dim() != 3:
            why = "it returns no logits (B, T, vocabulary)"
            raise Unsupported("only causal language models can be judged", {type(self.model).__name__: [why]})
        return out.logits[0, -rows:]


@contextmanager
def looking(model: Any, visit: Visit) -> Iterator[None]:
    """Let ``visit`` see every layer's question while the model runs inside the block.

    Each implementation that the model uses gets a stand-in with the same masks, under a name of its own.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    configs = {id(module.config): module.config for module in model.modules() if hasattr(getattr(module, "config", None), INTERNAL)}
    before = {number: getattr(config, INTERNAL) for number, config in configs.items()}
    functions, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    added = {f"{PREFIX}{name}": name for name in before.values() if name is not None}
    try:
        for stand_in, name in added.items():
            functions[stand_in] = _stand_in(name, visit)
            if name in masks:
                masks[stand_in] = masks[name]
        for number, config in configs.items():
            if before[number] is not None:
                setattr(config, INTERNAL, f"{PREFIX}{before[number]}")
        yield
    finally:
        for number, config in configs.items():
            setattr(config, INTERNAL, before[number])
        for stand_in in added:
            functions.pop(stand_in, None)
            masks.pop(stand_in, None)


def _stand_in(name: str, visit: Visit) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def forward(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        def own() -> Any:
            return _implementation(module, name)(module, query, key, value, attention_mask, *args, **kwargs)

        layer = getattr(module, "layer_idx", None)
        if layer is None or not _causal(module, kwargs):
            return own()  # an encoder beside the language model
        answers: list[Any] = []

        def answer() -> Tensor:
            if not answers:
                answers.append(own())
            return answers[0][0]

        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        scoring = {"scale": kwargs.get("scaling"), "softcap": kwargs.get("softcap")}
        asked = Asked(layer, q, k, v, Dense(), scoring, kwargs.get("s_aux"), _refusal(kwargs, q, k), answer, foreign=True)
        pattern = visit(asked)
        if pattern is None or pattern == asked.own:
            answer()
            return answers[0]
        return asked.attend(pattern)[0], None

    return forward


def _implementation(module: Any, name: str) -> Callable[..., Any]:
    """The attention function that the module would have called itself."""
    source = sys.modules[type(module).__module__]
    if name == "eager":
        return source.eager_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return getattr(source, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)[name]


def _causal(module: Any, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _refusal(kwargs: dict[str, Any], q: Tensor, k: Tensor) -> str | None:
    window, length = kwargs.get("sliding_window"), q.shape[1]
    reasons = {
        f"it sees a sliding window of {window} tokens only": window is not None and window < length,
        "it adds a bias to its scores": kwargs.get("position_bias") is not None,
        f"it sees {k.shape[1]} keys with {length} queries": k.shape[1] != length,
    }
    return "; ".join(why for why, holds in reasons.items() if holds) or None
