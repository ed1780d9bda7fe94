"""Guidelines of S2-Attention (arXiv:2407.17678, section 3), each with the experiment that puts it to the test."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

PAGE = "docs/evidence.md"


@dataclass(frozen=True)
class Guideline:
    """One guideline.

    Attributes:
        says: the guideline in a few words.
        experiment: the command that puts it to the test.
        section: the heading of :data:`PAGE` under which its outcome stands.
    """

    says: str
    experiment: str
    section: str

    @property
    def recipes(self) -> tuple[str, ...]:
        """The recipes that an ablation compares; none for another experiment.

        >>> GUIDELINES["heads"].recipes, GUIDELINES["even"].recipes
        (('dense', 'homogeneous', 's2'), ())
        """
        found = re.fullmatch(r"python -m experiments ablate --recipes (\S+)", self.experiment)
        return tuple(found[1].split(",")) if found else ()

    @property
    def place(self) -> str:
        """The section as the target of a link.

        >>> GUIDELINES["heads"].place
        'docs/evidence.md#heads-that-differ'
        """
        return f"{PAGE}#{anchor(self.section)}"


@dataclass(frozen=True)
class Advice:
    """A sentence about a pattern that does not follow a guideline; ``str(advice)`` is the sentence."""

    text: str
    guideline: Guideline

    def __str__(self) -> str:
        return self.text

    @property
    def test(self) -> str:
        """Where the guideline is put to the test.

        >>> Advice("Heads do not differ.", GUIDELINES["heads"]).test
        'Put to the test by python -m experiments ablate --recipes dense,homogeneous,s2: docs/evidence.md#heads-that-differ'
        """
        return f"Put to the test by {self.guideline.experiment}: {self.guideline.place}"


def anchor(heading: str) -> str:
    """What a heading is called in a link.

    >>> anchor("Blocks that stay dropped")
    'blocks-that-stay-dropped'
    """
    return re.sub(r"[^\w]+", "-", heading.lower()).strip("-")


def _ablate(recipes: str) -> str:
    return f"python -m experiments ablate --recipes {recipes}"


GUIDELINES: Mapping[str, Guideline] = {
    "heads": Guideline("heads should differ", _ablate("dense,homogeneous,s2"), "Heads that differ"),
    "union": Guideline("the union of the heads should cover the context", _ablate("dense,window,sink_window,s2"), "Cover of the context"),
    "dense": Guideline("some layers should stay dense", _ablate("dense,s2,s2+1,s2+2"), "Dense layers"),
    "window": Guideline("every head should read a local window", _ablate("dense,stripes,s2,window"), "A local window"),
    "far": Guideline("far keys may be sparser than near ones", _ablate("dense,s2,ranges,power,dilated,longnet"), "Far keys"),
    "dropped": Guideline("a dropped block should not come back", _ablate("dense,s2,power,dilated"), "Blocks that stay dropped"),
    "groups": Guideline(
        "the query heads of a group should share their blocks",
        "python -m benchmarks run forward backward --cases 'stripes per'",
        "Groups that share blocks",
    ),
    "even": Guideline(
        "heads should list equally many blocks", "python -m benchmarks run forward backward --cases 'mixed heads'", "Even heads"
    ),
}
"""By a short name, in the order of the documentation."""
