"""``python -m experiments evidence``: the page of what models learned under which patterns."""

from __future__ import annotations

from pathlib import Path

from experiments.evidence import committed_records, write_page
from s2attn.core import bad_value


def show_evidence(folder: Path | None, out: Path) -> None:
    """Write the page and its pictures."""
    if folder is not None and not folder.is_dir():
        raise bad_value("--records", "must be a folder", folder)
    print(f"Page: {write_page(committed_records(folder), out)}")
