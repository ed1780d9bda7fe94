"""The one exception of our own, and the wording that every check shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class Unsupported(RuntimeError):
    """Something that s2attn understands but cannot do here, with every backend and every reason.

    Wrong values raise ``ValueError`` and wrong kinds ``TypeError``; this is for a correct request that no backend (or not the
    backend that was asked for by name) can serve.

    >>> raise Unsupported("attention cannot run", {"triton": ["no CUDA device"], "torch": ["dtype int8"]})
    Traceback (most recent call last):
    ...
    s2attn.core.errors.Unsupported: attention cannot run
      triton: no CUDA device
      torch: dtype int8
    """

    def __init__(self, what: str, reasons: Mapping[str, Sequence[str]] | None = None):
        self.what = what
        self.reasons = {name: list(why) for name, why in (reasons or {}).items()}
        lines = [f"  {name}: {'; '.join(why)}" for name, why in self.reasons.items()]
        super().__init__("\n".join([what, *lines]))


def bad_value(argument: str, rule: str, came: object) -> ValueError:
    """A ``ValueError`` that names the argument, the rule and what came.

    >>> bad_value("block", "must be one of 16, 32, 64, 128, 256", 48)
    ValueError('block must be one of 16, 32, 64, 128, 256; got 48')
    """
    return ValueError(f"{argument} {rule}; got {came}")


def bad_kind(argument: str, rule: str, came: object) -> TypeError:
    """A ``TypeError`` that names the argument, the rule and the type that came.

    >>> bad_kind("pattern", "must be a Pattern", 3)
    TypeError('pattern must be a Pattern; got int')
    """
    return TypeError(f"{argument} {rule}; got {type(came).__name__}")


def check_int(argument: str, value: object, minimum: int) -> int:
    """Return ``value`` as an int of at least ``minimum``, or raise with the argument's name.

    >>> check_int("stride", 0, 1)
    Traceback (most recent call last):
    ...
    ValueError: stride must be an integer >= 1; got 0
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise bad_kind(argument, f"must be an integer >= {minimum}", value)
    number = value.__index__()
    if number < minimum:
        raise bad_value(argument, f"must be an integer >= {minimum}", value)
    return number


BLOCKS = (16, 32, 64, 128, 256)


def check_block(argument: str, value: object) -> int:
    """Return ``value`` as a block size in tokens (16, 32, 64, 128 or 256), or raise.

    >>> check_block("block", 64)
    64
    """
    number = check_int(argument, value, 1)
    if number not in BLOCKS:
        raise bad_value(argument, "must be one of 16, 32, 64, 128, 256", value)
    return number
