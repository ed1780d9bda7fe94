"""Compile the C++ kernels on first use and keep the library in the user's cache directory.

The key of a library is a hash of the sources, the flags, the compiler's version and the CPU's
features: a change of any of them builds anew, and different machines that share a home directory
do not share a library.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

SOURCES = Path(__file__).parent / "src"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
)
"""No ``-ffast-math``: masks are infinities, and a NaN that a query sees has to reach its result."""
TIMEOUT = 600
"""Seconds that one compiler process may take on a machine that is busy."""


class BuildError(RuntimeError):
    """The kernels cannot be built or loaded; the message holds the compiler's own words."""


@dataclass(frozen=True)
class Kernels:
    """The loaded library.

    Attributes:
        library: its functions release the GIL while they run.
        path: where it is cached.
        compiler: the compiler's path and version.
        isa: the instruction set that it uses, such as ``"AVX-512, BF16"``.
    """

    library: ctypes.CDLL
    path: Path
    compiler: str
    isa: str


_lock = Lock()
_built: Kernels | BuildError | None = None


def kernels() -> Kernels:
    """The library of this process, built or found in the cache on first use.

    Raises:
        BuildError: it cannot be built or loaded; the reason is remembered, and warned of once.
    """
    global _built
    with _lock:
        if _built is None:
            try:
                _built = _load_or_build()
            except BuildError as error:
                _built = error
                if find_compiler() is not None:
                    words = f"the cpu backend is not available: {error}"
                    warnings.warn(words, RuntimeWarning, stacklevel=2)
    if isinstance(_built, BuildError):
        raise _built
    return _built


def unavailable() -> str | None:
    """Why the library cannot be used in this process, or None once it is loaded."""
    if os.environ.get("S2ATTN_CPU") == "0":
        return "S2ATTN_CPU=0 turns it off"
    try:
        kernels()
    except BuildError as error:
        return str(error)
    return None


def find_compiler() -> list[str] | None:
    """``$CXX``, which may hold arguments, or the first of `COMPILERS` on the PATH."""
    named = os.environ.get("CXX", "").split()
    if named:
        return [shutil.which(named[0]) or named[0], *named[1:]]
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    return None if found is None else [found]


def compile_flags() -> list[str]:
    """The flags of every file; ``$S2ATTN_CPU_FLAGS`` adds some, such as those of a sanitizer."""
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    native = "-march=native" if x86 else "-mcpu=native"
    return [*FLAGS, native, *os.environ.get("S2ATTN_CPU_FLAGS", "").split()]


def _load_or_build() -> Kernels:
    if os.name != "posix":
        raise BuildError("the kernels need POSIX threads")
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(f"no C++ compiler: neither $CXX nor {', '.join(COMPILERS)} on the PATH")
    version = _run([*compiler, "--version"]).splitlines()
    described = f"{' '.join(compiler)} ({version[0] if version else 'unknown version'})"
    flags = compile_flags()
    name = f"s2attn_cpu_{_key([*flags, described, *version, _cpu_features()])}.so"
    unusable = []
    for folder in _cache_folders():
        path = folder / name
        try:
            with _one_at_a_time(path.with_suffix(".lock")):
                if not path.exists() or not _loads(path):
                    _build(compiler, flags, path)
            return _opened(path, described)
        except OSError as error:  # cannot be written, or nothing may be loaded from it
            unusable.append(f"{folder}: {error}")
    raise BuildError("no folder to keep the library in: " + "; ".join(unusable))


def _loads(path: Path) -> bool:
    """Whether a cached file is a library; one that a crash left broken is built anew."""
    try:
        ctypes.CDLL(str(path))
    except OSError:
        return False
    return True


def _opened(path: Path, compiler: str) -> Kernels:
    library = ctypes.CDLL(str(path))
    library.s2_isa.restype = ctypes.c_char_p
    return Kernels(library, path, compiler, library.s2_isa().decode())


def _key(words: list[str]) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(f"\0{source.name}\0".encode() + source.read_bytes())
    return digest.hexdigest()[:32]


def _cpu_features() -> str:
    """What ``-march=native`` depends on: what the first processor is and can do."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        kept = (
            "vendor_id",
            "cpu family",
            "model",
            "flags",
            "Features",
            "CPU implementer",
            "CPU part",
        )
        return "\n".join(line for line in first if line.partition(":")[0].strip() in kept)
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def _cache_folders() -> Iterator[Path]:
    """Where the library may lie: ``$S2ATTN_CACHE`` or the user's cache, then a temporary folder."""
    named = os.environ.get("S2ATTN_CACHE")
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s2attn"
    except RuntimeError:  # no home
        base = None
    folder = Path(named) if named else base
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            folder = None
    if folder is not None and os.access(folder, os.W_OK | os.X_OK):
        yield folder
    yield _temporary_folder()


def _temporary_folder() -> Path:
    """A folder that only this user can write: others could otherwise plant a library there."""
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"s2attn-{user}"
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
        if stat.S_ISDIR(state.st_mode) and state.st_uid == user and not state.st_mode & 0o022:
            return folder
    return Path(tempfile.mkdtemp(prefix="s2attn-"))


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Let one process build while others wait for its result.

    Where files cannot be locked, as on some network file systems, each builds its own: the rename
    at the end is atomic.
    """
    import fcntl  # POSIX only

    with open(lock, "w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(compiler: list[str], flags: list[str], path: Path) -> None:
    """Compile all sources at once, link them next to ``path`` and move the result there."""
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as scratch:
        objects, running = [], []
        for source in sorted(SOURCES.glob("*.cpp")):
            objects.append(f"{scratch}/{source.stem}.o")
            running.append(_start([*compiler, *flags, "-c", str(source), "-o", objects[-1]]))
        words = [_finish(process) for process in running]
        for process, word in zip(running, words, strict=True):
            if process.returncode:
                raise BuildError(f"{' '.join(compiler)} failed: {word.strip()[:2000]}")
        _run([*compiler, *flags, "-shared", *objects, "-o", f"{scratch}/library.so"])
        os.replace(f"{scratch}/library.so", path)


def _start(command: list[str]) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.Popen(command, **pipes, text=True, errors="replace", env=environment)
    except OSError as error:
        reason = f"the C++ compiler {command[0]} does not start: {error.strerror}"
        raise BuildError(reason) from error


def _finish(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=TIMEOUT)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"no result within {TIMEOUT} seconds"


def _run(command: list[str]) -> str:
    process = _start(command)
    words = _finish(process)
    if process.returncode:
        raise BuildError(f"{command[0]} failed: {words.strip()[:2000]}")
    return words
