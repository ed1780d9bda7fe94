"""HyperAttention: exact where it says so, unbiased where it samples, right gradients, and what public code gets wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import s2attn
from s2attn import Dense, hyper_attention
from s2attn.selectors import hyper
from s2attn.selectors.lsh import bucket_order, hyperplanes
from s2attn.selectors.sampling import draw, raise_to_floor, residual_floor
from s2attn.testing import assert_close, eager, oracle


def tensors(batch, seqlen_q, seqlen_k, heads, kv_heads, dim=8, v_dim=None, dtype=torch.float32):
    sizes = ((seqlen_q, heads, dim), (seqlen_k, kv_heads, dim), (seqlen_k, kv_heads, v_dim or dim))
    return [torch.randn(batch, *size).to(dtype).requires_grad_() for size in sizes]


def dense(q, k, v, causal, scale=None):
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    mask = mask.tril(k.shape[1] - q.shape[1]) if causal else mask
    return eager(q, k, v, mask, scale), oracle(q, k, v, mask, scale)


EXACT = {
    "short": {"min_seqlen": 200},
    "one block": {"block": 200, "min_seqlen": 0},
    "all keys are samples": {"samples": 200, "block": 16, "min_seqlen": 0},
}


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("lengths", [(150, 150), (150, 97), (61, 150), (131, 131)])
@pytest.mark.parametrize("causal", [True, False])
def test_exact_in_degenerate_cases(case, lengths, causal):
    q, k, v = tensors(2, *lengths, 4, 2, v_dim=5)
    out, lse = hyper_attention(q, k, v, causal=causal, return_lse=True, **EXACT[case])
    (plain, plain_lse), (exact, exact_lse) = dense(q, k, v, causal)
    assert_close("out", out, plain, exact, terms=4.0)
    assert_close("lse", lse, plain_lse, exact_lse, terms=4.0)
    rows = slice(max(0, lengths[0] - lengths[1]) if causal else 0, None)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out, lse[..., rows]), (q, k, v), (dout, dlse[..., rows]))
    want = torch.autograd.grad((exact, exact_lse[..., rows]), (q, k, v), (dout.double(), dlse[..., rows].double()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.float(), atol=2e-5, rtol=1e-4)


def test_squares_shorter_than_min_seqlen_are_exact():
    """As the authors' code has it: the halves of 300 are exact at 150, and the square between them too."""
    settings = {"block": 16, "samples": 16, "min_seqlen": 200, "return_lse": True}
    q, k, v = tensors(2, 300, 300, 4, 2, v_dim=5)
    (plain, plain_lse), (exact, exact_lse) = dense(q, k, v, True)
    out, lse = hyper_attention(q, k, v, **settings)
    assert_close("out", out, plain, exact, terms=4.0)
    assert_close("lse", lse, plain_lse, exact_lse, terms=4.0)
    # Squares of 300 are estimated, those of 150 above and below them are not.
    q, k, v = tensors(1, 600, 600, 2, 2)
    (plain, plain_lse), (exact, exact_lse) = dense(q, k, v, True)
    out, lse = hyper_attention(q, k, v, **settings)
    assert_close("out", out[:, :300], plain[:, :300], exact[:, :300], terms=4.0)
    assert (lse[..., 300:] - exact_lse[..., 300:]).abs().max() > 0.01


@pytest.mark.parametrize("causal", [True, False])
def test_a_square_of_min_seqlen_itself(causal):
    """The authors estimate it below causal halves; alone it is short enough to be exact."""
    side = 64
    lengths = (2 * side, 2 * side) if causal else (side, side)
    q, k, v = tensors(1, *lengths, 2, 2)
    (plain, plain_lse), (exact, exact_lse) = dense(q, k, v, causal)
    out, lse = hyper_attention(q, k, v, causal=causal, block=8, samples=8, min_seqlen=side, return_lse=True)
    assert_close("lse", lse[..., :side], plain_lse[..., :side], exact_lse[..., :side], terms=4.0)
    if causal:
        assert (lse[..., side:] - exact_lse[..., side:]).abs().max() > 0.01
    else:
        assert_close("out", out, plain, exact, terms=4.0)


