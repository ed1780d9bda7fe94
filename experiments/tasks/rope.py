"""Longer contexts than a model was trained on, by scaling its rotary positions."""

from __future__ import annotations

from dataclasses import replace

from experiments.model import LanguageModel, ModelConfig
from s2attn.core import bad_value

METHODS = ("interpolation", "ntk")


def stretched_config(config: ModelConfig, factor: float, method: str = "ntk") -> ModelConfig:
    """The configuration whose rotary positions reach ``factor`` times as far.

    Args:
        factor: 1 or more; the new length over the trained one.
        method: "interpolation" divides positions by the factor (arXiv:2306.15595); "ntk" raises the base to
            ``base * factor ** (d / (d - 2))``, so that the slowest angle is divided by the factor and the fastest is left alone
            (NTK-aware scaling; arXiv:2309.00071, section 3.1).

    >>> round(stretched_config(ModelConfig(head_dim=16), 4.0).rope_base)
    48761
    """
    if method not in METHODS:
        raise bad_value("method", f"must be one of {', '.join(METHODS)}", repr(method))
    if not factor >= 1:
        raise bad_value("factor", "must be 1 or more", factor)
    if method == "interpolation":
        return replace(config, rope_factor=config.rope_factor * factor)
    if config.head_dim < 4:
        raise bad_value("head_dim", "must be 4 at least for ntk, which leaves the first of several angles alone", config.head_dim)
    return replace(config, rope_base=config.rope_base * factor ** (config.head_dim / (config.head_dim - 2)))


def stretched(model: LanguageModel, factor: float, method: str = "ntk") -> LanguageModel:
    """A model with the same weights, copied, whose rotary positions reach ``factor`` times as far; see :func:`stretched_config`."""
    longer = LanguageModel(stretched_config(model.config, factor, method))
    longer.load_state_dict(model.state_dict())
    return longer.to(model.embedding.weight.device)
