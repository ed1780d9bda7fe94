"""Sizes that no machine could work through are refused before any work, in every report and picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import s2attn
from s2attn import Dense, Local, Stride
from s2attn.analysis.context import describe_context
from s2attn.analysis.reach import reach
from s2attn.cli.app import app

BIG = 10**9
S2 = Local(16) | Stride(8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: s2attn.describe(S2, BIG, 1, 4096),
            f"num_heads and layers must be at most 65536 heads in all; got {BIG} heads",
        ),
        (lambda: s2attn.describe(S2, 8, 8, 4096, layers=BIG), f"at most 65536 heads in all; got 8 heads in {BIG} layers"),
        (lambda: s2attn.describe(S2, 512, 8, 4096, layers=512), "at most 65536 heads in all"),
        (lambda: s2attn.describe(Dense(), 8, 8, BIG), f"seqlen must be at most 2097152 tokens, 32768 blocks of 64; got {BIG}"),
        (lambda: s2attn.describe(Dense(), 8, 8, 2**20, block=16), "seqlen must be at most 524288 tokens, 32768 blocks of 16"),
        (lambda: s2attn.describe(S2, 8, 8, 4096, ranks=BIG), "ranks must be at most 65536"),
        (lambda: describe_context(S2, BIG, 1, 1 << 20, ranks=4), "at most 65536 heads in all"),
        (lambda: describe_context(S2, 8, 8, 1 << 20, ranks=4, layers=BIG), "layers must be at most 65536"),
        (lambda: reach(S2, 8, 8, 4096, layers=BIG), "at most 65536 heads in all"),
        (lambda: reach(S2, 8, 8, 10**20), "seqlen must be at most"),
        (lambda: s2attn.plot(S2, BIG, 1, 4096, "x.png"), "at most 65536 heads in all"),
        (lambda: s2attn.plot(S2, 8, 8, BIG, "x.png"), "seqlen must be at most"),
        (lambda: s2attn.plot(S2, 8, 8, 4096, "x.png", dpi=10**6), r"panels and dpi must be at most 64 and 600; got \(8, 1000000\)"),
        (lambda: s2attn.plot(S2, 8, 8, 4096, "x.png", panels=10**6), "panels and dpi must be at most"),
        (lambda: s2attn.plot(S2, 8, 8, 4096, "x.png", layer=10**20), "layer must be at most 2147483647"),
    ],
)
def test_a_size_is_refused(make: Callable[[], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        make()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--heads", "1000000000"], "num_heads and layers must be at most 65536 heads in all"),
        (["--layers", "1000000000"], "num_heads and layers must be at most"),
        (["--seqlen", "1000000000000"], "seqlen must be at most 2097152 tokens"),
    ],
)
def test_show_says_it_in_one_line(words: list[str], message: str) -> None:
    shown = CliRunner().invoke(app, ["show", "local:16|stride:8", *words])
    assert shown.exit_code == 2 and shown.stdout == ""
    assert shown.stderr.startswith("s2attn: ") and shown.stderr.count("\n") == 1 and message in shown.stderr


@pytest.mark.parametrize(
    "what",
    ["(" * 1000 + "dense" + ")" * 1000, "dense|" * 9000, "random:1000000", "window:99999999999999999999", "x" * 9000, "x" * 9000 + ".json"],
)
def test_show_refuses_bombs_in_one_line(what: str) -> None:
    shown = CliRunner().invoke(app, ["show", what])
    assert shown.exit_code == 2 and shown.stderr.startswith("s2attn: ") and shown.stderr.count("\n") == 1 and len(shown.stderr) < 400


def test_show_refuses_a_file_of_brackets(tmp_path: Path) -> None:
    (tmp_path / "bomb.json").write_text("[" * 100_000)
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "bomb.json")])
    assert shown.exit_code == 2 and "must nest at most 64 deep" in shown.stderr


def test_sizes_of_real_models_are_taken() -> None:
    assert s2attn.describe(S2, 128, 8, 8192, layers=128).layers == 128