@pytest.mark.parametrize("sampling", ["uniform", "value_norm"])
@pytest.mark.parametrize(("lengths", "kv_heads"), [((100, 100), 1), ((60, 100), 2)])
def test_the_softmax_sum_is_unbiased(sampling, lengths, kv_heads):
    """Blocks hold much of the mass here: counting their keys again among the samples would show."""
    q, k, v = (x.detach() for x in tensors(1, *lengths, 2, kv_heads))
    _, (_, exact_lse) = dense(q, k, v, False)
    settings = {"block": 32, "samples": 8, "min_seqlen": 0, "causal": False, "sampling": sampling}
    ratio = torch.stack([(hyper_attention(q, k, v, seed=seed, return_lse=True, **settings)[1] - exact_lse).exp() for seed in range(400)])
    error = ratio.mean(0) - 1
    assert bool((error.abs() < 5 * ratio.std(0) / 20).all())
    assert abs(error.mean().item()) < 0.02


def test_the_residual_is_the_sum_over_the_keys_outside_of_the_stretch():
    q, k, v = (x.detach() for x in tensors(1, 90, 90, 2, 2))
    how = hyper._Estimate(0.5, block=32, samples=6, min_seqlen=0, sampling="uniform", kappa=None, backend="auto")
    cut = hyper._Stretches.of(90, 90, 32)
    assert cut.k_lengths == (32, 32, 26) and cut.outside == (58, 58, 64)
    weights = torch.einsum("bthd,bshd->bhts", q, k).mul(0.5).exp()
    own = torch.arange(90) // 32
    residual = weights.masked_fill(own[:, None] == own, 0.0).sum(-1)
    sums = []
    for seed in range(600):
        run = hyper._Run(how, torch.zeros(1, 8), torch.Generator().manual_seed(seed))
        sums.append(run._sampled(q, k, v, cut, torch.zeros(1, 2, 90))[1].exp() / residual)
    ratio = torch.stack(sums)
    assert bool(((ratio.mean(0) - 1).abs() < 5 * ratio.std(0) / math.sqrt(600)).all())


def test_the_error_falls_with_the_root_of_the_samples():
    q, k, v = (x.detach() for x in tensors(1, 512, 512, 1, 1))
    _, (exact, exact_lse) = dense(q, k, v, False)
    counts, spread, wrong = [4, 16, 64, 256], [], []
    for samples in counts:
        runs = [hyper_attention(q, k, v, causal=False, block=64, samples=samples, min_seqlen=0, seed=s, return_lse=True) for s in range(12)]
        spread.append(torch.stack([(lse - exact_lse).exp() - 1 for _, lse in runs]).square().mean().sqrt().log().item())
        wrong.append(torch.stack([out - exact for out, _ in runs]).square().mean().sqrt().log().item())
    for error in (spread, wrong):
        slope = (error[-1] - error[0]) / math.log(counts[-1] / counts[0])
        assert slope == pytest.approx(-0.5, abs=0.08)


