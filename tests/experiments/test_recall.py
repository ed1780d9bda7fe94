"""Judging selectors: the numbers against sums over dense weights, and what known choices must score."""

from __future__ import annotations

import pytest
import torch

from experiments.model import LanguageModel, ModelConfig
from experiments.recall import captured, judge, recall, recall_chart, recall_table
from s2attn import Dense, XAttention, attention
from s2attn.selectors import Gated, MeanPool, calibrate
from s2attn.selectors.planted import STRUCTURES, planted


def at_random(blocks, top_k, block=32):
    return Gated(lambda q, k, call: torch.rand(q.shape[0], q.shape[2], blocks, blocks), top_k=top_k, block=block)


def true_weights(x, causal=True):
    group = x.q.shape[2] // x.k.shape[2]
    logits = torch.einsum("bthd,bshd->bhts", x.q, x.k.repeat_interleave(group, 2)) * x.q.shape[-1] ** -0.5
    unseen = ~torch.ones(logits.shape[-2:], dtype=torch.bool).tril() if causal else torch.zeros(logits.shape[-2:], dtype=torch.bool)
    return torch.softmax(logits.masked_fill(unseen, -torch.inf), -1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seqlen", [256, 250])
def test_numbers_equal_those_of_dense_weights(causal, seqlen):
    x = planted("slashes", seqlen=seqlen, heads=2, kv_heads=1, width=8)
    selector = XAttention(8, 0.5, block=32)
    layout = selector.layout(x.q, x.k, causal=causal)
    weights = true_weights(x, causal)[0]
    rows = range(8)
    kept, most, listed, exist = [], [], 0, 0
    for head in range(2):
        for row in rows:
            mine = weights[head, row * 32 : (row + 1) * 32]
            full, partial = layout.rows.line(head, row)
            chosen = full + [block for block, _ in partial]
            by_block = [float(mine[:, j * 32 : (j + 1) * 32].sum() / mine.sum()) for j in range(8)]
            kept.append(sum(by_block[j] for j in chosen))
            most.append(sum(sorted(by_block)[-len(chosen) :]))
            listed, exist = listed + len(chosen), exist + (row + 1 if causal else 8)
    got = recall(selector, x.q, x.k, x.v, causal=causal)
    assert got.kept == pytest.approx(sum(kept) / 16, abs=1e-4) and got.worst == pytest.approx(min(kept), abs=1e-4)
    assert got.oracle == pytest.approx(sum(most) / 16, abs=1e-4) and got.density == pytest.approx(listed / exist)
    out, dense = (attention(x.q, x.k, x.v, pattern, causal=causal) for pattern in (selector, Dense()))
    assert got.error == pytest.approx(float((out - dense).norm() / dense.norm()), rel=1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("stride", [4, 8, 16])
def test_antidiagonals_find_planted_lines(structure, stride):
    """At nine tenths of the estimated mass: close to the best choice of as many blocks, with few blocks, and far better than chance."""
    x = planted(structure, seqlen=1024, width=16)
    got = recall(XAttention(stride, 0.9, block=32), x.q, x.k, x.v)
    assert got.kept > 0.9 and got.kept > 0.92 * got.oracle and got.density < 0.45
    chance = recall(at_random(32, max(1, round(got.density * 16))), x.q, x.k, x.v)
    assert chance.kept < 0.75 * got.kept and chance.error > 2 * got.error


def test_nothing_left_out_is_perfect():
    x = planted("bands", seqlen=256)
    got = recall(MeanPool(top_k=8, block=32), x.q, x.k, x.v)
    assert got.density == 1.0 and got.kept == pytest.approx(1.0) and got.oracle == pytest.approx(1.0) and got.error < 1e-5


def test_structures_are_where_they_are_said_to_be():
    for structure, lines in (("verticals", 3), ("bands", 3), ("slashes", 3)):
        x = planted(structure, seqlen=512, heads=1, kv_heads=1, lines=lines, width=32, seed=4)
        weights = true_weights(x)[0, 0, 352:]  # rows late enough to have all of them before them
        by_run = weights.view(5, 32, 16, 32).mean(1).sum(-1)
        assert bool((by_run.topk(lines).values.sum(-1) > 0.6).all())
        if structure == "bands":
            assert float(torch.stack([by_run[i, 9 + i : 12 + i].sum() for i in range(5)]).mean()) > 0.7
        if structure == "verticals":
            # One of the three places is the last run, which only the last of these rows can see.
            assert [sorted(row.topk(2).indices.tolist()) for row in by_run[:4]] == [[0, 10]] * 4
            assert sorted(by_run[4].topk(3).indices.tolist()) == [0, 10, 15]
    assert not torch.equal(planted("bands", seqlen=64, seed=0, lines=1).q, planted("bands", seqlen=64, seed=1, lines=1).q)


def test_table_and_chart(tmp_path):
    data = {structure: planted(structure, seqlen=256, width=16) for structure in STRUCTURES}
    judged = judge({"XAttention": [XAttention(8, c, block=32) for c in (0.5, 0.9)], "means": [MeanPool(top_k=2, block=32)]}, data)
    assert list(judged)[:2] == [("verticals", "XAttention"), ("verticals", "means")]
    assert all(len(results) == (2 if name == "XAttention" else 1) for (_, name), results in judged.items())
    assert len(recall_table(judged).splitlines()) == 2 + 3 * 3
    assert recall_chart(judged, tmp_path / "recall.png").stat().st_size > 1000


def test_queries_and_keys_of_a_model_serve_for_judging_and_calibrating():
    model = LanguageModel(ModelConfig(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=48))
    tokens = torch.randint(256, (1, 192))
    samples = captured(model, tokens)
    assert [sample.q.shape for sample in samples] == [(1, 192, 4, 8)] * 2 and samples[0].k.shape == (1, 192, 2, 8)
    again = captured(model, tokens)
    assert torch.equal(again[1].k, samples[1].k) and not torch.equal(samples[0].k, samples[1].k)
    selector = calibrate(XAttention(8, block=32), [[(sample.q, sample.k)] for sample in samples], target=0.8)
    for layer, x in enumerate(samples):
        assert recall(selector, x.q, x.k, x.v, layer=layer).kept > 0.8


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: planted("dots", seqlen=64), ValueError, "structure must be one of verticals, slashes, bands; got 'dots'"),
        (lambda: planted("bands", seqlen=64, lines=3), ValueError, r"lines must be at most seqlen / width \(2\); got 3"),
        (lambda: planted("bands", seqlen=64, kv_heads=3), ValueError, r"kv_heads must divide heads \(4\); got 3"),
        (lambda: captured(torch.nn.Linear(2, 2), torch.ones(1, 2)), ValueError, "model must run a SparseAttention; got Linear"),
        (lambda: recall(Dense(), *(torch.ones(1, 8, 1, 4),) * 3), TypeError, "selector must be a Selector; got Dense"),
        (lambda: recall(XAttention(), *(torch.ones(1, 0, 1, 4),) * 3), ValueError, "must hold a query that sees a key"),
    ],
)
def test_bad_arguments(make, error, words):
    with pytest.raises(error, match=words):
        make()
