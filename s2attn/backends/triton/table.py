"""The table of tiles that were measured to be the fastest, by GPU and Triton release; written by `s2attn tune`, looked up at run time."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from s2attn.backends.triton.tiles import FORMS, SMALLEST, Tiles
from s2attn.core import StrPath, as_path, bad_value, write_text
from s2attn.schedule import CUTS

SCHEMA = 1
PACKAGED = Path(__file__).parent / "tuned"
VARIABLE = "S2ATTN_TUNED"
"""Environment variable: a folder with tables that go before the packaged ones."""

CLASSES = (("dense", 0.4), ("medium", 0.1), ("sparse", 0.0))
"""Classes of density: listed blocks over those of dense attention, from so much on."""


@dataclass(frozen=True)
class Situation:
    """What a tuned row is for.

    Attributes:
        op: "forward", "dq", "dkv" or "decode".
        dtype: "float16", "bfloat16" or "float32".
        head_dim, v_dim: widths.
        block: tokens per block of the layout.
        density: a class of `CLASSES`.
    """

    op: str
    dtype: str
    head_dim: int
    v_dim: int
    block: int
    density: str


def density_class(density: float) -> str:
    """
    >>> [density_class(d) for d in (1.0, 0.2, 0.01)]
    ['dense', 'medium', 'sparse']
    """
    return next(name for name, least in CLASSES if density >= least)


def file_name(device: str, triton: str) -> str:
    """
    >>> file_name("NVIDIA H200", "3.6.0")
    'nvidia-h200-triton3.6.json'
    """
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{slug}-triton{'.'.join(triton.split('.')[:2])}.json"


def tuned_tiles(device: str, triton: str, situation: Situation) -> Tiles | None:
    """The measured tiles for a situation on a GPU of this name, or None where nothing was measured."""
    own = os.environ.get(VARIABLE)
    for folder in ([Path(own)] if own else []) + [PACKAGED]:
        found = read_table(folder / file_name(device, triton)).get(situation)
        if found is not None:
            return found
    return None


@lru_cache(maxsize=64)
def read_table(path: Path) -> dict[Situation, Tiles]:
    """The rows of one file; empty when there is none.

    Raises:
        ValueError: the file is not such a table, or holds tiles that no kernel has.
    """
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise bad_value("schema", f"must be {SCHEMA}", data["schema"])
        return dict(_row(row) for row in data["rows"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name} must be a table written by s2attn tune; got {type(error).__name__}: {error}") from error


def _row(row: dict[str, Any]) -> tuple[Situation, Tiles]:
    situation = Situation(**{name: row[name] for name in Situation.__dataclass_fields__})
    tiles = Tiles(**row["tiles"])
    powers = (tiles.line_tokens, tiles.listed_tokens, tiles.num_warps)
    if any(not isinstance(n, int) or n < 1 or n & (n - 1) for n in powers) or min(powers[:2]) < SMALLEST:
        raise bad_value("tiles", f"must have powers of two, at least {SMALLEST} tokens", row["tiles"])
    if tiles.num_stages < 1 or tiles.key_range < 0:
        raise bad_value("tiles", "must have at least one stage, and no negative key range", row["tiles"])
    if tiles.form not in FORMS:
        raise bad_value("form", f"must be one of {', '.join(FORMS)}", tiles.form)
    if tiles.cut and tiles.cut not in CUTS:
        raise bad_value("cut", f"must be empty or one of {', '.join(CUTS)}", tiles.cut)
    return situation, tiles


def write_table(path: StrPath, device: str, rows: list[tuple[Situation, Tiles, dict[str, Any]]], facts: dict[str, Any]) -> None:
    """Write a whole table at once, with what was measured beside each row, so that a reader never finds half of it."""
    path = as_path("path", path)
    listed = [{**asdict(situation), "tiles": asdict(tiles), **measured} for situation, tiles, measured in rows]
    text = json.dumps({"schema": SCHEMA, "device": device, **facts, "rows": listed}, indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text + "\n")
    read_table.cache_clear()