@pytest.mark.parametrize("seqlen", [257, 300, 511, 1000])
@pytest.mark.parametrize("causal", [True, False])
def test_keys_that_do_not_exist_enter_nothing(seqlen, causal):
    """With equal keys the estimate has no error, whatever is drawn; padded keys of logit 0 would outweigh the real ones by far."""
    q, k, v = torch.ones(1, seqlen, 2, 4), torch.full((1, seqlen, 1, 4), -30.0), torch.full((1, seqlen, 1, 3), 2.0)
    out, lse = hyper_attention(q, k, v, causal=causal, scale=1.0, block=256, samples=16, min_seqlen=0, return_lse=True)
    count = torch.arange(1, seqlen + 1) if causal else torch.tensor(seqlen).expand(seqlen)
    torch.testing.assert_close(out, torch.full_like(out, 2.0))
    torch.testing.assert_close(lse, (count.log() - 120.0).expand(1, 2, -1), atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("lengths", [(50, 50), (33, 50)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(2, 1), (1, 1)])
def test_gradients_in_float64(lengths, causal, heads):
    q, k, v = tensors(1, *lengths, *heads, 3, 2, torch.float64)
    settings = {"causal": causal, "block": 8, "samples": 4, "min_seqlen": 0, "num_hashes": 3, "return_lse": True}
    assert torch.autograd.gradcheck(lambda *x: hyper_attention(*x, **settings), (q, k, v), fast_mode=True)


def test_gradients_of_weighted_samples_in_float64():
    q, k, v = tensors(1, 30, 30, 2, 1, 3, 2, torch.float64)
    settings = {"causal": False, "block": 8, "samples": 4, "min_seqlen": 0, "sampling": "value_norm", "return_lse": True}
    assert torch.autograd.gradcheck(lambda *x: hyper_attention(*x, v.detach(), **settings), (q, k), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_16_bits_keep_the_part_that_goes_through_lse(dtype):
    q, k, v = tensors(1, 300, 300, 2, 1, dtype=dtype)
    dout, settings = torch.randn(1, 300, 2, 8), {"block": 32, "samples": 16, "min_seqlen": 64}
    got = torch.autograd.grad(hyper_attention(q, k, v, **settings), (q, k, v), dout.to(dtype))
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]  # the same numbers, so the same buckets and samples
    want = torch.autograd.grad(hyper_attention(*wide, **settings), wide, dout)
    for a, b in zip(got, want, strict=True):
        assert (a.float() - b).norm() < 4 * torch.finfo(dtype).eps * b.norm()


def test_large_logits_do_not_overflow():
    q, k, v = tensors(1, 200, 200, 2, 2)
    out, lse = hyper_attention(q, k, v, scale=300.0, block=16, samples=16, min_seqlen=0, return_lse=True)
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    assert all(bool(x.isfinite().all()) for x in (out, lse, *grads))


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(part, torch.Tensor):
                self.numel = max(self.numel, part.untyped_storage().nbytes() // 4)
        return result


def test_no_tensor_grows_with_the_square_of_the_length():
    q, k, v = tensors(1, 2048, 2048, 1, 1)
    with LargestTensor() as largest:
        hyper_attention(q, k, v, block=64, samples=64, min_seqlen=128).sum().backward()
    assert 0 < largest.numel < 2048 * 2048 // 2


def test_buckets_bring_what_matters_into_the_own_stretch():
    """Queries and keys around eight common directions, in random order: the own eighth of the keys holds most of the mass."""
    themes = torch.nn.functional.normalize(torch.randn(8, 16), dim=1) * 3
    q, k = (themes[torch.randperm(1024) % 8] + 0.1 * torch.randn(1024, 16) for _ in range(2))
    planes = hyperplanes(12, 16, torch.Generator().manual_seed(0))
    order_q, order_k = (bucket_order(x[None, :, None], planes).flatten() for x in (q, k))
    weights = torch.softmax(q @ k.T, dim=-1)
    own = torch.arange(8).repeat_interleave(128)
    held = {"as they come": weights, "in order": weights[order_q][:, order_k]}
    share = {name: w.masked_fill(own[:, None] != own, 0.0).sum(-1).mean().item() for name, w in held.items()}
    assert share["as they come"] == pytest.approx(1 / 8, abs=0.01)
    assert share["in order"] > 0.6


def test_seeds():
    q, k, v = tensors(2, 300, 300, 4, 2)
    settings = {"block": 32, "samples": 8, "min_seqlen": 64}
    first = hyper_attention(q, k, v, seed=5, **settings)
    torch.rand(3)  # the random state of the program has nothing to do with it
    assert torch.equal(first, hyper_attention(q, k, v, seed=5, **settings))
    assert not torch.equal(first, hyper_attention(q, k, v, seed=6, **settings))


def test_causal_results_do_not_read_the_future():
    q, k, v = (x.detach() for x in tensors(1, 400, 400, 2, 1))
    settings = {"block": 32, "samples": 16, "min_seqlen": 50}
    early = hyper_attention(q, k, v, **settings)[:, :200]
    k[:, 200:], v[:, 200:] = torch.randn(1, 200, 1, 8), torch.nan
    assert torch.equal(hyper_attention(q, k, v, **settings)[:, :200], early)


def test_the_parts_of_a_causal_chunk_add_up_without_bias():
    """The keys before the chunk, the squares below its halves, and its diagonal are all there, and once."""
    q, k, v = (x.detach() for x in tensors(1, 200, 500, 2, 1))
    _, (_, exact_lse) = dense(q, k, v, True)
    settings = {"block": 32, "samples": 32, "min_seqlen": 32, "return_lse": True}
    ratio = torch.stack([(hyper_attention(q, k, v, seed=seed, **settings)[1] - exact_lse).exp() for seed in range(60)])
    assert bool(((ratio.mean(0) - 1).abs() < 5 * ratio.std(0) / math.sqrt(60)).all())
    assert ratio.mean().item() == pytest.approx(1, abs=0.01)


def test_value_norms_draw_the_keys_with_large_values_more_often():
    v = torch.ones(1, 100, 1, 2)
    v[0, 70] = 30.0
    drawn = draw(v, (40, 40, 20), 4000, "value_norm", torch.Generator().manual_seed(0))
    place = drawn.place.view(3, 4000)
    inside = [(0, 40), (40, 80), (80, 100)]
    assert not any(bool(((row >= lo) & (row < hi)).any()) for row, (lo, hi) in zip(place, inside, strict=True))
    share = 0.5 / 100 + 0.5 * 900 / 999
    left = 1 - 40 * (0.5 / 100 + 0.5 / 999)
    assert (place[0] == 70).double().mean().item() == pytest.approx(share / left, abs=0.03)
    weight = drawn.log_weight.view(3, 4000)[0][place[0] == 70][0].exp().item()
    assert weight == pytest.approx(left / (4000 * share), rel=1e-6)


def test_value_norms_help_when_few_values_are_large():
    q, k, v = (x.detach() for x in tensors(1, 400, 400, 1, 1))
    v[0, ::40] *= 30
    _, (exact, _) = dense(q, k, v, False)
    settings = {"causal": False, "block": 32, "samples": 32, "min_seqlen": 0}
    errors = {}
    for sampling in ("uniform", "value_norm"):
        runs = [hyper_attention(q, k, v, sampling=sampling, seed=seed, **settings) - exact for seed in range(10)]
        errors[sampling] = torch.stack(runs).square().mean().sqrt().item()
    assert errors["value_norm"] < 0.6 * errors["uniform"]


def test_the_floor_adds_to_the_denominator_alone():
    out, lse = torch.randn(1, 5, 2, 3), torch.randn(1, 2, 5)
    raised, higher = raise_to_floor(out, lse, torch.full((1, 2, 1), 0.3))
    assert torch.equal(higher, lse.clamp(min=0.3))
    weight = lambda o, x: o * x.exp().transpose(1, 2).unsqueeze(-1)  # noqa: E731
    torch.testing.assert_close(weight(raised, higher), weight(out, lse))


def test_the_floor_is_the_largest_residual_over_kappa():
    all_lse, inside = torch.tensor([[[math.log(10.0), math.log(7.0), 0.0]]]), torch.tensor([[[math.log(4.0), math.log(2.0), 0.0]]])
    assert residual_floor(all_lse, inside, 3.0).exp().item() == pytest.approx(2.0, rel=1e-5)
    q, k, v = tensors(1, 200, 200, 1, 1)
    settings = {"causal": False, "block": 32, "samples": 8, "min_seqlen": 0}
    plain = hyper_attention(q, k, v, **settings)
    torch.testing.assert_close(hyper_attention(q, k, v, kappa=1e9, **settings), plain)
    assert hyper_attention(q, k, v, kappa=1e-3, **settings).norm() < 0.05 * plain.norm()


def test_needs_no_more_than_attention_and_merge():
    """The same result by any backend that serves attention."""
    q, k, v = tensors(1, 150, 150, 2, 1)
    settings = {"block": 32, "samples": 8, "min_seqlen": 40}
    torch.testing.assert_close(hyper_attention(q, k, v, backend="reference", **settings), hyper_attention(q, k, v, **settings))
    with pytest.raises(ValueError, match="backend must be one of"):
        hyper_attention(q, k, v, backend="fast")


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"num_hashes": 0}, ValueError, "num_hashes must be an integer >= 1; got 0"),
        ({"num_hashes": 63}, ValueError, "num_hashes must be at most 62; got 63"),
        ({"block": 0}, ValueError, "block must be an integer >= 1; got 0"),
        ({"samples": 0}, ValueError, "samples must be an integer >= 1; got 0"),
        ({"min_seqlen": -1}, ValueError, "min_seqlen must be an integer >= 0; got -1"),
        ({"seed": 0.5}, TypeError, "seed must be an integer >= 0; got float"),
        ({"sampling": "norm"}, ValueError, "sampling must be one of uniform, value_norm; got 'norm'"),
        ({"kappa": 0}, ValueError, "kappa must be positive and finite; got 0"),
        ({"kappa": "1"}, TypeError, "kappa must be a number or None; got str"),
        ({"scale": math.inf}, ValueError, "scale must be finite; got inf"),
        ({"q": torch.ones(3, 2, 8)}, ValueError, r"q must have shape \(batch, seq, heads, head_dim\)"),
    ],
)
def test_bad_arguments(settings, error, words):
    q, k, v = tensors(1, 10, 10, 2, 1)
    arguments = {"q": q, "k": k, "v": v, **settings}
    with pytest.raises(error, match=words):
        hyper_attention(**arguments)


