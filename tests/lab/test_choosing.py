"""The commands `recall` and `calibrate`: what they compare, what they read, what they write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from s2attn import XAttention, attention
from s2attn.cli.app import app
from s2attn.lab.choosing import calibrated, methods, planted_data, read_by
from s2attn.lab.model import LanguageModel, ModelConfig
from s2attn.lab.recall import judge, recall
from s2attn.lab.train import save_model
from s2attn.selectors.planted import planted


def run(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, list(words))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(LanguageModel(ModelConfig(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=48)), folder)
    (folder / "text.txt").write_bytes(bytes(range(256)) * 4)
    return folder


def test_a_larger_budget_never_keeps_less() -> None:
    found = judge(methods(32, [0.5, 0.95]), planted_data(256))
    assert len(found) == 15
    for (_, name), (low, *_, high) in found.items():
        assert low.density <= high.density and low.kept <= high.kept + 1e-6, name


def test_a_fitted_table_keeps_what_was_wanted_of_what_it_has_not_seen() -> None:
    layers = [[planted(structure, seqlen=512, seed=seed) for seed in range(3)] for structure in ("slashes", "bands")]
    fitted, judged = calibrated(XAttention(8, block=32), layers, 0.8)
    assert len(fitted.threshold) == 2 and all(found["kept"] > 0.78 and found["density"] < 0.9 for found in judged)
    x = layers[1][2]
    assert judged[1]["kept"] == recall(fitted, x.q, x.k, x.v, layer=1).kept
    with pytest.raises(ValueError, match="windows must be 2 at least"):
        calibrated(XAttention(8, block=32), [layers[0][:1]], 0.8)


def test_every_layer_is_read_on_every_piece(checkpoint: Path) -> None:
    model = LanguageModel(ModelConfig(layers=3, width=32, heads=4, kv_heads=2, head_dim=8, hidden=48))
    layers = read_by(model, torch.arange(200, dtype=torch.uint8), windows=2, seqlen=64)
    assert [len(pieces) for pieces in layers] == [2, 2, 2] and layers[0][0].k.shape == (1, 64, 2, 8)
    assert not torch.equal(layers[0][0].q, layers[0][1].q) and not torch.equal(layers[0][0].q, layers[1][0].q)


def test_recall_prints_a_table_and_draws_it(checkpoint: Path, tmp_path: Path) -> None:
    png = tmp_path / "new" / "recall.png"
    shown = run("recall", "--seqlen", "256", "--block", "32", "--thresholds", "0.9", "--png", str(png))
    assert shown.exit_code == 0, shown.output
    assert "| slashes | XAttention, stride 16 | 90 % of the estimate |" in shown.stdout
    assert "| bands | vertical-slash | 64 keys, 16 distances |" in shown.stdout
    assert png.read_bytes().startswith(b"\x89PNG")
    text = str(checkpoint / "text.txt")
    of_model = run("recall", "--checkpoint", str(checkpoint), "--text", text, "--seqlen", "128", "--block", "32", "--thresholds", "0.9")
    assert of_model.exit_code == 0, of_model.output
    assert "| layer 1 | mean pool |" in of_model.stdout and "slashes" not in of_model.stdout


def test_calibrate_writes_a_table_that_attention_takes(checkpoint: Path, tmp_path: Path) -> None:
    path, words = tmp_path / "new" / "threshold.json", ["--text", str(checkpoint / "text.txt"), "--seqlen", "128", "--windows", "2"]
    shown = run("calibrate", str(checkpoint), "--out", str(path), "--stride", "8", "--block", "32", "--target", "0.7", *words)
    assert shown.exit_code == 0, shown.output
    assert "70 % of the attention mass wanted" in shown.stdout and "mass kept" in shown.stdout
    written = json.loads(path.read_text())
    selector = XAttention(**written["selector"])
    assert written["target"] == 0.7 and selector.stride == 8 and [len(row) for row in selector.threshold] == [4, 4]
    q, k = torch.randn(1, 64, 4, 8), torch.randn(1, 64, 2, 8)
    assert attention(q, k, k, selector, layer=1).shape == q.shape


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recall", "--thresholds", "half"], "s2attn: --thresholds must be numbers separated by commas; got 'half'"),
        (["recall", "--thresholds", "1.5"], "s2attn: threshold must be in (0, 1]; got 1.5"),
        (["recall", "--text", "a.txt"], "s2attn: --text must come with --checkpoint, whose model reads it; got a.txt"),
        (["calibrate", "nowhere"], "s2attn: folder must hold config.json and weights.pt; got nowhere"),
        (["calibrate", "nowhere", "--stride", "7"], "s2attn: stride must divide block (64); got 7"),
    ],
)
def test_what_cannot_be_done_is_one_line(words: list[str], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 2 and result.stderr.strip() == message
