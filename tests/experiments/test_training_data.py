"""What a run reads: text split so that nothing is in both parts, tokens that lead back to it, rows in which no document sees another."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch

from experiments.data import Batch, stdlib_files
from experiments.place import Place
from experiments.training.documents import read_documents
from experiments.training.packing import Packed, Rows
from experiments.training.tokens import END, BytePairs, Bytes, Tokens, tokenizer_in

TEXTS = ["def f(x):\n    return x\n", "naïve café <|end|> ☃\n", "y = 1\n", "import os\n" * 9]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(30):
        path = tmp_path / f"package{i % 10}" / f"m{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"file {i}\n" + "words and words\n" * 10)
    return tmp_path


def packed_of(texts: list[str], **rows: int) -> Packed:
    tokens = Tokens.of(texts, Bytes())
    return Packed(tokens, tokens, Rows(**{"batch": 2, "context": 16, "windows": 3, **rows}))


@pytest.mark.parametrize("split", ["file", "package"])
def test_every_file_is_in_one_part(folder: Path, split: str) -> None:
    found = read_documents(str(folder), split=split, percent=30)
    assert not set(found.train_names) & set(found.validation_names)
    assert len(found.train) + len(found.validation) == 30 and found.left_out == 0
    if split == "package":
        assert not {name.split("/")[0] for name in found.train_names} & {name.split("/")[0] for name in found.validation_names}


def test_tails_are_kept_back_and_join_to_the_whole_text(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("0123456789" * 10)
    found = read_documents(str(tmp_path), split="tail", percent=10)
    assert (len(found.train[0]), found.validation[0]) == (90, "0123456789")


def test_what_is_no_text_is_left_out_and_hidden_files_are_not_read(folder: Path) -> None:
    (folder / "picture.bin").write_bytes(b"\x89PNG\x00\x00" * 20)
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "empty.txt").write_text(" \n")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden\n")
    found = read_documents(str(folder), split="file", percent=30)
    assert found.left_out == 3
    assert len(found.train) + len(found.validation) == 30


def test_only_names_that_are_included_are_read(folder: Path) -> None:
    (folder / "other.md").write_text("other\n")
    names = read_documents(str(folder), include=("*.txt",), split="file", percent=30)
    assert "other.md" not in names.train_names + names.validation_names


def test_the_installed_packages_come_behind_the_standard_library() -> None:
    library = {path.relative_to(sysconfig.get_path("stdlib")).as_posix() for path in stdlib_files()}
    found = read_documents("installed", max_files=len(library) + 50)
    names = set(found.train_names + found.validation_names)
    assert {"heapq.py", "json/decoder.py"} <= names & library
    assert 0 < len(names - library) <= 50


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "no files in "),
        ({"a.bin": b"\x00\x01", "b.bin": b"\xff\xfe"}, "2 files without text in "),
        ({"a.txt": b""}, "1 files without text in "),
    ],
    ids=["empty folder", "binary files", "empty file"],
)
def test_a_folder_without_text_is_refused(tmp_path: Path, files: dict[str, bytes], found: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"data.source must hold text files \(\*\) in UTF-8; got {found}"):
        read_documents(str(tmp_path))


def test_a_folder_that_does_not_exist_and_a_split_that_leaves_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.source must be a folder, or one of stdlib, installed; got "):
        read_documents(str(tmp_path / "nowhere"))
    (tmp_path / "one.txt").write_text("text\n")
    with pytest.raises(ValueError, match=r"data.split must leave text for training and validation \(of 1 files\); .* got 'file'"):
        read_documents(str(tmp_path), split="file")
    with pytest.raises(ValueError, match=r"data.split must be one of auto, package, file, tail; got 'half'"):
        read_documents(str(tmp_path), split="half")
    with pytest.raises(ValueError, match=r"data.percent must be below 100; got 100"):
        read_documents(str(tmp_path), percent=100)


FOLDERS = {
    "one file": {"one.txt": 4000},
    "two files": {"a.txt": 3000, "b.txt": 3000},
    "a flat folder": {f"m{i}.txt": 200 + 7 * i for i in range(40)},
    "one subfolder": {f"pages/m{i}.txt": 500 for i in range(12)},
    "two subfolders": {f"{part}/m{i}.txt": 300 for part in ("a", "b") for i in range(20)},
    "many tiny files": {f"m{i}.txt": 9 for i in range(400)},
    "one large file among small ones": {"large.txt": 90_000, **{f"m{i}.txt": 50 for i in range(200)}},
    "packages": {f"package{i}/m{j}.txt": 100 for i in range(100) for j in range(3)},
}


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)
@pytest.mark.parametrize("percent", [1, 5, 30, 90])
def test_the_default_split_works_for_any_folder_with_enough_text(tmp_path: Path, files: dict[str, int], percent: int) -> None:
    for name, size in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x" * size)
    found = read_documents(str(tmp_path), percent=percent)
    kept, total = sum(map(len, found.validation)), sum(files.values())
    assert sum(map(len, found.train)) + kept == total
    assert percent / 4 <= 100 * kept / total <= min(4 * percent, 99)
    again = read_documents(str(tmp_path), split=found.split, percent=percent)
    assert again == found, "a split that is named is the one that was taken"


def test_the_default_split_keeps_packages_together_where_it_can(folder: Path) -> None:
    assert read_documents(str(folder), percent=30).split == "package"
    assert read_documents("stdlib").split == "package"


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokens_lead_back_to_the_text_and_never_look_like_an_end(tmp_path: Path, kind: str) -> None:
    tokenizer = Bytes() if kind == "bytes" else BytePairs.train(TEXTS, 300)
    tokenizer.save(tmp_path)
    again = tokenizer_in(tmp_path)
    assert again.size == tokenizer.size
    for text, tokens in zip(TEXTS, again.encode(TEXTS), strict=True):
        assert again.decode(tokens.tolist()) == text.encode()
        assert END not in tokens.tolist() and int(tokens.max()) < again.size


def test_byte_pairs_are_fewer_than_bytes_and_the_same_each_time() -> None:
    texts = ["import os\nimport sys\n" * 20]
    first, again = BytePairs.train(texts, 300), BytePairs.train(texts, 300)
    assert torch.equal(first.encode(texts)[0], again.encode(texts)[0])
    assert first.encode(texts)[0].numel() < len(texts[0]) / 3
    with pytest.raises(ValueError, match=r"data.vocabulary must be above 256, .* got 256"):
        BytePairs.train(texts, 256)


def test_targets_follow_inputs_and_documents_begin_where_they_are_said_to() -> None:
    feed = packed_of(TEXTS)
    for step in range(12):
        batch = feed.train(step)
        assert batch.inputs.shape == batch.targets.shape == (2, 16) and batch.inputs.dtype == torch.int64
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        assert batch.cu_seqlens is not None and batch.cu_seqlens.dtype == torch.int32
        starts = set(batch.cu_seqlens.tolist())
        assert starts == {0, 16, 32} | set((batch.inputs.flatten() == END).nonzero().flatten().tolist())


def test_rows_that_are_not_packed_are_one_text_each() -> None:
    tokens = Tokens.of(TEXTS, Bytes())
    feeds = [Packed(tokens, tokens, Rows(2, 16, packed=packed)) for packed in (False, True)]
    assert all(batch.cu_seqlens is None for batch in (feeds[0].train(0), *feeds[0].validation()))
    assert torch.equal(feeds[0].train(3).targets, feeds[1].train(3).targets)


def test_an_epoch_reads_every_token_once() -> None:
    texts = [chr(97 + i) * (3 + i) for i in range(8)]  # 52 letters and 8 ends: 6 rows of 10
    feed = packed_of(texts, batch=1, context=10)
    assert feed.rows_per_epoch == 6
    epochs = [torch.cat([feed.train(step).inputs.flatten() for step in range(first, first + 6)]) for first in (0, 6)]
    for read in epochs:
        assert torch.equal(read.sort().values, feed.tokens.flat.long().sort().values)
    assert not torch.equal(*epochs)


def test_steps_depend_on_their_number_and_the_seed_alone() -> None:
    def step(number: int, seed: int = 0, after: int = 0) -> Batch:
        feed = packed_of(TEXTS, seed=seed)
        feed.train(after)
        return feed.train(number)

    assert torch.equal(step(7).inputs, step(7, after=40).inputs)
    assert not all(torch.equal(step(number).inputs, step(number, seed=1).inputs) for number in range(4))


def test_processes_share_out_the_rows_of_a_step() -> None:
    whole = packed_of(TEXTS, batch=4)
    parts = [Packed(whole.tokens, whole.unseen, whole.rows, Place(rank=rank, ranks=2)) for rank in range(2)]
    for step in (0, 5):
        assert torch.equal(torch.cat([part.train(step).inputs for part in parts]), whole.train(step).inputs)


def test_rows_longer_than_the_text_are_refused() -> None:
    tokens, short = Tokens.of(TEXTS, Bytes()), Tokens.of(["abc"], Bytes())
    with pytest.raises(ValueError, match=r"train.context must not be above the tokens of the training text \(4\); got 16"):
        Packed(short, tokens, Rows(1, 16))
    rule = r"train.context must not be above the tokens of the validation text \(4\); a larger data.percent may help; got 16"
    with pytest.raises(ValueError, match=rule):
        Packed(tokens, short, Rows(1, 16))
    assert Packed(short, short, Rows(1, 4)).train(0).targets.tolist() == [[97, 98, 99, END]]