def test_autocast_changes_the_arithmetic_of_attention_not_the_buckets():
    q, k, v = (x.detach().bfloat16().float() for x in tensors(1, 300, 300, 2, 1))
    settings = {"block": 32, "samples": 16, "min_seqlen": 64}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = hyper_attention(q, k, v, **settings)
    assert out.dtype == torch.bfloat16
    plain = hyper_attention(q, k, v, **settings)
    assert (out.float() - plain).norm() < 4 * torch.finfo(torch.bfloat16).eps * plain.norm()


def test_empty_calls():
    assert hyper_attention(torch.ones(0, 99, 2, 4), *(torch.ones(0, 99, 1, 4),) * 2, min_seqlen=0, block=16, samples=4).shape == (
        0,
        99,
        2,
        4,
    )
    out, lse = hyper_attention(torch.ones(1, 0, 2, 4), *(torch.ones(1, 0, 1, 4),) * 2, return_lse=True)
    assert out.shape == (1, 0, 2, 4) and lse.shape == (1, 2, 0)
    assert torch.equal(
        hyper_attention(torch.ones(1, 5, 2, 4), *(torch.ones(1, 0, 1, 4),) * 2),
        s2attn.attention(torch.ones(1, 5, 2, 4), *(torch.ones(1, 0, 1, 4),) * 2, Dense()),
    )


