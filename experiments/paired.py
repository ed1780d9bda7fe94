"""Differences between two recipes, seed by seed: start and data differ from seed to seed, and a paired difference leaves that out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, stdev


@dataclass(frozen=True)
class Paired:
    """What one recipe has above another, a value for each seed that both have; one at least."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def sd(self) -> float | None:
        """Standard deviation of a sample; None of a single seed."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def beyond(self) -> bool | None:
        """Whether it is beyond the seeds' spread: one sign for every seed, and a mean above the standard deviation.

        None of a single seed, which has no spread.

        >>> Paired((1.0, 1.2, 0.9)).beyond, Paired((1.0, -0.1)).beyond, Paired((0.1, 5.0)).beyond, Paired((1.0,)).beyond
        (True, False, False, None)
        """
        if self.sd is None:
            return None
        one_sign = all(value > 0 for value in self.values) or all(value < 0 for value in self.values)
        return one_sign and abs(self.mean) > self.sd

    def text(self, unit: str, scale: float = 100, digits: int = 2) -> str:
        """The mean with its standard deviation, and the range.

        >>> Paired((0.01, 0.02)).text("%"), Paired((0.01,)).text("%")
        ('+1.50±0.71 % (+1.00 to +2.00)', '+1.00 %')
        """
        made = f"{scale * self.mean:+.{digits}f}"
        if self.sd is None:
            return f"{made} {unit}"
        low, high = (f"{scale * value:+.{digits}f}" for value in (min(self.values), max(self.values)))
        return f"{made}±{scale * self.sd:.{digits}f} {unit} ({low} to {high})"


def paired(one: Mapping[int, float], other: Mapping[int, float], *, relative: bool = False) -> Paired | None:
    """The differences ``one - other`` by seed; None when no seed has both.

    Args:
        relative: over ``other``.

    >>> paired({0: 1.0, 1: 3.0, 2: 9.0}, {0: 2.0, 1: 2.0}, relative=True)
    Paired(values=(-0.5, 0.5))
    """
    seeds = [seed for seed in one if seed in other]
    values = tuple((one[seed] - other[seed]) / (other[seed] if relative else 1) for seed in seeds)
    return Paired(values) if values else None
