"""What a number was measured on: the facts at the head of every record."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def host_facts(device: str = "cpu", commit: str | None = None) -> dict[str, Any]:
    """Processor, cores, memory, system, and the versions and commit that ran; with ``device="cuda"`` the card, too. Plain values.

    Args:
        commit: the commit that runs, where the source tree cannot tell.
    """
    from s2attn import __version__

    facts = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "s2attn": __version__,
        "triton": _version("triton"),
        "commit": commit or _commit(),
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        from s2attn.tuning.cuda import cuda_facts

        facts.update(cuda_facts())
    return facts


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _commit() -> str | None:
    """The commit of the source tree that runs, with ``+`` when it was changed; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        return _git(root, "rev-parse", "--short=12", "HEAD") + ("+" if _git(root, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
