"""Calibration: tables by hand, and what a calibrated selector then keeps."""

from __future__ import annotations

import pytest
import torch

from s2attn import XAttention
from s2attn.lab.recall import recall
from s2attn.ops import antidiagonal
from s2attn.selectors import calibrate
from s2attn.selectors.planted import planted


def by_hand(q, k, stride, block, target):
    score, true = (antidiagonal(q, k, stride=s, block=block) for s in (stride, 1))
    threshold = []
    for head in range(q.shape[2]):
        above = total = 0.0
        for row in range(score.shape[2]):
            masses, scores = true[0, head, row].tolist(), score[0, head, row].tolist()
            held, needed = 0.0, []
            for j in sorted(range(len(masses)), key=lambda j: -masses[j]):
                if held >= target * sum(masses):
                    break
                needed.append(j)
                held += masses[j]
            smallest = min(scores[j] for j in needed)
            above, total = above + sum(s for s in scores if s >= smallest), total + sum(scores)
        threshold.append(above / total)
    return threshold


@pytest.mark.parametrize("seqlen", [256, 230])
def test_equals_the_rule_by_hand(seqlen):
    x = planted("slashes", seqlen=seqlen, width=16)
    table = calibrate(XAttention(8, block=32), [[(x.q, x.k)]], target=0.85).threshold
    assert table[0] == pytest.approx(by_hand(x.q, x.k, 8, 32, 0.85), abs=1e-4)


def test_samples_count_by_their_mass():
    x, y = (planted("slashes", seqlen=256, width=16, seed=seed) for seed in (0, 1))
    one, other, both = (
        calibrate(XAttention(8, block=32), [samples]).threshold[0] for samples in ([(x.q, x.k)], [(y.q, y.k)], [(x.q, x.k), (y.q, y.k)])
    )
    assert both == pytest.approx([(a + b) / 2 for a, b in zip(one, other, strict=True)], abs=1e-5)
    together = calibrate(XAttention(8, block=32), [[(torch.cat([x.q, y.q]), torch.cat([x.k, y.k]))]]).threshold[0]
    assert together == pytest.approx(both, abs=1e-5)


def test_a_calibrated_selector_keeps_what_was_asked_for():
    x, fresh = (planted("slashes", seqlen=1024, width=16, seed=seed) for seed in (0, 5))
    kept, density = [], []
    for target in (0.5, 0.9):
        selector = calibrate(XAttention(8, block=32, forced=()), [[(x.q, x.k)]], target=target)
        assert (selector.stride, selector.block, selector.forced) == (8, 32, ())
        got = recall(selector, fresh.q, fresh.k, fresh.v)
        kept, density = [*kept, got.kept], [*density, got.density]
    assert kept[0] > 0.5 and kept[1] > 0.9 and density[0] < density[1] < 0.6


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: calibrate(3, []), TypeError, "selector must be an XAttention; got int"),
        (lambda: calibrate(XAttention(), []), ValueError, "layers must have at least one layer"),
        (lambda: calibrate(XAttention(), [[]]), ValueError, "a sample with a query that sees a key in layer 0"),
        (lambda: calibrate(XAttention(), [[(torch.ones(1, 4, h, 4), torch.ones(1, 4, 1, 4)) for h in (1, 2)]]), ValueError, "same heads"),
        (lambda: calibrate(XAttention(), [[]], target=0), ValueError, r"target must be in \(0, 1\]; got 0"),
    ],
)
def test_bad_arguments(make, error, words):
    with pytest.raises(error, match=words):
        make()
