"""Files that are whole or not there: what is written appears under its name only when all of it is on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from s2attn.core import bad_value
from s2attn.core.files import PARTIAL, append_checksum, atomic_write, sync_folder, verify_checksum


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


def read_tensors(path: Path, rule: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    """The dict that :func:`write_file` wrote; nothing but tensors, numbers and text is unpickled, and no code runs.

    Args:
        rule: what the file must be, for the message.
        kinds: the entries that must be there, and their types.

    Raises:
        ValueError: a file of another kind, one that was cut short or altered, or another dict.
        OSError: the file cannot be read.
    """
    # Files from before there were checksums have none.
    verify_checksum(path, rule, required=False)
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # torch raises nearly anything for a file that is not its own
        lines = str(error).splitlines() or [""]
        raise bad_value(path.name, rule, f"{path} ({type(error).__name__}: {lines[0][:80]})") from error
    if not isinstance(found, dict):
        raise bad_value(path.name, rule, f"{path}, which holds a {type(found).__name__}")
    wrong = sorted(name for name, kind in kinds.items() if not isinstance(found.get(name), kind))
    if wrong:
        raise bad_value(path.name, rule, f"{path}, which lacks {', '.join(wrong)}")
    return found


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
        sync_folder(beside)
        beside.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Remove a folder that :func:`whole_folder` made: a process that is killed here leaves nothing under its name."""
    beside = folder.with_name(f".{folder.name}{PARTIAL}")
    shutil.rmtree(beside, ignore_errors=True)
    folder.rename(beside)
    shutil.rmtree(beside)


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left half written in ``folder``."""
    for path in folder.glob(f".*{PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
