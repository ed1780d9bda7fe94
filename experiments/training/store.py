"""Checkpoints of a run: a folder for each, complete or not there at all, the newest few of them kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiments.files import read_tensors, remove_folder, remove_partial, whole_folder
from experiments.train import TRAINING, Run
from experiments.training.tokens import Tokenizer
from s2attn.core import bad_value, check_int

MISSING = "nothing"


class Store:
    """The checkpoints below ``folder``, named by their steps."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, check_int("keep", keep, 1)

    def found(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / "training.pt").is_file())

    def newest(self) -> Path | None:
        found = self.found()
        return found[-1] if found else None

    def clear_partial(self) -> None:
        """Remove what a killed run left half written or half removed."""
        if not self.folder.is_dir():
            return
        remove_partial(self.folder)
        for path in self.folder.glob("step-*"):
            with suppress(OSError):  # holds something, or is no folder
                path.rmdir()

    def save(self, run: Run, tokenizer: Tokenizer, *, settings: Mapping[str, Any], data: str) -> Path:
        """Write a checkpoint; older ones go only when it is complete. With several processes all of them must call it.

        Args:
            settings: what decides the run's result; :meth:`check` compares it.
            data: fingerprint of the tokens.

        Raises:
            OSError: it could not be written; the older ones are as they were.
        """
        folder = self.folder / f"step-{run.step:08d}"
        contents = run.state(settings=dict(settings), data=data)

        def write() -> None:
            if folder.exists():
                return
            try:
                with whole_folder(folder) as beside:
                    contents.write(beside)
                    tokenizer.save(beside)
            except OSError as error:
                what = f"{folder} could not be saved; those before it are as they were, and --resume goes on from the newest"
                raise OSError(error.errno, f"{what} ({os.strerror(error.errno or 0)})") from error
            for old in self.found()[: -self.keep]:
                remove_folder(old)

        run.place.first_does(write)
        return folder

    @staticmethod
    def check(folder: Path, settings: Mapping[str, Any], data: str | None = None) -> None:
        """Compare what decides a result with what a checkpoint was made with.

        Raises:
            ValueError: it cannot be read, or was of another configuration, or of other data; with every value that differs.
        """
        try:
            kinds = {**TRAINING, "settings": dict, "data": str}
            state = read_tensors(folder / "training.pt", "must be the state of a training run", kinds)
            read_tensors(folder / "weights.pt", "must hold the weights of a model", {})
        except (ValueError, OSError) as error:
            rule = f"must be readable; without its folder the run goes on from the one before ({folder})"
            raise bad_value("the newest checkpoint", rule, str(error).splitlines()[0]) from error
        here, there = flat(settings), flat(state["settings"])
        differ = [name for name in sorted({*here, *there}) if here.get(name, MISSING) != there.get(name, MISSING)]
        if differ:
            came = "; ".join(f"{name} is {here.get(name, MISSING)!r} here and {there.get(name, MISSING)!r} there" for name in differ)
            raise bad_value("the configuration", f"must be that of the checkpoint {folder}", came)
        if data is not None and state["data"] != data:
            raise bad_value("the text", f"must be that of the checkpoint {folder}", f"other tokens ({data}, not {state['data']})")


def flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables with dotted names.

    >>> flat({"train": {"steps": 3}})
    {'train.steps': 3}
    """
    found: dict[str, Any] = {}
    for name, value in tables.items():
        found.update(flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return found
