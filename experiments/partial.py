"""What an unfinished run of a study has done so far: kept in a folder of its own, so that a stop loses a minute and not the run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from experiments.files import remove_folder, remove_partial, whole_folder
from experiments.folder import OutOfTime, Record, Watch, differing, write_json
from experiments.place import Place
from experiments.train import Run, TrainConfig
from s2attn.core import bad_value
from s2attn.core.files import read_json


class Partial:
    """The folder of one unfinished run: finished parts of its record, and the newest checkpoint of the model in training.

    Args:
        made_with: what decides the run's result, as plain JSON values; a folder of other settings is refused.
        watch: when the time is over, a checkpoint is written and the run stops.

    Raises:
        ValueError: the folder belongs to other settings, or cannot be read.
    """

    every: ClassVar[float] = 60.0
    """Seconds between two checkpoints of a model in training."""

    def __init__(self, folder: Path, made_with: Record, watch: Watch):
        self.folder, self.watch = folder, watch
        self._began = self._saved = time.perf_counter()
        facts = folder / "made_with.json"
        if facts.is_file():
            differ = differing(made_with, _read(facts))
            if differ:
                raise bad_value("out", f"must be a folder of the same settings; {', '.join(differ)} differ", folder)
        else:
            write_json(made_with, facts)
        self._earlier: float = self._part("seconds") or 0.0

    @property
    def seconds(self) -> float:
        """How long the run has taken so far, those before a stop up to their last checkpoint."""
        return self._earlier + time.perf_counter() - self._began

    def _part(self, name: str) -> Any:
        path = self.folder / f"{name}.json"
        return _read(path) if path.is_file() else None

    def once(self, name: str, make: Callable[[], Record]) -> Record:
        """A part of the record: made now and kept, or as it was kept before."""
        kept = self._part(name)
        if kept is None:
            kept = make()
            write_json(kept, self.folder / f"{name}.json")
            write_json(self.seconds, self.folder / "seconds.json")
        return kept

    def learner(self, name: str, new: Callable[[], Run], config: TrainConfig, place: Place) -> Run:
        """The run that trains a model: its newest checkpoint, or a new one."""
        newest = self._newest(name)
        return new() if newest is None else Run.resume(newest, name, config, place)

    def _newest(self, name: str) -> Path | None:
        # Names count steps with leading zeros.
        return max(self._checkpoints(name), default=None)

    def _checkpoints(self, name: str) -> list[Path]:
        return list((self.folder / name).glob("step-*"))

    def tick(self, name: str, run: Run) -> None:
        """Call this after every step: it writes a checkpoint when it is time for one.

        Raises:
            OutOfTime: the time is over; all is saved.
        """
        over = self.watch.left < 0
        if over or time.perf_counter() - self._saved > self.every:
            self._save(name, run)
        if over:
            raise OutOfTime

    def _save(self, name: str, run: Run) -> None:
        folder = self.folder / name / f"step-{run.step:08d}"
        if not folder.exists():
            remove_partial(folder.parent)
            with whole_folder(folder) as beside:
                run.state().write(beside)
            for old in self._checkpoints(name):
                if old != folder:
                    remove_folder(old)
        write_json(self.seconds, self.folder / "seconds.json")
        self._saved = time.perf_counter()

    def remove(self) -> None:
        """The run is finished, and its record written."""
        shutil.rmtree(self.folder)
        if not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()


def _read(path: Path) -> Any:
    return read_json(path, "out", f"must hold readable files; delete {path.parent} to begin that run anew")
