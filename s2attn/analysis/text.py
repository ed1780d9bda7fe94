"""Numbers as text."""

from __future__ import annotations


def amount(value: float, unit: str = "", base: int = 1000) -> str:
    """A number with three digits and a prefix.

    >>> amount(5_438_000, "FLOP"), amount(3 << 30, "B", 1024), amount(999), amount(0.5)
    ('5.44 MFLOP', '3.00 GiB', '999', '0.5')
    """
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    step = 0
    while abs(value) >= base and step + 1 < len(prefixes):
        value, step = value / base, step + 1
    if step == 0:
        return f"{value:g} {unit}".strip()
    digits = f"{value:.3g}" if value >= 100 else f"{value:.2f}" if value < 10 else f"{value:.1f}"
    return f"{digits} {prefixes[step].upper() if base == 1024 else prefixes[step]}{'i' if base == 1024 else ''}{unit}"


def percent(share: float) -> str:
    """A share with three digits.

    >>> percent(0.1316), percent(1.0), percent(0.00123)
    ('13.2 %', '100 %', '0.123 %')
    """
    return f"{100 * share:.3g} %"
