"""A file is complete or as it was: on a full disk, on an exception and on an interrupt; its checksum finds every altered byte."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedRandom, FileIO
from pathlib import Path

import pytest
import torch

from s2attn.core import as_path, atomic_write, write_text
from s2attn.core.files import append_checksum, verify_checksum


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file.txt"
    path.write_text("before")
    return path


def unchanged(path: Path) -> bool:
    return path.read_text() == "before" and [one.name for one in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_a_block_that_raises_leaves_the_file_and_its_folder_as_they_were(path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error, match=r"^mine$"), atomic_write(path) as file:
        file.write(b"half")
        raise error("mine")
    assert unchanged(path)


def test_a_full_disk_leaves_the_file_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"file\.txt could not be written and is unchanged: No space left") as raised:
        write_text(path, "after")
    assert raised.value.errno == errno.ENOSPC and unchanged(path)


def test_the_reason_that_torch_hides_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(FileIO):
        def write(self, data: object, /) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("s2attn.core.files.FileIO", Full)
    with pytest.raises(OSError, match="is unchanged: No space left"), atomic_write(path) as file:
        torch.save({"a": torch.zeros(100_000)}, file)
    assert unchanged(path)


def test_content_is_on_the_disk_before_it_gets_the_name_and_the_folder_after(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order, sync, replace = [], os.fsync, Path.replace

    def synced(handle: int) -> None:
        what = "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else f"{os.fstat(handle).st_size} bytes"
        order.append(what)
        sync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", lambda *both: (order.append("rename"), replace(*both)))
    write_text(path, "after")
    assert order == ["5 bytes", "rename", "folder"]


def test_a_file_keeps_its_permissions_and_a_link_stays_a_link(path: Path) -> None:
    path.chmod(0o640)
    link = path.with_name("link")
    link.symlink_to(path.name)
    write_text(link, "after")
    assert link.is_symlink() and path.read_text() == "after" and path.stat().st_mode & 0o777 == 0o640
    former = os.umask(0o027)
    try:
        write_text(path.with_name("new"), "after")
    finally:
        os.umask(former)
    assert path.with_name("new").stat().st_mode & 0o777 == 0o640


def test_a_device_is_written_to_and_a_folder_is_refused(tmp_path: Path) -> None:
    write_text(os.devnull, "nothing is kept")
    with pytest.raises(IsADirectoryError, match="could not be written"):
        write_text(tmp_path, "after")
    with pytest.raises(FileNotFoundError, match="could not be written"):
        write_text(tmp_path / "none" / "a", "after")
    assert not list(tmp_path.iterdir())


def test_two_writers_of_one_file_do_not_meet(path: Path) -> None:
    with atomic_write(path) as one, atomic_write(path) as other:
        one.write(b"one")
        other.write(b"other")
    assert path.read_text() == "one" and len(list(path.parent.iterdir())) == 1  # the last one that ends


def test_a_checksum_finds_every_altered_byte(path: Path) -> None:
    with atomic_write(path) as file:
        file.write(bytes(range(200)))
        append_checksum(file)
    content = path.read_bytes()
    verify_checksum(path, "must be whole")
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        with pytest.raises(ValueError, match=r"path must be whole; got .*file\.txt \(truncated, altered, or without a checksum\)"):
            verify_checksum(path, "must be whole")
    for end in (0, 1, 100, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match="path must be whole"):
            verify_checksum(path, "must be whole")


def test_paths_are_strings_or_paths() -> None:
    assert as_path("path", "a") == as_path("path", Path("a")) == Path("a")
    with pytest.raises(TypeError, match="path must be a string or a Path; got BufferedRandom"):
        as_path("path", BufferedRandom.__new__(BufferedRandom))