@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_are_what_they_are_alone(causal):
    lengths = [(90, 90), (0, 7), (40, 70), (5, 0), (70, 40)]
    cu_q, cu_k = (torch.tensor([0, *(pair[i] for pair in lengths)]).cumsum(0) for i in range(2))
    x = [t.squeeze(0) for t in tensors(1, int(cu_q[-1]), int(cu_k[-1]), 4, 2)]
    settings = {"causal": causal, "block": 16, "samples": 8, "min_seqlen": 16, "return_lse": True}
    out, lse = hyper_attention(*x, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **settings)
    assert out.shape == (205, 4, 8) and lse.shape == (4, 205)
    grads = torch.autograd.grad(out.square().sum(), x)
    for q_lo, q_hi, lo, hi in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        alone = [x[0][None, q_lo:q_hi], x[1][None, lo:hi], x[2][None, lo:hi]]
        one, one_lse = hyper_attention(*alone, **settings)
        torch.testing.assert_close(out[q_lo:q_hi], one[0])
        torch.testing.assert_close(lse[:, q_lo:q_hi], one_lse[0])
        if one.numel() and hi > lo:
            for got, want, (a, b) in zip(
                grads, torch.autograd.grad(one.square().sum(), alone), ((q_lo, q_hi), (lo, hi), (lo, hi)), strict=True
            ):
                torch.testing.assert_close(got[a:b], want[0], atol=1e-5, rtol=1e-4)


def test_packed_calls_want_both_lengths():
    q = torch.randn(10, 2, 8)
    with pytest.raises(ValueError, match="cu_seqlens"):
        hyper_attention(q, q, q, cu_seqlens_q=torch.tensor([0, 10]))
