"""Building the C++ kernels: the cache, many processes at once, and machines that cannot build."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from s2attn.backends import get_backend, pick
from s2attn.backends.cpu import build
from s2attn.core import Unsupported

SMALL = """
extern "C" __attribute__((visibility("default"))) const char* s2_isa() { return "small"; }
"""
X = torch.zeros(1, 4, 2, 16)


def write_compiler(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that has built nothing, one short source file, and an empty cache folder."""
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "small.cpp").write_text(SMALL)
    monkeypatch.setattr(build, "_built", None)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("S2ATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so"))


def test_a_library_is_built_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.kernels()
    assert first.isa == "small" and libraries(fresh / "cache") == [first.path]
    monkeypatch.setattr(build, "_built", None)
    monkeypatch.setattr(build, "_build", lambda *a: pytest.fail("it is in the cache"))
    assert build.kernels().path == first.path


@pytest.mark.parametrize("change", ["source", "flags", "cpu"])
def test_whatever_changes_the_code_changes_the_name(fresh, monkeypatch, change: str) -> None:
    first = build.kernels().path
    monkeypatch.setattr(build, "_built", None)
    if change == "source":
        (fresh / "src" / "small.cpp").write_text(SMALL + "// more\n")
    elif change == "flags":
        monkeypatch.setenv("S2ATTN_CPU_FLAGS", "-DMORE")
    else:
        monkeypatch.setattr(build, "_cpu_features", lambda: "another one")
    assert build.kernels().path != first and len(libraries(fresh / "cache")) == 2


def test_a_broken_file_in_the_cache_is_built_anew(fresh: Path, monkeypatch) -> None:
    path = build.kernels().path
    path.unlink()  # a loaded library must not change under its users
    path.write_bytes(b"half a library")
    monkeypatch.setattr(build, "_built", None)
    assert build.kernels().isa == "small"


def test_many_processes_compile_once(fresh: Path) -> None:
    real = build.find_compiler()
    assert real is not None
    log = fresh / "log"
    slow = write_compiler(fresh / "slow", f'echo "$@" >> {log}\nsleep 0.3\nexec {real[0]} "$@"')
    code = "from pathlib import Path; from s2attn.backends.cpu import build; "
    code += f"build.SOURCES = Path({str(fresh / 'src')!r}); print(build.kernels().isa)"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "CXX": str(slow)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    assert [process.communicate(timeout=250)[0].strip() for process in running] == ["small"] * 4
    assert sum(" -c " in line for line in log.read_text().splitlines()) == 1
    left = [path for path in (fresh / "cache").iterdir() if path.suffix != ".lock"]
    assert left == libraries(fresh / "cache") and len(left) == 1


def test_a_broken_compiler_is_one_warning_with_its_own_words(fresh: Path, monkeypatch) -> None:
    broken = write_compiler(fresh / "broken", 'echo "out of registers"; test "$1" = --version')
    monkeypatch.setenv("CXX", str(broken))
    with pytest.warns(RuntimeWarning, match="out of registers") as warned:
        why = get_backend("cpu").objections(X, X, X)
    assert len(warned) == 1 and "out of registers" in why[0]
    assert get_backend("cpu").objections(X, X, X) == why  # warns no more
    assert pick("auto", X, X, X).name != "cpu"
    with pytest.raises(Unsupported, match=r"cpu: .*out of registers"):
        pick("cpu", X, X, X)


def test_a_compiler_that_does_not_start(fresh: Path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", str(fresh / "absent"))
    with pytest.warns(RuntimeWarning, match="does not start: No such file"):
        assert "absent" in str(build.unavailable())


def test_without_a_compiler_another_backend_serves(fresh: Path, monkeypatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    reason = "no C++ compiler: neither $CXX nor c++, g++, clang++ on the PATH"
    assert get_backend("cpu").objections(X, X, X) == [reason]
    assert pick("auto", X, X, X).name != "cpu"


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S2ATTN_CPU", "0")
    assert get_backend("cpu").objections(X, X, X) == ["S2ATTN_CPU=0 turns it off"]
    assert pick("auto", X, X, X).name != "cpu"


@pytest.mark.parametrize("cause", ["no folder", "read-only"])
def test_a_home_that_cannot_be_written(fresh: Path, monkeypatch, cause: str) -> None:
    """A private folder of the system's temporary one takes its place."""
    monkeypatch.delenv("S2ATTN_CACHE")
    home = fresh / "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    if cause == "no folder":
        home.write_text("a file")
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    path = build.kernels().path
    assert path.parent == fresh / f"s2attn-{os.getuid()}"
    assert path.parent.stat().st_mode & 0o077 == 0


def test_a_temporary_folder_that_others_can_write_is_not_used(fresh: Path, monkeypatch) -> None:
    """They could have put a library there."""
    monkeypatch.delenv("S2ATTN_CACHE")
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    folder = fresh / f"s2attn-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    assert build.kernels().path.parent not in (folder, fresh)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (X.double(), "q has dtype torch.float64, and sums are float32"),
        (X.to("meta"), "q is on meta, not on a CPU"),
    ],
    ids=["float64", "meta"],
)
def test_other_tensors_do_not_start_a_build(fresh: Path, tensor, reason: str) -> None:
    assert get_backend("cpu").objections(tensor, tensor, tensor) == [reason]
    assert not (fresh / "cache").exists()


def test_importing_the_library_builds_nothing(fresh: Path) -> None:
    code = "import s2attn, sys; print('s2attn.backends.cpu' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False" and not (fresh / "cache").exists()


def test_the_sources_compile_without_warnings() -> None:
    compiler = build.find_compiler()
    assert compiler is not None
    strict = ["-Wall", "-Wextra", "-Werror", "-c", "-o", "/dev/null"]
    command = [*compiler, *build.compile_flags(), *strict]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    running = [subprocess.Popen([*command, str(source)], **pipes, text=True) for source in sorted(build.SOURCES.glob("*.cpp"))]
    assert [process.communicate(timeout=250)[0] for process in running] == [""] * len(running)


NARROW = ["-mno-amx-bf16", "-mno-avx512f", "-march=x86-64"]
X86 = platform.machine() == "x86_64"


@pytest.mark.parametrize("flags", NARROW if X86 else [])
def test_narrower_vectors_compute_the_same(flags: str) -> None:
    """AVX-512 without AMX, AVX2 and 128 bits, as far as this machine goes."""
    code = """
import torch
from s2attn.backends import get_backend
from s2attn.backends.cpu.build import kernels
from s2attn.testing.problems import check_backend, random_problem
torch.manual_seed(0)
torch.set_num_threads(1)
bent = {"softcap": 1.5, "sinks": torch.tensor([0.7, -2.0, 0.0, 5.0])}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for scoring in ({}, bent):
        p = random_problem(4, 2, 2, 150, 90, 32, causal=True, batch=2, width=20, **scoring)
        check_backend(get_backend("cpu"), p, dtype)
print(kernels().isa)
"""
    env = {**os.environ, "S2ATTN_CPU_FLAGS": flags}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.stdout.strip() and "AMX" not in done.stdout, done.stderr
