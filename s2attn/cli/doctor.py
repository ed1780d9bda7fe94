"""``s2attn doctor``: what is installed, what the machine has, which backends can run on it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from importlib import metadata
from typing import Any

import torch

from s2attn.backends.cpu.build import kernels, unavailable
from s2attn.backends.registry import backend_names, get_backend
from s2attn.bench.host import host_facts
from s2attn.cli.screen import console, table

PACKAGES = ("torch", "numpy", "triton", "transformers", "typer", "rich", "matplotlib")


def diagnose() -> dict[str, Any]:
    """Everything that the command prints, as plain values."""
    host = host_facts()
    return {
        "s2attn": host["s2attn"],
        "commit": host["commit"],
        "python": host["python"],
        "packages": {name: _version(name) for name in PACKAGES},
        "compiler": next((name for name in ("g++", "clang++", "c++", "cl") if shutil.which(name)), None),
        "kernels": _kernels(),
        "devices": [str(device) for device in devices()],
        "hardware": {str(device): _hardware(device, host) for device in devices()},
        "backends": {name: {str(device): _objections(name, device) for device in devices()} for name in backend_names()},
    }


def devices() -> list[torch.device]:
    """The CPU, and every accelerator that torch can use here."""
    found = [torch.device("cpu")]
    found += [torch.device("cuda", i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def _version(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def _hardware(device: torch.device, host: dict[str, Any]) -> str:
    if device.type == "cpu":
        memory = f", {host['memory_bytes'] / 2**30:.0f} GiB" if host["memory_bytes"] else ""
        return f"{host['processor']}, {host['cores']} cores, {host['instructions']}{memory}"
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"
    return device.type


def _kernels() -> str:
    """The compiler and the instruction set of the C++ kernels, which are built here if need be, or why there are none."""
    why = unavailable()
    if why is not None:
        return f"none: {why}"
    built = kernels()
    return f"{built.isa}, by {built.compiler}"


def _objections(backend: str, device: torch.device) -> list[str]:
    """Why the backend cannot serve float32 and, on an accelerator, bfloat16 tensors there; one that does not load says why."""
    try:
        made = get_backend(backend)
        why: list[str] = []
        for dtype in (torch.float32,) if device.type == "cpu" else (torch.bfloat16, torch.float32):
            x = torch.zeros(1, 64, 2, 64, dtype=dtype, device=device)
            why += [f"{reason} ({str(dtype).removeprefix('torch.')})" for reason in made.objections(x, x, x)]
    except Exception as error:  # the doctor reports what is broken instead of breaking on it
        return [f"{type(error).__name__}: {error}"]
    return why


def show_doctor(*, as_json: bool) -> None:
    """Print the diagnosis as tables, or as JSON."""
    found = diagnose()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    screen = console()
    versions = [
        ["package", "version"],
        ["s2attn", found["s2attn"] + (f" ({found['commit']})" if found["commit"] else "")],
        ["python", found["python"]],
    ]
    versions += [[name, version or "not installed"] for name, version in found["packages"].items()]
    versions.append(["C++ compiler", found["compiler"] or "none found: torch.compile cannot make CPU code"])
    versions.append(["C++ kernels", found["kernels"]])
    screen.print(table(versions, "Versions", right_from=2))
    screen.print(table([["device", "hardware"], *([name, text] for name, text in found["hardware"].items())], "Devices", right_from=2))
    lines = [["backend", "device", "can run", "why not"]]
    for backend, by_device in found["backends"].items():
        lines += [[backend, device, "no" if why else "yes", "; ".join(why)] for device, why in by_device.items()]
    screen.print(table(lines, "Backends, the preferred one first", right_from=4))
    if len(found["devices"]) == 1:
        screen.print("No accelerator that this torch can use: attention runs on the CPU.")
