"""Files that are whole or not there: what is written appears under its name only when all of it is on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from s2attn.core.files import PARTIAL, append_checksum, atomic_write


def write_file(path: Path, content: str | dict[str, Any]) -> None:
    """Write text, or a dict with `torch.save` and a checksum; the file that was there stays until the new one is complete.

    Raises:
        OSError: the disk is full, or may not be written to.
    """
    with atomic_write(path) as file:
        if isinstance(content, str):
            file.write(content.encode())
        else:
            torch.save(content, file)
            append_checksum(file)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that gets its name when it is complete; when something fails it goes away, and nothing has changed.

    Args:
        folder: must not exist.

    Raises:
        OSError: from whatever fills it, or because the name is taken.
    """
    beside = folder.with_name(f".{folder.name}{PARTIAL}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        _settle(beside)
        beside.rename(folder)
        _settle(folder.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _settle(folder: Path) -> None:
    """Ask the disk to remember which files a folder holds."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left half written in ``folder``."""
    for path in folder.glob(f".*{PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
