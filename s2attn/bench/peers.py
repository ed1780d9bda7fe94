"""Who takes part in a comparison: s2attn, torch's dense attention in its kinds, and whoever a file brings along."""

from __future__ import annotations

import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s2attn.bench.cases import AttentionCase
from s2attn.core import bad_value
from s2attn.layout import Layout, build_layout
from s2attn.ops import attention
from s2attn.patterns import Dense, Pattern

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Prepared:
    """A peer that is ready for one case.

    Attributes:
        attend: out of q, k, v, all in the peer's own order of axes.
        heads_first: that order is ``(B, H, T, D)`` instead of ``(B, T, H, D)``.
        metadata_s: seconds spent on block lists and masks.
        metadata_bytes: what they hold, where it is known.
        pattern: what the peer computes, which is what it is checked against.
        pairs: (query, key) pairs that it lists, all heads and batch entries.
        executed: pairs in the blocks that it computes, masked ones included, where that is known.
        facts: more for the row: what was chosen, and how.
    """

    attend: Attend
    heads_first: bool
    metadata_s: float
    metadata_bytes: int
    pattern: Pattern
    pairs: int
    executed: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


NO_CUDA = "needs a CUDA device"


class Peer(ABC):
    """One way to compute a case on ``device`` (``"cpu"`` or ``"cuda"``).

    Attributes:
        dense: it is dense attention, so that efficiency may be told against it.
        slow: it takes long to prepare, and so takes part only in cases that ask for all peers.
    """

    name: str
    dense = False
    slow = False

    def __init__(self, device: str = "cpu"):
        self.device = device

    def absence(self) -> str | None:
        """Why the peer cannot take part in any case here."""
        return None

    @abstractmethod
    def prepare(self, case: AttentionCase) -> Prepared:
        """Everything that is done once per mask; raises `s2attn.bench.rows.Skip` where the peer cannot serve the case."""


def case_layout(case: AttentionCase, device: str, block: int | None = None) -> Layout:
    """The layout of a case, at the case's block or another one."""
    return build_layout(case.pattern, case.heads, case.kv_heads, seqlen_q=case.seqlen, block=block or case.block, device=device)


def listed_pairs(case: AttentionCase, layout: Layout) -> tuple[int, int]:
    """Pairs that a case's layout lists, and pairs in its listed blocks; all heads and batch entries."""
    each = case.batch * case.heads // layout.heads
    return each * int(layout.pairs.sum()), each * int(layout.rows.counts.sum()) * layout.block**2


class S2Attn(Peer):
    """This library, with one backend: Triton on a CUDA device and plain torch elsewhere, where none is named."""

    name = "s2attn"

    def __init__(self, device: str = "cpu", backend: str | None = None):
        super().__init__(device)
        self.backend = backend or ("triton" if device == "cuda" else "torch")

    def prepare(self, case: AttentionCase) -> Prepared:
        began = time.perf_counter()
        layout = case_layout(case, self.device)
        if case.backward:
            _ = layout.columns
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, layout, backend=self.backend)

        pairs, executed = listed_pairs(case, layout)
        return Prepared(attend, False, seconds, layout.nbytes, case.pattern, pairs, executed, {"backend": self.backend})


class Sdpa(Peer):
    """torch's dense attention, of the kind that torch chooses: every key, whatever the case's pattern."""

    name = "sdpa"
    dense = True
    causal = True
    kind: str | None = None
    """The name in ``torch.nn.attention.SDPBackend`` that is forced; torch chooses where it is None."""

    def absence(self) -> str | None:
        return NO_CUDA if self.kind is not None and self.device != "cuda" else None

    def prepare(self, case: AttentionCase) -> Prepared:
        facts = {} if self.kind is None else {"sdpa_backend": self.kind}
        grouped = case.heads != case.kv_heads
        attend = dense_attention(self.kind, grouped, self.causal)
        if grouped and self.kind is not None and not _serves(attend, case, self.device):
            attend = _repeated(dense_attention(self.kind, False, self.causal), case.heads // case.kv_heads)
            facts["note"] = "has no grouped queries here: K and V are repeated for every query head inside the timed call"
        return Prepared(attend, True, 0.0, 0, Dense(), case.pairs_dense, case.pairs_dense, facts)


class Flash(Sdpa):
    """FlashAttention-2, as torch ships it."""

    name = "flash"
    kind = "FLASH_ATTENTION"


class Cudnn(Sdpa):
    """cuDNN's attention, as torch calls it."""

    name = "cudnn"
    kind = "CUDNN_ATTENTION"


def dense_attention(kind: str | None, grouped: bool, causal: bool = True) -> Attend:
    """Dense attention ``(B, H, T, D)`` through torch, forced to one kind or not."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_context(kind):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return attend


def sdpa_context(kind: str | None) -> AbstractContextManager[Any]:
    """Inside of it torch's dense attention is of one kind, by its name in ``torch.nn.attention.SDPBackend``; of any where that is None."""
    if kind is None:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, kind))


def _serves(attend: Attend, case: AttentionCase, device: str) -> bool:
    dtype = getattr(torch, case.dtype)
    q, k, v = (torch.randn(1, n, 128, case.head_dim, device=device, dtype=dtype) for n in (case.heads, case.kv_heads, case.kv_heads))
    try:
        attend(q, k, v)
    except RuntimeError:
        return False
    return True


def _repeated(attend: Attend, group: int) -> Attend:
    return lambda q, k, v: attend(q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1))


class FromFile(Peer):
    """A peer from a Python file: its function ``prepare(case, device)`` returns a `Prepared`, or raises `s2attn.bench.rows.Skip`."""

    def __init__(self, name: str, path: Path, device: str = "cpu"):
        super().__init__(device)
        self.name, self.path = name, path

    def absence(self) -> str | None:
        return None if self.path.is_file() else f"no file {self.path}"

    def prepare(self, case: AttentionCase) -> Prepared:
        spec = importlib.util.spec_from_file_location(f"peer_{self.name.replace('-', '_')}", self.path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.prepare(case, self.device)


NAMES = ("s2attn", "cudnn", "flash", "sdpa", "flex", "flex-tuned", "s2-original")
CPU_PEERS = ("s2attn", "sdpa", "flex")
CUDA_PEERS = ("s2attn", "cudnn", "flash", "flex", "flex-tuned", "s2-original")


def make_peers(
    names: Sequence[str], device: str = "cpu", *, backend: str | None = None, paths: Mapping[str, Path] | None = None
) -> list[Peer]:
    """The peers of these names.

    Args:
        backend: for s2attn.
        paths: where a peer lies that does not come with torch: the checkout of ``s2-original``, or for another name a Python file.

    Raises:
        ValueError: a name that is neither known nor in ``paths``.
    """
    from s2attn.bench.flex import Flex, FlexTuned
    from s2attn.bench.original import Original

    paths = paths or {}
    known: dict[str, Callable[[], Peer]] = {
        "s2attn": lambda: S2Attn(device, backend),
        "cudnn": lambda: Cudnn(device),
        "flash": lambda: Flash(device),
        "sdpa": lambda: Sdpa(device),
        "flex": lambda: Flex(device),
        "flex-tuned": lambda: FlexTuned(device),
        "s2-original": lambda: Original(device, paths.get("s2-original")),
    }
    made: list[Peer] = []
    for name in names:
        if name not in known and name not in paths:
            raise bad_value("peers", f"must be some of {', '.join(known)}, or have a path", repr(name))
        made.append(known[name]() if name in known else FromFile(name, paths[name], device))
    return made
