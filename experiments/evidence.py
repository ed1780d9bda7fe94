"""The page of what models learned under which patterns, made from the committed records and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.ablate_record import KIND as ABLATION
from experiments.ablate_settings import Record
from experiments.evidence_ablation import SECTIONS, ablation_pictures, ablation_sections
from experiments.evidence_reach import KIND as REACH
from experiments.evidence_reach import reach_pictures, reach_sections, reach_targets
from experiments.evidence_targets import ablation_targets, targets_table
from s2attn.analysis.guidelines import GUIDELINES
from s2attn.core import StrPath, as_path, bad_value, write_text
from s2attn.core.files import read_json

RECORDS = Path(__file__).parent / "records"
Records = Mapping[str, Record]


@dataclass(frozen=True)
class Kind:
    """What the page makes of the records of one kind, all of them together and by name; none at all is possible, too.

    Attributes:
        source: what a record is, in words.
        sections: blocks of Markdown, with headings of the second level.
        pictures: draws into a folder what the sections show as ``evidence/NAME``.
        targets: lines of the table of targets.
    """

    source: str
    sections: Callable[[Records], Sequence[str]]
    pictures: Callable[[Records, Path], None]
    targets: Callable[[Records], Sequence[Sequence[str]]]


KINDS: Mapping[str, Kind] = {
    ABLATION: Kind("the `record.json` of an [ablation](how-to/ablate.md)", ablation_sections, ablation_pictures, ablation_targets),
    REACH: Kind("the `record.json` of a [study of reach](how-to/reach-study.md)", reach_sections, reach_pictures, reach_targets),
}
"""By what a record calls its kind, in the order of the page."""


def committed_records(folder: StrPath | None = None) -> dict[str, Record]:
    """The records in a folder by file name, the package's own when none is named.

    Raises:
        ValueError: a record cannot be read, or is of a kind that the page does not know.
    """
    folder = None if folder is None else as_path("folder", folder)
    found = {}
    for path in sorted((folder or RECORDS).glob("*.json")):
        try:
            record = read_json(path, "record")
            kind = record["kind"]
        except (ValueError, KeyError, TypeError) as error:
            raise bad_value("record", f"must be a JSON object with a kind ({error!r})", path) from None
        if kind not in KINDS:
            raise bad_value("record", f"must be of a kind among {', '.join(KINDS)}", f"{kind!r} in {path}")
        found[path.stem] = record
    return found


def write_page(records: Records, path: StrPath) -> Path:
    """Write the page, and its pictures into the folder ``evidence`` beside it."""
    path = as_path("path", path)
    folder = path.parent / "evidence"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, kind in KINDS.items():
        kind.pictures(_of_kind(records, name), folder)
    write_text(path, evidence_page(records))
    return path


def _of_kind(records: Records, kind: str) -> dict[str, Record]:
    return {name: record for name, record in records.items() if record["kind"] == kind}


def evidence_page(records: Records) -> str:
    """The page as Markdown: what was run, what came out for every guideline, which targets are met, and what all that does not say."""
    parts = [
        "# Evidence",
        f"Made by `python -m experiments evidence` from the records in `experiments/records/`; a test compares it with them. A record is "
        f"{' or '.join(kind.source for kind in KINDS.values())}. Recipes are compared seed by seed: start and data differ from seed to "
        "seed, and a paired difference leaves that out. It is given as mean ± standard deviation (range of the seeds), and called *beyond "
        "the seeds' spread* when it has the same sign in every seed and its mean is above its standard deviation. With a few seeds that "
        "is a plain rule, and no proof.",
    ]
    targets: list[Sequence[str]] = []
    for name, kind in KINDS.items():
        own = _of_kind(records, name)
        parts += kind.sections(own)
        targets += kind.targets(own)
    return "\n\n".join([*parts, *timed_guidelines(), "## Targets", targets_table(targets), "## Limits", limits(records)]) + "\n"


def timed_guidelines() -> list[str]:
    """Guidelines of which the experiment is a measurement of time or traffic, not a training."""
    parts = []
    for key, guideline in GUIDELINES.items():
        if key not in SECTIONS:
            parts += [
                f"## {guideline.section}",
                f"The guideline: {guideline.says}. The experiment: `{guideline.experiment}`, on a graphics card. What it costs is time, "
                "not what a model learns: its outcome stands in [Performance](performance.md), where it was measured.",
            ]
    return parts


def limits(records: Records) -> str:
    """What may not be concluded."""
    sizes = [run["text"] for record in _of_kind(records, ABLATION).values() for run in record["runs"] if run["text"] is not None]
    said = "These are small models"
    if sizes:
        weights, tokens = max(one["parameters"] for one in sizes), max(one["bytes_read"] for one in sizes)
        said += f", what the machines named above can train: {weights:,} parameters at most, and {tokens:,} tokens of text at most"
    return (
        f"{said}. They read source code byte by byte, so that their losses compare with each other and with nothing else; the tasks "
        "are synthetic. A difference between recipes, or that there is none, may change with the size of the model, the number of tokens, "
        "the length of the context and the kind of text: nothing here says that it holds for a model in use. Few seeds show the spread "
        "of start and data roughly. All recipes train with the same learning rate, which was not tuned for any. No speeds are given: runs "
        "may have shared a machine, which a record does not tell; [Performance](performance.md) is about time."
    )
