"""Files of another kind, cut short, altered or foreign: one clear error each, no traceback of torch's, and no code is run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.evidence import committed_records
from experiments.files import remove_folder, remove_partial, write_file
from experiments.folder import Job, finished
from experiments.model import LanguageModel, ModelConfig
from experiments.progress import Metrics
from experiments.train import Run, TrainConfig, load_model, save_model
from experiments.training.config import read_config
from experiments.training.store import Store
from experiments.training.tokens import BytePairs, Bytes
from s2attn.patterns import Dense, Recipe

CONFIG = ModelConfig(layers=1, width=16, heads=2, kv_heads=1, head_dim=8, hidden=16, recipe=Recipe(Dense()))
TRAIN = TrainConfig(steps=2, batch=1, context=16)
DEEP = "[" * 100_000


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("exploded"),)


def altered(path: Path) -> None:
    """One bit of a weight, which torch reads without a word."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 1
    path.write_bytes(raw)


FOREIGN: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a file of tensors"),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:500]),
    "altered": altered,
    "a pickle with code": lambda path: path.write_bytes(pickle.dumps(Bomb())),
    "torch.save with code": lambda path: torch.save({"step": Bomb()}, path),
    "a list": lambda path: torch.save([1, 2], path),
    "another dict": lambda path: torch.save({"a": torch.zeros(2)}, path),
    "another dict with a checksum": lambda path: write_file(path, {"a": torch.zeros(2)}),
    "no text as names": lambda path: torch.save({1: torch.zeros(2)}, path),
    "JSON": lambda path: path.write_text("{}"),
}


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "checkpoints")
    run = Run("train", LanguageModel(CONFIG), TRAIN)
    return store.save(run, Bytes(), settings={"a": 1}, data="tokens")


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", ["training.pt", "weights.pt"])
def test_a_checkpoint_with_a_foreign_file_is_one_error(saved: Path, name: str, kind: str) -> None:
    FOREIGN[kind](saved / name)
    with pytest.raises(ValueError, match=rf"must (be the state of|hold the weights of).*got [^\n]*{name}") as raised:
        Run.resume(saved, "train", TRAIN)
    assert "\n" not in str(raised.value)
    if kind not in ("another dict", "another dict with a checksum", "no text as names") or name == "training.pt":
        with pytest.raises(ValueError, match=r"the newest checkpoint must be readable; without its folder"):
            Store.check(saved, {"a": 1}, "tokens")
    if name == "weights.pt":
        with pytest.raises(ValueError, match=r"weights.pt|path"):
            load_model(saved)
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    "entries",
    [
        {"optimizer": {}},
        {"optimizer": {"state": 3, "param_groups": []}},
        {"generators": [3]},
        {"generators": [{"cpu": torch.zeros(3)}]},
        {"step": "three"},
    ],
    ids=str,
)
def test_a_training_file_with_foreign_entries_is_one_error(saved: Path, entries: dict[str, Any]) -> None:
    state = torch.load(saved / "training.pt", weights_only=True)
    write_file(saved / "training.pt", {**state, **entries})
    with pytest.raises(ValueError, match=r"training.pt must be the state of a training run of this model; got"):
        Run.resume(saved, "train", TRAIN)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", DEEP, '{"recipe": 3}', '{"layers": "x", "recipe": {}}', "\ufeff{"],
    ids=lambda text: text[:9],
)
def test_a_foreign_description_of_a_model_is_one_error(tmp_path: Path, text: str) -> None:
    save_model(LanguageModel(CONFIG), tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json must describe a model"):
        load_model(tmp_path)


def test_a_model_of_another_size_is_one_line(tmp_path: Path) -> None:
    save_model(LanguageModel(CONFIG), tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**described, "hidden": 32}))
    with pytest.raises(ValueError, match=r"weights.pt must hold the weights of the model in config.json; got .*size mismatch"):
        load_model(tmp_path)


def test_a_file_from_before_there_were_checksums_is_read(tmp_path: Path) -> None:
    model = LanguageModel(CONFIG)
    save_model(model, tmp_path)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    for read, kept in zip(load_model(tmp_path).parameters(), model.parameters(), strict=True):
        assert torch.equal(read, kept)


@pytest.mark.parametrize(
    "raw", [b"\xff\xfe", DEEP.encode(), b"[1", b"[]", b'{"made_with": [], "recipe": {}, "seconds": 1}'], ids=lambda raw: raw[:9]
)
def test_foreign_records_are_one_error(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one.json").write_bytes(raw)
    with pytest.raises(ValueError, match="out must hold readable runs"):
        finished(Job("one", "", {"a": 1}, {}, dict), tmp_path)
    (tmp_path / "record.json").write_bytes(raw)
    with pytest.raises(ValueError, match="record must"):
        committed_records(tmp_path)


def test_foreign_lines_of_metrics_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'\xff\xfe\n{"step": "x"}\n[1]\n' + DEEP.encode() + b'\n{"step": 1}\n{"step": 9}\n')
    Metrics(path, after=2)
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("raw", [b"\xff", b"a = " + DEEP.encode(), b"a = " + b"9" * 5000], ids=lambda raw: raw[:9])
def test_a_foreign_configuration_is_one_error(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "job.toml").write_bytes(raw)
    with pytest.raises(ValueError, match=r"^CONFIG must be TOML; got"):
        read_config(tmp_path / "job.toml")


def test_a_foreign_tokenizer_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json must be a tokenizer that python -m experiments train wrote; got"):
        BytePairs.load(tmp_path / "tokenizer.json")


def test_a_kill_while_a_checkpoint_is_removed_leaves_nothing_under_its_name(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Any, *_: object, **how: object) -> None:
        if not how:  # the process ends after the first file is gone
            next(Path(path).iterdir()).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(saved)
    assert list(saved.parent.glob("step-*")) == []
    assert len(list(saved.parent.iterdir())) == 1
    remove_partial(saved.parent)
    assert list(saved.parent.iterdir()) == []


def test_empty_folders_that_earlier_kills_left_are_removed(saved: Path) -> None:
    (saved.parent / "step-00000099").mkdir()
    (saved.parent / "step-00000098").mkdir()
    (saved.parent / "step-00000098" / "notes.txt").write_text("mine")
    Store(saved.parent).clear_partial()
    assert sorted(path.name for path in saved.parent.iterdir()) == [saved.name, "step-00000098"]
