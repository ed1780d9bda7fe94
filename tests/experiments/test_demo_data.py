"""The demo's text: split by file, the same for everybody, read in an order that depends on seed and step alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.data import END_OF_FILE, is_validation, read_corpus, stdlib_files, train_batch, validation_batches


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(40):
        (tmp_path / f"m{i}.py").write_text(f"# file {i}\n" + "x = 1\n" * 20)
    for inside in ("test/test_a.py", "pkg/tests/test_b.py", "site-packages/c.py", "pkg/__pycache__/d.py"):
        path = tmp_path / inside
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("left out\n")
    (tmp_path / "notes.txt").write_text("left out\n")
    return tmp_path


def test_tests_and_installed_packages_are_left_out(folder: Path) -> None:
    assert sorted(path.name for path in stdlib_files(folder)) == sorted(f"m{i}.py" for i in range(40))


def test_the_standard_library_is_found() -> None:
    names = {path.name for path in stdlib_files()}
    assert {"heapq.py", "argparse.py"} <= names
    assert not any("site-packages" in path.parts for path in stdlib_files())


def test_no_file_is_in_both_parts_and_none_is_lost(folder: Path) -> None:
    corpus = read_corpus(folder, percent=30)
    train, validation = set(corpus.train_files), set(corpus.validation_files)
    assert not train & validation
    assert len(train | validation) == 40
    text = bytes(corpus.validation.tolist())
    assert text.count(bytes([END_OF_FILE])) == len(validation)
    assert {name for name in train | validation if f"# file {name[1:-3]}\n".encode() in text} == validation


def test_a_file_stays_in_its_part_when_others_come_and_go(folder: Path) -> None:
    before = set(read_corpus(folder, percent=30).validation_files)
    (folder / "new.py").write_text("y = 2\n")
    (folder / "m0.py").unlink()
    assert set(read_corpus(folder, percent=30).validation_files) - {"new.py"} == before - {"m0.py"}


def test_the_split_is_about_as_large_as_asked() -> None:
    assert 0.03 < sum(is_validation(f"package/module{i}.py") for i in range(4000)) / 4000 < 0.07


@pytest.mark.parametrize("percent", [0, 100])
def test_an_empty_part_is_refused(folder: Path, percent: int) -> None:
    with pytest.raises(ValueError, match=rf"percent must leave files for training and validation \(of 40\); got {percent}"):
        read_corpus(folder, percent=percent)


def test_a_folder_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="root must hold Python source files; got "):
        stdlib_files(tmp_path)


def test_batches_follow_seed_and_step_alone() -> None:
    text = torch.randint(256, (5000,), dtype=torch.uint8)
    first = train_batch(text, 3, batch=2, context=64, seed=1)
    torch.manual_seed(99)
    again = train_batch(text, 3, batch=2, context=64, seed=1)
    other, another = train_batch(text, 4, batch=2, context=64, seed=1), train_batch(text, 3, batch=2, context=64, seed=2)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0], another[0])
    assert first[0].shape == first[1].shape == (2, 64) and first[0].dtype == torch.int64
    assert torch.equal(first[0][:, 1:], first[1][:, :-1])


def test_a_text_shorter_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="text must be longer than the context of 64 bytes; got 64"):
        train_batch(torch.zeros(64, dtype=torch.uint8), 0, batch=1, context=64, seed=0)


def test_validation_windows_are_evenly_spaced_and_reach_the_end() -> None:
    text = torch.arange(1001).remainder(256).to(torch.uint8)
    pieces = list(validation_batches(text, windows=3, context=100))
    assert len(pieces) == 3
    assert torch.equal(pieces[0][0][0], text[:100].long())
    assert torch.equal(pieces[-1][1][0], text[901:].long())
