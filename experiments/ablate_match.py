"""Recipes of equal work: for each design, the parameters with which its layers list a given number of (query, key) pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from experiments.model import ModelConfig
from s2attn.analysis.density import dense_pairs, pairs_per_head
from s2attn.analysis.stack import Stack, stack_of
from s2attn.core import bad_value, check_block, check_int
from s2attn.patterns import ByRange, Dense, Dilated, LongNet, Pattern, Power, Recipe, Sink, Stride, Window


@dataclass(frozen=True)
class Shape:
    """What pairs are counted over: the heads of all layers at one causal context of ``seqlen`` tokens.

    Patterns live on a grid of ``block`` tokens.
    """

    layers: int
    heads: int
    kv_heads: int
    seqlen: int
    block: int = 64

    def __post_init__(self) -> None:
        check_block("Shape block", self.block)
        check_int("Shape seqlen", self.seqlen, 2 * self.block)

    @classmethod
    def of(cls, config: ModelConfig, seqlen: int, block: int) -> Shape:
        """The shape of a model's attention."""
        return cls(config.layers, config.heads, config.kv_heads, seqlen, block)

    @property
    def blocks(self) -> int:
        return -(-self.seqlen // self.block)

    @property
    def dense_pairs(self) -> int:
        """What dense layers list: the causal triangle of every head of every layer."""
        return dense_pairs(self._stack(Dense())) * self.heads * self.layers

    def _stack(self, pattern: Pattern | Recipe) -> Stack:
        return stack_of(pattern, self.heads, self.kv_heads, self.seqlen, layers=self.layers)

    def pairs(self, recipe: Recipe) -> int:
        """The (query, key) pairs that all heads of all layers list.

        >>> Shape(layers=2, heads=4, kv_heads=2, seqlen=128).pairs(Recipe(Window(1), dense_layers=[0])) == 4 * (128 * 129 // 2 + 128)
        True
        """
        stack = self._stack(recipe)
        return sum(sum(pairs_per_head(stack, layer)) for layer in range(self.layers))


Structures = Callable[[Shape, float], Iterator[Pattern]]
"""What a design has beside its window, most wanted first, for a density of its sparse layers."""


@dataclass(frozen=True)
class Design:
    """A way to be sparse: a structure, and a window of which the width is found; ``dense`` layers among the others.

    Attributes:
        meaning: what it is, in words.
        structures: None when the window is all there is.
    """

    meaning: str
    structures: Structures | None = None
    dense: int = 0


@dataclass(frozen=True)
class Matched:
    """A recipe with the pairs that it lists, and those that it was to list.

    ``wanted`` is None for the dense reference, which is not matched to anything.
    """

    name: str
    meaning: str
    recipe: Recipe
    pairs: int
    wanted: int | None
    dense_pairs: int

    @property
    def density(self) -> float:
        """Listed pairs over those of a dense model."""
        return self.pairs / self.dense_pairs

    @property
    def error(self) -> float:
        """Pairs too many, as a share of those wanted; negative when too few."""
        return 0.0 if self.wanted is None else self.pairs / self.wanted - 1

    def within(self, tolerance: float) -> bool:
        """Whether it counts as equal work."""
        return abs(self.error) <= tolerance

    def equal(self, tolerance: float) -> bool:
        """Whether it was matched, and counts as equal work: what the dense reference never does."""
        return self.wanted is not None and self.within(tolerance)


def _strides(shape: Shape, density: float, make: Callable[[int], Pattern], factor: float = 1.0) -> Iterator[Pattern]:
    """Strides s of density ``factor / s``, by how nearly they take half; first those small enough for the heads to cover all blocks."""
    together, widest = shape.kv_heads * shape.layers, max(2, shape.blocks - 1)
    choices = range(2 if density else widest, widest + 1)
    yield from map(make, sorted(choices, key=lambda s: (s > together, abs(factor / s - density / 2))))


def _sink(shape: Shape, density: float) -> Iterator[Pattern]:
    yield Sink(shape.block)


def _homogeneous(shape: Shape, density: float) -> Iterator[Pattern]:
    return _strides(shape, density, lambda s: Stride(s, offset=0, block=shape.block))


def _heterogeneous(shape: Shape, density: float) -> Iterator[Pattern]:
    return _strides(shape, density, lambda s: Stride(s, block=shape.block))


def _stripes(shape: Shape, density: float) -> Iterator[Pattern]:
    # As many stripes as leave the least window; the first ones may leave none, and are passed over.
    yield from (Stride(s, block=shape.block) for s in range(2, max(3, shape.blocks)))


def _ranges(shape: Shape, density: float) -> Iterator[Pattern]:
    near = shape.seqlen // 4
    # Pairs nearer than a quarter of the context are 7/16 of all; the others are listed a quarter as densely.
    share = 7 / 16 + 9 / 16 / 4

    def make(s: int) -> Pattern:
        return ByRange(((0, near, Stride(s, block=shape.block)), (near, None, Stride(4 * s, block=shape.block))))

    return _strides(shape, density, make, share)


def _power(shape: Shape, density: float) -> Iterator[Pattern]:
    for base in (2, 4, 8, 16):
        yield Sink(shape.block) | Power(base, block=shape.block)


def _dilated(shape: Shape, density: float) -> Iterator[Pattern]:
    widths = {round(shape.blocks * 0.93**i) for i in range(60)}
    for n in sorted((n for n in widths if n >= 2), reverse=True):
        yield Dilated(2, n, block=shape.block)


def _longnet(shape: Shape, density: float) -> Iterator[Pattern]:
    segment = 1 << max(0, shape.blocks.bit_length() - 2)
    while segment >= 1:
        levels = 1
        while segment << (levels - 1) < shape.blocks:
            levels += 1
        yield LongNet(segment, levels, block=shape.block)
        segment //= 2


def designs(layers: int) -> Mapping[str, Design]:
    """The designs that are compared, by name; ``layers`` of a model say how many dense ones a quarter is.

    >>> list(designs(12))[-4:], list(designs(4))[-2:]
    (['longnet', 's2+1', 's2+2', 's2+3'], ['s2+1', 's2+2'])
    """
    found = {
        "dense": Design("everything, in every layer: the reference"),
        "window": Design("a window"),
        "sink_window": Design("the first block and a window (arXiv:2309.17453)", _sink),
        "homogeneous": Design("every s-th block, the same for all heads, and a window", _homogeneous),
        "s2": Design("every s-th block, another one for every head, and a window (arXiv:2407.17678)", _heterogeneous),
        "stripes": Design("like s2, with as many stripes as leave the narrowest window", _stripes),
        "ranges": Design("like s2, with a stride 4 times as wide beyond a quarter of the context", _ranges),
        "power": Design("the first block, distances that are powers, and a window (arXiv:2503.03588)", _power),
        "dilated": Design("every other block up to a distance, and a window", _dilated),
        "longnet": Design("segments that double while they thin out, and a window (arXiv:2307.02486)", _longnet),
    }
    for dense in sorted({1, 2, layers // 4} & set(range(1, layers))):
        found[f"s2+{dense}"] = Design(f"s2 with {dense} dense layer{'s' if dense > 1 else ''} of {layers}", _heterogeneous, dense)
    return found


def match(name: str, shape: Shape, budget: float, *, tolerance: float = 0.02) -> Matched:
    """Find the recipe of a design that lists ``budget`` times the pairs of a dense model, over all its layers together.

    The structure is the most wanted one that leaves a window of at least a block; the window, exact to the token, takes the rest. Where
    no structure fits within the tolerance, the nearest that was found is returned: `Matched` says what was reached.

    Args:
        name: one of :func:`designs`.
        budget: density over all layers, above 0 and below 1; dense layers of a hybrid count, so its other layers have less.
        tolerance: greatest share of pairs too many or too few that counts as equal.

    >>> found = match("s2", Shape(layers=4, heads=4, kv_heads=2, seqlen=1024, block=16), 0.25)
    >>> found.recipe, round(found.density, 3)
    (Recipe(Stride(stride=8, offset='head', shift=0, block=16, heads='kv') | Window(n=76)), 0.25)
    """
    known = designs(shape.layers)
    if name not in known:
        raise bad_value("recipe", f"must be one of {', '.join(known)}", repr(name))
    if not 0 < budget < 1:
        raise bad_value("budget", "must be above 0 and below 1", budget)
    if not 0 <= tolerance < 1:
        raise bad_value("tolerance", "must be from 0 to below 1", tolerance)
    design, total = known[name], shape.dense_pairs
    if name == "dense":
        return Matched(name, design.meaning, Recipe(Dense()), total, None, total)
    wanted = round(budget * total)
    dense = [number * shape.layers // design.dense for number in range(design.dense)]
    share = max(0.0, (budget * shape.layers - len(dense)) / (shape.layers - len(dense)))
    structures: Sequence[Pattern | None] = [None] if design.structures is None else list(design.structures(shape, share))
    best: Matched | None = None
    for structure in structures:
        recipe, pairs = _with_window(structure, dense, shape, wanted)
        found = Matched(name, design.meaning, recipe, pairs, wanted, total)
        if found.within(tolerance):
            return found
        if best is None or abs(found.error) < abs(best.error):
            best = found
    assert best is not None
    return best


def _with_window(structure: Pattern | None, dense: list[int], shape: Shape, wanted: int) -> tuple[Recipe, int]:
    """The structure with the window, of a block at least, that brings its pairs nearest to ``wanted``."""

    def made(width: int) -> Recipe:
        return Recipe(Window(width) if structure is None else structure | Window(width), dense_layers=dense)

    known: dict[int, int] = {}

    def pairs(width: int) -> int:
        if width not in known:
            known[width] = shape.pairs(made(width))
        return known[width]

    low, high = shape.block, shape.seqlen
    if pairs(low) >= wanted:
        return made(low), pairs(low)
    while high - low > 1:
        # Pairs grow ever more slowly with the window, so a straight line between the ends guesses too wide a window, and never far off.
        rise = (wanted - pairs(low)) / max(1, pairs(high) - pairs(low))
        width = min(high - 1, max(low + 1, low + round(rise * (high - low))))
        low, high = (width, high) if pairs(width) <= wanted else (low, width)
    nearest = min((low, high), key=lambda width: abs(pairs(width) - wanted))
    return made(nearest), pairs(nearest)
