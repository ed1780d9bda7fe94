"""`Phi3SmallConfig`: what a ``config.json`` of Phi-3-small says, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from s2attn.core import Unsupported, bad_kind, bad_value, check_int
from s2attn.integrations.spec import FIELD, read_spec
from s2attn.patterns import Recipe
from s2attn.patterns.phi3small import check_model_type

PUBLISHED_VOCABULARY = 100352
# Numbers of the published vocabulary that stand for no token: the paddings, and the special tokens that were never trained.
PUBLISHED_UNUSED = (100256, 100258, 100259, 100260, 100264, 100265, *range(100267, PUBLISHED_VOCABULARY))


@dataclass(frozen=True)
class LongRope:
    """How a model of long texts turns its heads: a factor for each pair of channels, in short and in long texts (arXiv:2402.13753).

    Attributes:
        short_factor, long_factor: ``head_dim / 2`` numbers; a pair turns slower by its factor.
        original_max_position_embeddings: texts of up to so many tokens are short.
        short_mscale, long_mscale: multiply cosine and sine; negative ones say that the rule of the paper gives the number.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    short_mscale: float = -1.0
    long_mscale: float = -1.0

    @classmethod
    def read(cls, given: Any, head_dim: int) -> LongRope:
        """The object under ``rope_scaling`` in a configuration."""
        known = {one.name for one in fields(cls)}
        if not isinstance(given, Mapping) or given.get("type") not in ("longrope", "su") or set(given) - known - {"type"}:
            raise bad_value("rope_scaling", f"must be an object of the type longrope with {', '.join(sorted(known))}", repr(given)[:80])
        settings = {name: value for name, value in given.items() if name != "type"}
        for name in ("short_factor", "long_factor"):
            factors = settings.get(name)
            if not isinstance(factors, Sequence) or len(factors) != head_dim // 2 or not all(_is_positive(one) for one in factors):
                raise bad_value(f"rope_scaling {name}", f"must be {head_dim // 2} numbers above 0", repr(factors)[:80])
            settings[name] = tuple(float(one) for one in factors)
        check_int("rope_scaling original_max_position_embeddings", settings.get("original_max_position_embeddings"), 2)
        return cls(**settings)

    def size(self, context: int, longest: int) -> float:
        """What cosine and sine are multiplied by in a model for texts of up to ``context`` of ``longest`` tokens."""
        if context <= self.original_max_position_embeddings:
            return self.short_mscale if self.short_mscale > 0 else 1.0
        if self.long_mscale > 0:
            return self.long_mscale
        grown = longest / self.original_max_position_embeddings
        return 1.0 if grown <= 1 else math.sqrt(1 + math.log(grown) / math.log(self.original_max_position_embeddings))


