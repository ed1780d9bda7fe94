"""How Transformers gets to know s2attn: an attention function, a mask function, and configurations that say so when they are saved."""

from __future__ import annotations

from inspect import signature
from typing import Any

import transformers
from transformers.masking_utils import AttentionMaskInterface, create_causal_mask
from transformers.modeling_utils import AttentionInterface

from s2attn.core import Unsupported
from s2attn.integrations.transformers.attend import attention_forward
from s2attn.integrations.transformers.places import make_places

NAME = "s2attn"
"""The value of ``attn_implementation``."""
OLDEST = (4, 56)
"""The oldest version of Transformers that is tested."""
CACHE_ARGUMENT = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"
"""The argument of a model's forward and of ``generate`` that takes a cache: ``cache`` from Transformers 5.24 on."""
_NEXT = 6
_SAVED = ("attn_implementation", "_attn_implementation")  # before 5.23 or so the first one is ignored when a model is loaded


def register() -> None:
    """Make ``attn_implementation="s2attn"`` known to Transformers; once is enough, and more do no harm.

    A model loaded so runs by the recipe in ``config.s2_attention`` and refuses to run without one. Transformers does not save which
    implementation a model uses, and would load it silently dense: from now on configurations of such models write it down, so that loading
    them raises where this function has not been called.

    Raises:
        Unsupported: a version of Transformers outside of what is tested.
    """
    check_version(transformers.__version__)
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_places)
    config: Any = getattr(transformers, "PreTrainedConfig", None) or transformers.PretrainedConfig
    if not getattr(config.to_dict, "says_s2attn", False):
        config.to_dict = _saying(config.to_dict)


def check_version(version: str) -> None:
    """Refuse versions of Transformers that nobody has tried.

    >>> check_version("5.23.0")
    """
    major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:2])
    if not OLDEST <= (major, minor) < (_NEXT, 0):
        why = f"version {version}; tested from {OLDEST[0]}.{OLDEST[1]} up to {_NEXT}, not included"
        raise Unsupported("s2attn does not know this version of Transformers", {"transformers": [why]})


def _saying(to_dict: Any) -> Any:
    def to_dict_with_implementation(self: Any) -> dict[str, Any]:
        output = to_dict(self)
        inside = {name: NAME for name in self.sub_configs if _runs(getattr(self, name, None))}
        if _runs(self) or inside:
            output |= dict.fromkeys(_SAVED, NAME if _runs(self) else inside)
        return output

    to_dict_with_implementation.says_s2attn = True  # pyrefly: ignore[missing-attribute]
    to_dict_with_implementation.__doc__ = to_dict.__doc__
    return to_dict_with_implementation


def _runs(config: Any) -> bool:
    """Whether a model of this configuration runs on s2attn."""
    return getattr(config, "_attn_implementation_internal", None) == NAME
