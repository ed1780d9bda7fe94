"""What needs an optional package says which extra brings it, where the package is not installed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from s2attn.core import requires

PROGRAM = """
import json, sys
cases = json.loads(sys.argv[1])
for package, extra, code in cases.values():
    sys.modules[package] = None  # imports of it raise ModuleNotFoundError
import s2attn
said = {}
for name, (package, extra, code) in cases.items():
    try:
        exec(code)
    except s2attn.Unsupported as error:
        said[name] = str(error).splitlines()[-1]
print(json.dumps(said))
"""
CASES = {
    "patch": ("transformers", "transformers", "s2attn.patch"),
    "patched": ("transformers", "transformers", "from s2attn import patched"),
    "PastKeyValues": (
        "transformers",
        "transformers",
        "from s2attn.integrations.transformers.past import PastKeyValues",
    ),
    "megatron": ("megatron", "megatron", "import s2attn.integrations.megatron"),
    "vllm backend": ("vllm", "vllm", "from s2attn.integrations.vllm import S2Backend"),
    "vllm register": ("vllm", "vllm", "import s2attn.integrations.vllm as v; v.register()"),
    "phi3small": (
        "safetensors",
        "phi3small",
        "from s2attn.integrations.phi3small import files; from pathlib import Path; files._open(Path())",
    ),
    "plot": ("matplotlib", "lab", "s2attn.plot(s2attn.Window(8), num_heads=1, seqlen=64, path='x.png')"),
    "charts": ("matplotlib", "lab", "from s2attn.lab.charts import new_figure; new_figure()"),
    "byte pairs": (
        "tokenizers",
        "lab",
        "from s2attn.lab.training.tokens import BytePairs; BytePairs.train(['a'], 300)",
    ),
    "saved byte pairs": (
        "tokenizers",
        "lab",
        "from s2attn.lab.training.tokens import BytePairs; BytePairs.load('x')",
    ),
}


def test_a_missing_package_names_the_extra() -> None:
    command = [sys.executable, "-c", PROGRAM, json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert not done.returncode, done.stderr
    hint = "  {}: not installed: pip install 's2attn[{}]'"
    expected = {name: hint.format(package, extra) for name, (package, extra, _) in CASES.items()}
    assert json.loads(done.stdout) == expected


def test_a_package_that_is_broken_keeps_its_own_error() -> None:
    with (
        pytest.raises(ModuleNotFoundError, match="a_part"),
        requires("nothing works", "package", "lab"),
    ):
        raise ModuleNotFoundError("No module named 'a_part'", name="a_part")
