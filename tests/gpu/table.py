"""What `make gpu-tests` prints last, from the file to which every result was appended; run alone it shows an earlier run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

OUTCOMES = ("passed", "failed", "skipped")


def table(rows: list[dict]) -> str:
    """Tests by file, why some failed or were left out, and what was measured."""
    lines = [f"{'file':22}" + "".join(f"{outcome:>9}" for outcome in (*OUTCOMES, "seconds"))]
    for file in [*dict.fromkeys(row["file"] for row in rows), None]:
        mine = [row for row in rows if file in (None, row["file"])]
        counts = [sum(row["outcome"] == outcome for row in mine) for outcome in OUTCOMES]
        lines.append(f"{file or 'all':22}" + "".join(f"{count:9}" for count in counts) + f"{sum(row['seconds'] for row in mine):9.1f}")
    for row in rows:
        if row["outcome"] == "failed":
            last = [line for line in row["why"].splitlines() if line.startswith("E ")] or row["why"].splitlines()
            lines.append(f"failed   {row['file']}::{row['test']}  {last[0] if last else ''}"[:240])
        lines += [f"measured {name}: {value}" for name, value in row["measured"].items()]
    whys = [row["why"] for row in rows if row["outcome"] == "skipped"]
    lines += [f"skipped  {whys.count(why)}: {why}" for why in dict.fromkeys(whys)]
    return "\n".join(lines)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    print(table([json.loads(line) for line in path.read_text().splitlines()]) if path.exists() else f"{path}: nothing was recorded")
