"""Documents for a run: the files of a folder, or the Python sources of this machine, in two parts that share nothing."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from s2attn.core import StrPath, as_path, bad_value, check_int
from s2attn.lab.data import EXCLUDED, is_validation, stdlib_files

SPLITS = ("package", "file", "tail")
SOURCES = ("stdlib", "installed")


@dataclass(frozen=True)
class Documents:
    """Texts to train on and texts to judge on.

    Attributes:
        train, validation: the texts.
        train_names, validation_names: where they come from, in the same order.
        left_out: files that hold no text: empty, with zero bytes, or not in UTF-8.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    train_names: tuple[str, ...]
    validation_names: tuple[str, ...]
    left_out: int = 0


def read_documents(
    source: str, *, include: tuple[str, ...] = ("*",), split: str = "package", percent: int = 5, max_files: int | None = None
) -> Documents:
    """Read text files and split them.

    Args:
        source: a folder; "stdlib", the sources of Python's standard library, without tests; or "installed", these and those of all
            installed packages.
        include: which names of files in a folder are read; hidden files and folders never are.
        split: "package": all files of a first folder stay together; "file": each for itself; both go by a hash of the name, so that nothing
            moves when files come and go. "tail": the end of every file is for validation.
        percent: share that is for validation.
        max_files: read only so many files.

    Raises:
        ValueError: no such folder, no text in it, or nothing for one of the parts.
    """
    if split not in SPLITS:
        raise bad_value("data.split", f"must be one of {', '.join(SPLITS)}", repr(split))
    if not 0 < check_int("data.percent", percent, 1) < 100:
        raise bad_value("data.percent", "must be below 100", percent)
    files = list(_files(source, include))[:max_files]
    texts = {name: text for name, path in files if (text := read_text(path)) is not None}
    if not texts:
        found = f"{len(files)} files without text" if files else "no files"
        raise bad_value("data.source", f"must hold text files ({', '.join(include)}) in UTF-8", f"{found} in {source}")
    train, validation = _tails(texts, percent) if split == "tail" else _by_name(texts, split, percent)
    if not train or not validation:
        rule = f"must leave text for training and validation (of {len(texts)} files); a larger data.percent, or file or tail, may"
        raise bad_value("data.split", rule, f"{split!r} with data.percent = {percent}")
    return Documents(tuple(train.values()), tuple(validation.values()), tuple(train), tuple(validation), len(files) - len(texts))


def read_text(path: StrPath) -> str | None:
    """The text of a file; None where it is empty or binary."""
    path = as_path("path", path)
    raw = path.read_bytes()
    if not raw.strip() or b"\x00" in raw:
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _files(source: str, include: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    if source in SOURCES:
        yield from _sources(with_packages=source == "installed")
        return
    root = Path(source).expanduser()
    if not root.is_dir():
        raise bad_value("data.source", f"must be a folder, or one of {', '.join(SOURCES)}", repr(source))
    for path in sorted({path for pattern in include for path in root.rglob(pattern)}):
        inside = path.relative_to(root)
        if path.is_file() and "__pycache__" not in inside.parts and not any(part.startswith(".") for part in inside.parts):
            yield inside.as_posix(), path


def _sources(with_packages: bool) -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    yield from ((path.relative_to(root).as_posix(), path) for path in stdlib_files(root))
    if with_packages:
        root = Path(sysconfig.get_path("purelib"))
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root)
            if path.is_file() and not EXCLUDED & set(inside.parts):
                yield inside.as_posix(), path


def _by_name(texts: dict[str, str], split: str, percent: int) -> tuple[dict[str, str], dict[str, str]]:
    kept = {name: is_validation(name.split("/")[0] if split == "package" else name, percent) for name in texts}
    train, validation = ({name: text for name, text in texts.items() if kept[name] == wanted} for wanted in (False, True))
    return train, validation


def _tails(texts: dict[str, str], percent: int) -> tuple[dict[str, str], dict[str, str]]:
    cuts = {name: len(text) - len(text) * percent // 100 for name, text in texts.items()}
    train = {name: text[: cuts[name]] for name, text in texts.items()}
    validation = {name: text[cuts[name] :] for name, text in texts.items() if cuts[name] < len(text)}
    return train, validation