@dataclass(frozen=True)
class Phi3SmallConfig:
    """A Phi-3-small model (arXiv:2404.14219) in the names of its ``config.json``; fields that change nothing are left out.

    Read one with :meth:`from_dict`. Fields without a default must be there. ``ff_dim_multiplier`` gives the width of the feed-forward part
    where ``ff_intermediate_size`` does not; ``dummy_token_indices`` are numbers of the vocabulary that stand for no token, by default
    those of the published vocabulary; ``s2_attention`` is a recipe that takes the place of the model's own.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rope_embedding_base: float
    layer_norm_epsilon: float
    gegelu_limit: float | None
    mup_use_scaling: bool
    mup_attn_multiplier: float
    mup_embedding_multiplier: float | None
    mup_width_multiplier: float | None
    blocksparse_block_size: int
    blocksparse_num_local_blocks: int
    blocksparse_vert_stride: int
    blocksparse_homo_head_pattern: bool
    dense_attention_every_n_layers: int | None
    ff_intermediate_size: int | None = None
    ff_dim_multiplier: int | None = None
    gegelu_pad_to_256: bool = True
    hidden_act: str = "gegelu"
    rope_position_scale: float = 1.0
    rope_scaling: LongRope | None = None
    embedding_dropout_prob: float = 0.0
    ffn_dropout_prob: float = 0.0
    attention_dropout_prob: float = 0.0
    tie_word_embeddings: bool = True
    dummy_token_indices: tuple[int, ...] | None = None
    s2_attention: Any = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            check_int(name, getattr(self, name), 1)
        check_int("max_position_embeddings", self.max_position_embeddings, 1)
        if self.hidden_size % (2 * self.num_attention_heads):
            raise bad_value(
                "hidden_size", f"must be a multiple of twice num_attention_heads ({self.num_attention_heads})", self.hidden_size
            )
        for name in ("rope_embedding_base", "layer_norm_epsilon", "mup_attn_multiplier", "rope_position_scale"):
            if not _is_positive(getattr(self, name)):
                raise bad_value(name, "must be a number above 0", getattr(self, name))
        if (self.ff_intermediate_size is None) == (self.ff_dim_multiplier is None):
            both = (self.ff_intermediate_size, self.ff_dim_multiplier)
            raise bad_value("ff_intermediate_size and ff_dim_multiplier", "must be given one without the other", both)
        check_int("the width of the feed-forward part", self.intermediate_size, 1)
        unknown = {
            "hidden_act": [] if self.hidden_act == "gegelu" else [f"only gegelu is known, not {self.hidden_act}"],
            "attention_dropout_prob": ["attention has no dropout"] if self.attention_dropout_prob else [],
            "tie_word_embeddings": [] if self.tie_word_embeddings else ["the output reads the embeddings"],
        }
        if any(unknown.values()):
            raise Unsupported("this Phi-3-small cannot be built", {name: why for name, why in unknown.items() if why})
        if any(number >= self.vocab_size for number in self.unused_tokens):
            raise bad_value("dummy_token_indices", f"must be below vocab_size ({self.vocab_size})", max(self.unused_tokens))
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, LongRope):
            raise bad_kind("rope_scaling", "must be a LongRope; from_dict reads the object of a config.json", self.rope_scaling)
        self.recipe  # noqa: B018  a recipe that does not fit is refused here

    @classmethod
    def from_dict(cls, given: Any) -> Phi3SmallConfig:
        """Read the object of a ``config.json``; names that say nothing about the model's arithmetic are passed over."""
        if not isinstance(given, Mapping):
            raise bad_kind("config", "must be an object", given)
        check_model_type(given)
        missing = [one.name for one in fields(cls) if one.default is MISSING and one.name not in given]
        if missing:
            raise bad_value("config", f"must say {', '.join(missing)}", f"an object with {', '.join(sorted(given))[:120]}")
        settings = {one.name: given[one.name] for one in fields(cls) if one.name in given}
        if settings.get("rope_scaling") is not None:
            head_dim = check_int("hidden_size", given["hidden_size"], 1) // check_int("heads", given["num_attention_heads"], 1)
            settings["rope_scaling"] = LongRope.read(settings["rope_scaling"], head_dim)
        if settings.get("dummy_token_indices") is not None:
            settings["dummy_token_indices"] = tuple(check_int("dummy_token_indices", one, 0) for one in settings["dummy_token_indices"])
        return cls(**settings)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        """The width of the feed-forward part, given or from ``ff_dim_multiplier``: two thirds of the product, padded."""
        if self.ff_intermediate_size is not None:
            return self.ff_intermediate_size
        width = check_int("ff_dim_multiplier", self.ff_dim_multiplier, 1) * (self.hidden_size // 3) * 2
        return -(-width // 256) * 256 if self.gegelu_pad_to_256 else width

    @property
    def scale(self) -> float:
        """What multiplies q.k: with muP ``mup_attn_multiplier / head_dim``."""
        return self.mup_attn_multiplier / self.head_dim if self.mup_use_scaling else self.head_dim**-0.5

    @property
    def unused_tokens(self) -> tuple[int, ...]:
        """Numbers of the vocabulary that stand for no token, whose logits are the lowest number."""
        if self.dummy_token_indices is not None:
            return self.dummy_token_indices
        return PUBLISHED_UNUSED if self.vocab_size == PUBLISHED_VOCABULARY else ()

    @property
    def recipe(self) -> Recipe:
        """The pattern of each layer: ``s2_attention`` where it is given, or what the model was trained with."""
        own = Recipe.from_phi3small(self) if self.s2_attention is None else self.s2_attention
        return self.check_recipe(own)

    def check_recipe(self, recipe: Any) -> Recipe:
        """A recipe that fits these layers and heads, or an error that names what does not."""
        heads = {"num_heads": self.num_attention_heads, "num_kv_heads": self.num_key_value_heads}
        try:
            return read_spec(recipe, num_layers=self.num_hidden_layers, **heads)
        except TypeError as error:
            raise bad_kind(FIELD, "must be a recipe", recipe) from error


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
