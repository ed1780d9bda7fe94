"""Functions that take a path take a string and any `os.PathLike`."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
import torch

import s2attn
from experiments.model import LanguageModel, ModelConfig
from experiments.train import load_model, save_model
from experiments.training.tokens import Bytes, read_tokens, tokenizer_in
from s2attn import SparseCache, Window
from s2attn.tuning.journal import read_record, write_record

PACKAGE = Path(s2attn.__file__).parent


class Place(os.PathLike[str]):
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize("kind", [str, Path, Place])
def test_files_are_named_in_any_way(kind: type, tmp_path: Path) -> None:
    def at(name: str) -> str:
        return kind(tmp_path / name)

    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(layers=1, width=16, heads=1, kv_heads=1, hidden=16))
    save_model(model, at("model"))
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    assert torch.equal(load_model(at("model"))(tokens), model(tokens))
    assert isinstance(tokenizer_in(at("model")), Bytes) and read_tokens(at("model"), b"a") == [97]
    cache = SparseCache(Window(8), num_kv_heads=1, head_dim=4, num_pages=2, max_tokens=20, dtype=torch.float32)
    cache.save(at("cache.pt"))
    assert SparseCache.load(at("cache.pt")).num_pages == 2
    write_record({"schema": 2, "rows": []}, at("record.json"))
    assert read_record(at("record.json"))["rows"] == []
    s2attn.plot(Window(8), num_heads=1, seqlen=64, path=at("plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 1000
    for call in (load_model, tokenizer_in, read_record, SparseCache.load):
        with pytest.raises(TypeError, match=r"(folder|path) must be a string or a path; got int"):
            call(3)


def test_no_file_of_the_library_is_written_in_place() -> None:
    """Nothing but ``s2attn/core/files.py`` writes, appended lines and files for a child process in a temporary folder apart."""
    allowed = {
        "core/files.py",
        "analysis/plot.py",  # figures into an atomic file
        "cache/saved.py",  # torch.save into an atomic file
        "tuning/clock.py",  # a switch of the kernel
        "tuning/tune_session.py",  # jobs of child processes
    }
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                writes = node.func.attr in ("write_text", "write_bytes", "savefig", "tofile", "savez", "to_csv")
                saves = node.func.attr == "save" and ast.unparse(node.func.value) in ("torch", "np")
                modes = [ast.unparse(word) for word in node.args] + [ast.unparse(word.value) for word in node.keywords]
                opens = node.func.attr == "open" and any(mode.strip("'\"")[:1] in ("w", "a", "x") and len(mode) < 6 for mode in modes)
                if writes or saves or opens:
                    found.add(path.relative_to(PACKAGE).as_posix())
    assert found <= allowed
