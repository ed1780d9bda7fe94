"""What a host's adapter costs over the bare op, in microseconds for each layer and call: ``python -m s2attn.bench.overhead``, on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from s2attn.bench.clock import Timing, time_in_turn
from s2attn.core import requires
from s2attn.ops import attention
from s2attn.patterns import Sink, Window

CASES = ((1, 64), (16, 16), (64, 64), (1, 1024))
"""New tokens, and keys."""


@dataclass(frozen=True)
class Overhead:
    """Timings of one case, in seconds: through the adapter, the bare op, and the adapter with an op that does nothing."""

    tokens: int
    keys: int
    adapter: Timing
    bare: Timing
    alone: Timing

    def line(self) -> str:
        medians = [1e6 * timing.median_s for timing in (self.adapter, self.bare, self.alone)]
        return f"| {self.tokens} | {self.keys} | {medians[0]:.1f} | {medians[1]:.1f} | {medians[0] - medians[1]:.1f} | {medians[2]:.1f} |"


def measure(tokens: int, keys: int, *, rounds: int = 2000, budget_s: float = 10.0) -> Overhead:
    """Time an attention layer of a tiny Llama, 4 heads over 2 of width 16, against `s2attn.attention` on the same tensors."""
    with requires("the adapter cannot be timed", "transformers", "transformers"):
        from transformers import LlamaConfig, LlamaForCausalLM
    from s2attn.integrations.transformers import attend, patch

    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    pattern = Sink(4) | Window(32)
    module = patch(LlamaForCausalLM(LlamaConfig(vocab_size=8, **shape)).eval(), pattern).model.layers[0].self_attn
    q, k, v = torch.randn(1, 4, tokens, 16), torch.randn(1, 2, keys, 16), torch.randn(1, 2, keys, 16)
    more: dict[str, Any] = {"dropout": 0.0, "scaling": 0.25, "position_ids": torch.arange(keys - tokens, keys)[None]}
    through: Callable[[], object] = lambda: attend.attention_forward(module, q, k, v, None, **more)  # noqa: E731
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    bare: Callable[[], object] = lambda: attention(turned[0], turned[1], turned[2], pattern, scale=0.25)  # noqa: E731
    with torch.no_grad():
        timings = time_in_turn({"adapter": through, "bare": bare}, rounds=rounds, budget_s=budget_s)
        result = bare()

        def nothing(*given: object, **how: object) -> object:
            return result

        with mock.patch.object(attend, "attention", new=nothing):
            alone = time_in_turn({"alone": through}, rounds=rounds, budget_s=budget_s)["alone"]
    return Overhead(tokens, keys, timings["adapter"], timings["bare"], alone)


def main() -> None:
    torch.set_num_threads(1)
    print("microseconds, medians: Transformers' adapter on a CPU, one thread")
    print("| new tokens | keys | adapter | bare op | difference | adapter alone |\n|---|---|---|---|---|---|")
    for tokens, keys in CASES:
        print(measure(tokens, keys).line(), flush=True)


if __name__ == "__main__":
    main()
