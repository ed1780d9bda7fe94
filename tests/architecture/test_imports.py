"""Who imports whom: the import-linter contracts, what import-linter cannot say, and what `import s2attn` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "s2attn"
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))

# Optional or slow to import: nobody pays for them who did not ask for them.
LAZY = ["triton", "transformers", "matplotlib", "rich", "typer", "click", "torch._dynamo", "torch._inductor", "torch.utils.cpp_extension"]


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Every imported module of a file with its line; `from a import b` counts as `a.b`, because b may be a module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def test_import_contracts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    status = lint_imports(no_cache=True, no_logo=True)
    assert status == 0, capsys.readouterr().out


def test_no_room_imports_the_package_itself() -> None:
    """`from s2attn import x` would reach around the layers, since the package's face may import every room; only the version is free."""
    around = []
    for path in sorted(PACKAGE.glob("*/**/*.py")):
        for line, name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "s2attn" and (len(parts) == 1 or parts[1] not in [*ROOMS, "__version__"]):
                around.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert around == []


def test_only_the_triton_backend_sees_kernels() -> None:
    """The one exception compiles them for devices that are not there, which no backend does."""
    allowed = [PACKAGE / "kernels", PACKAGE / "backends" / "triton"]
    outside = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if any(home in path.parents for home in allowed) or path == PACKAGE / "testing" / "compiling.py":
            continue
        outside += [f"{path.relative_to(ROOT)}:{line}" for line, name in imports_of(path) if f"{name}.".startswith("s2attn.kernels.")]
    assert outside == []


def in_new_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()


def test_import_stays_light() -> None:
    code = f"import torch, sys; before = set(sys.modules); import s2attn; print(*(set(sys.modules) - before & set({LAZY!r})))"
    new = set(in_new_python(code).split())
    assert sorted(name for name in LAZY if name in new) == []


def test_import_costs_little_beyond_torch() -> None:
    """Processor time, best of three: a loaded machine does not change it much."""
    clock = "import torch, numpy, json, time; start = time.process_time(); import s2attn; print(time.process_time() - start)"
    assert min(float(in_new_python(clock)) for _ in range(3)) < 0.3
