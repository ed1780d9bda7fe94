"""Numbers that nobody means: one line and exit code 2, before memory or time is spent on them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from experiments.cli.app import app as experiments_app
from experiments.model import ModelConfig
from s2attn.analysis.context import describe_context
from s2attn.cli.app import app
from s2attn.distributed.balance import balanced_shards
from s2attn.distributed.shards import Shards
from s2attn.distributed.traffic import context_traffic
from s2attn.patterns import Dense, Window

HUGE = 10**9
COMMANDS = {
    "demo, steps": (["demo", "--quick", "--steps", str(10**12)], "steps must be at most 2147483647; got 1000000000000"),
    "demo, seed": (["demo", "--quick", "--seed", str(10**30)], "seed must be"),
    "demo, negative seed": (["demo", "--quick", "--seed", "-1"], "seed must be an integer >= 0; got -1"),
    "ablate, seeds": (["ablate", "--plan", "--seeds", str(HUGE)], "--seeds must be at most 1000; got 1000000000"),
    "ablate, steps": (["ablate", "--plan", "--steps", str(10**12)], "steps must be at most"),
    "ablate, task steps": (["ablate", "--plan", "--task-steps", str(10**12)], "steps must be at most"),
    "ablate, budget": (["ablate", "--plan", "--budget", "nan"], "budget must be"),
    "reach, seeds": (["reach", "--plan", "--seeds", str(HUGE)], "--seeds must be at most 1000; got 1000000000"),
    "reach, steps": (["reach", "--plan", "--steps", str(10**12)], "steps must be at most"),
    "train, layers": (["train", "--set", f"model.layers={HUGE}"], "layers must be at most 1024; got 1000000000"),
    "train, heads": (["train", "--set", f"model.heads={HUGE}"], "heads must be at most 1024; got 1000000000"),
    "train, width": (["train", "--set", f"model.width={HUGE}"], "must fit into the memory of this machine"),
    "train, look back": (["train", "--set", f"model.look_back={HUGE}"], "look_back must be at most 1024; got 1000000000"),
    "train, batch": (["train", "--set", f"train.batch={HUGE}"], "must fit into the memory of this machine"),
    "train, context": (["train", "--set", f"train.context={HUGE}"], "train.context must not be above the tokens of the"),
    "train, steps": (["train", "--set", f"train.steps={10**12}"], "steps must be at most"),
    "train, seed": (["train", "--set", f"train.seed={2**64}"], "seed must be at most"),
    "train, windows": (["train", "--set", f"train.eval_windows={10**12}"], "eval_windows must be at most"),
    "show, ranks": (["show", "window:64", "--seqlen", "4096", "--ranks", str(HUGE)], "ranks must be at most 65536; got 1000000000"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_refuses_them_in_one_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words, said = COMMANDS[case]
    few = ["--set", "data.max_files=40", "--set", "data.split=tail", "--set", "run.device=cpu"] if words[0] == "train" else []
    began = time.process_time()
    done = CliRunner().invoke(app if words[0] == "show" else experiments_app, [*words, *few])
    assert done.exit_code == 2, (done.output, done.exception)
    lines = done.stderr.strip().splitlines()
    assert said in lines[-1], done.stderr
    assert not any(line.startswith("Traceback") for line in lines)
    assert time.process_time() - began < 20


PLANS: dict[str, tuple[Callable[[], Any], str]] = {
    "ranks, contiguous": (lambda: Shards.contiguous(HUGE, HUGE), "ranks must be at most 65536; got 1000000000"),
    "ranks, zigzag": (lambda: Shards.zigzag(2 * HUGE, HUGE), "ranks must be at most 65536; got 1000000000"),
    "ranks, balanced": (lambda: balanced_shards(Dense(), 1, 1, 64 * HUGE, ranks=HUGE), "ranks must be at most 65536; got 1000000000"),
    "ranks, report": (lambda: describe_context(Dense(), 1, 1, HUGE, ranks=HUGE), "ranks must be at most 65536; got 1000000000"),
    "layers, report": (lambda: describe_context(Dense(), 1, 1, 64, ranks=1, layers=HUGE), "layers must be at most 65536; got 1000000000"),
    "layers, balanced": (lambda: balanced_shards(Dense(), 1, 1, 64, ranks=1, layers=HUGE), "layers must be at most 65536"),
    "heads": (lambda: context_traffic(Window(8), HUGE, 1, 64, shards=("zigzag", 1)), "num_heads must be at most 65536"),
    "tokens": (lambda: context_traffic(Window(8), 1, 1, 2**50, shards=("zigzag", 2)), "seqlen must be at most"),
    "blocks": (
        lambda: context_traffic(Window(8), 1, 1, 2**36, shards=("zigzag", 2)),
        "seqlen must be at most 16777216 blocks of 64 tokens; got 68719476736 tokens",
    ),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_refuses_them(case: str) -> None:
    call, said = PLANS[case]
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize("config", [ModelConfig(), ModelConfig(layers=1, width=24, heads=6, kv_heads=3, head_dim=4, look_back=0)], ids=str)
def test_weights_are_counted_without_making_them(config: ModelConfig) -> None:
    from experiments.model import LanguageModel

    assert config.num_parameters == LanguageModel(config).num_parameters
