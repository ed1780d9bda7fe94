"""Atomic files: a file is replaced when all of its new content is on the disk, and not touched otherwise."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom, FileIO
from pathlib import Path
from typing import Any, BinaryIO

from s2attn.core.errors import bad_kind, bad_value

StrPath = str | os.PathLike[str]
"""What every function that takes a path accepts."""
PARTIAL = ".partial"
"""How the names of files end that are being written."""
_CHECKSUM = b"\ns2attn sha256 "
_CHECKSUM_BYTES = len(_CHECKSUM) + 2 * hashlib.sha256().digest_size + 1
_PIECE_BYTES = 1 << 20


def as_path(argument: str, value: object) -> Path:
    """Return a path that was given as a string or as `os.PathLike`, or raise with the argument's name.

    >>> as_path("folder", 3)
    Traceback (most recent call last):
    ...
    TypeError: folder must be a string or a path; got int
    """
    if not isinstance(value, (str, os.PathLike)):
        raise bad_kind(argument, "must be a string or a path", value)
    return Path(value)


def read_json(path: Path, argument: str, rule: str = "must be a JSON file") -> Any:
    """The contents of a JSON file.

    Raises:
        ValueError: not UTF-8, not JSON, or nested too deeply.
        OSError: the file cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise bad_value(argument, rule, f"{path} ({error})") from None


@contextmanager
def atomic_write(path: StrPath) -> Iterator[BinaryIO]:
    """Open a binary file that replaces ``path`` when the block ends, and disappears when the block raises.

    The new content is written next to ``path``, synchronized with the disk and renamed, so that a
    reader, a full disk or a killed process finds the old file or the new one. The permissions of an
    existing file are kept and symbolic links are followed. A device or a pipe is written directly.

    Raises:
        OSError: the file could not be written; ``path`` is unchanged.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "a.txt")
    >>> with atomic_write(path) as file:
    ...     _ = file.write(b"all of it")
    >>> path.read_text(), len(list(path.parent.iterdir()))
    ('all of it', 1)
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file() and not target.is_dir():
        with target.open("wb") as file:
            yield file
        return
    beside = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    file, filled = None, False
    try:
        if target.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        file = _Watched(FileIO(beside, "x+"))
        with file:
            yield file
            filled = True
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            os.chmod(beside, target.stat().st_mode & 0o7777)
        beside.replace(target)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        # Some writers, such as torch.save, raise an error of their own in place of the file's.
        failed = error if file is None or filled else file.error
        if isinstance(failed, OSError) and isinstance(error, Exception):
            why = f"{path} could not be written and is unchanged: {failed.strerror}"
            raise OSError(failed.errno, why) from error
        raise
    sync_folder(target.parent)


def write_text(path: StrPath, text: str) -> None:
    """Write text in UTF-8 with `atomic_write`."""
    with atomic_write(path) as file:
        file.write(text.encode())


def append_checksum(file: BinaryIO) -> None:
    """Write the SHA-256 of a file at its end, for :func:`verify_checksum`.

    Args:
        file: as `atomic_write` gives it: it can be read too.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    digest = _sha256(file, end)
    file.seek(end)
    file.write(_CHECKSUM + digest.encode() + b"\n")


def verify_checksum(path: StrPath, rule: str, *, required: bool = True) -> None:
    """Refuse a file whose content is not what its checksum at the end was made of.

    Args:
        rule: what the argument ``path`` must be, for the message.
        required: refuse a file without a checksum too.

    Raises:
        ValueError: a file that was cut short or altered, or that never had a checksum.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        size = max(0, file.seek(0, os.SEEK_END) - _CHECKSUM_BYTES)
        file.seek(size)
        if not required and file.read(len(_CHECKSUM)) != _CHECKSUM:
            return
        file.seek(0)
        digest = _sha256(file, size)
        if file.read() != _CHECKSUM + digest.encode() + b"\n":
            raise bad_value("path", rule, f"{os.fspath(path)} (truncated, altered, or without a checksum)")


def _sha256(file: BinaryIO, size: int) -> str:
    """The digest of the next ``size`` bytes."""
    found = hashlib.sha256()
    while size > 0:
        piece = file.read(min(size, _PIECE_BYTES))
        if not piece:
            break
        found.update(piece)
        size -= len(piece)
    return found.hexdigest()


class _Watched(BufferedRandom):
    """A file that remembers why it could not be written."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        return self._watch(super().write, data)

    def flush(self) -> None:
        self._watch(super().flush)

    def close(self) -> None:
        self._watch(super().close)

    def _watch(self, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            self.error = self.error or error
            raise


def sync_folder(folder: Path) -> None:
    """Ask the disk to keep which files a folder holds; not every file system can."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
