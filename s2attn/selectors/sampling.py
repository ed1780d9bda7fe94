"""Keys drawn outside of a stretch, what each one stands for, and the floor under sums that were estimated from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLING = ("uniform", "value_norm")


@dataclass(frozen=True, eq=False)
class Drawn:
    """Places ``(B, stretches * samples, G)`` of drawn keys.

    ``log_weight``, of the same shape, is the log of ``1 / (samples * probability)``; None when it is the same in each stretch, that of
    uniform draws: keys outside of it over samples.
    """

    place: Tensor
    log_weight: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """The drawn tokens of ``x (B, S, G, width)``; a token that was drawn twice gets both gradients."""
        batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
        head = torch.arange(x.shape[2], device=x.device)
        # Indexing, since its backward adds in one order on every device, which that of gather does not.
        return x[batch, self.place, head]


def draw(v: Tensor, k_lengths: tuple[int, ...], samples: int, sampling: str, generator: torch.Generator) -> Drawn:
    """For each stretch of the sorted keys of v ``(B, S, G, Dv)``, ``samples`` keys outside of it, independent of each other."""
    batch, seqlen, kv_heads, device = v.shape[0], v.shape[1], v.shape[2], v.device
    end = torch.tensor(k_lengths, device=device).cumsum(0)[:, None, None]
    length = torch.tensor(k_lengths, device=device)[:, None, None]
    start = end - length
    chance = torch.rand(batch, len(k_lengths), samples, kv_heads, generator=generator, device=device, dtype=torch.float64)
    if sampling == "uniform":
        place = (chance * (seqlen - length)).long().clamp(max=seqlen - length - 1)
        place = torch.where(place >= start, place + length, place)
        return Drawn(place.flatten(1, 2), None)
    norm = v.double().square().sum(dim=-1)
    share = 0.5 / seqlen + 0.5 * norm / norm.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    below = torch.cat([torch.zeros_like(share[:, :1]), share.cumsum(dim=1)], dim=1)  # (B, S + 1, G)
    before, after = below[:, start.flatten()].unsqueeze(2), below[:, end.flatten()].unsqueeze(2)
    left = below[:, -1:].unsqueeze(2) - (after - before)
    point = chance * left
    point = torch.where(point >= before, point + after - before, point)
    sums = below[:, 1:].transpose(1, 2).contiguous()
    place = torch.searchsorted(sums, point.flatten(1, 2).transpose(1, 2).contiguous(), right=True).transpose(1, 2)
    place = place.clamp(max=seqlen - 1).unflatten(1, (len(k_lengths), samples))
    # Rounding may put a point at the edge of the stretch into it.
    place = torch.where((place >= start) & (place < end), torch.where(end < seqlen, end, start - 1), place)
    weight = left / (samples * share.gather(1, place.flatten(1, 2)).unflatten(1, (len(k_lengths), samples)))
    return Drawn(place.flatten(1, 2), weight.log().flatten(1, 2))


def with_log_weights(q: Tensor, k: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """q and k with columns more, so that ``q.k`` has the weight of its key added; two columns, that 16 bits round it once only."""
    coarse = log_weight.to(k.dtype)
    fine = (log_weight - coarse.to(log_weight.dtype)).to(k.dtype)
    one = torch.ones_like(q[..., :2])
    return torch.cat([q, one], dim=-1), torch.cat([k, coarse.unsqueeze(-1), fine.unsqueeze(-1)], dim=-1)


def residual_floor(all_lse: Tensor, inside_lse: Tensor, kappa: float) -> Tensor:
    """``log(tau / kappa)``, ``(B, H, 1)``: tau is the largest ``exp(all) - exp(inside)``, a softmax sum outside of the stretch."""
    share = torch.exp(inside_lse - all_lse).clamp(max=1.0)
    return (all_lse + torch.log1p(-share)).amax(dim=-1, keepdim=True) - torch.log(torch.tensor(kappa).to(all_lse))


def raise_to_floor(out: Tensor, lse: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Sums below the floor become the floor, while the weighted sum of values, ``out * exp(lse)``, stays what it is."""
    raised = torch.maximum(lse, floor)
    return out * torch.exp(lse - raised).transpose(1, 2).unsqueeze(-1).to(out.dtype), raised
