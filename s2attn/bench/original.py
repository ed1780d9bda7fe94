"""The kernels published with the S2-Attention paper as a peer, from a checkout: the package ``s2attn`` or ``dkernel`` that lies there."""

from __future__ import annotations

import importlib
import sys
import time
import types
from typing import Any

import torch
from torch import Tensor

from s2attn.bench.cases import AttentionCase
from s2attn.bench.peers import NO_CUDA, Peer, Prepared, case_layout, listed_pairs
from s2attn.bench.rows import Skip
from s2attn.core import StrPath, as_path
from s2attn.layout import Layout
from s2attn.layout.entries import entries_of

PACKAGES = ("s2attn", "dkernel")
LARGEST_TABLE = 1 << 26  # numbers in the dense table of blocks that the original wants, and takes seconds to read


class Original(Peer):
    """The original S2 kernels over the same blocks; they want a dense table of blocks, and know no mask but the causal one."""

    name = "s2-original"

    def __init__(self, device: str = "cpu", path: StrPath | None = None):
        path = None if path is None else as_path("path", path)
        super().__init__(device)
        self.path = path

    def absence(self) -> str | None:
        if self.path is None:
            return "no checkout given"
        return None if self.device == "cuda" else NO_CUDA

    def prepare(self, case: AttentionCase) -> Prepared:
        assert self.path is not None
        interface = load_original(self.path)
        began = time.perf_counter()
        layout = case_layout(case, "cpu")
        table = block_table(case, layout)
        module = interface.SparseAttention(case.block, table, seq_dim=1).to(self.device)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        held = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return module(q, k, v, sm_scale=case.head_dim**-0.5)

        pairs, executed = listed_pairs(case, layout)
        return Prepared(attend, False, seconds, held, case.pattern, pairs, executed, {"package": interface.__name__})


def block_table(case: AttentionCase, layout: Layout) -> Tensor:
    """The listed blocks ``(heads, query blocks, key blocks)`` uint8.

    Raises:
        Skip: a block is partly masked by more than causality, or the table is too large.
    """
    rows = len(layout.q_spans)
    if case.heads * rows * rows > LARGEST_TABLE:
        raise Skip(f"its table of {case.heads} x {rows} x {rows} blocks is too large")
    table = torch.zeros(layout.heads, rows, rows, dtype=torch.uint8)
    corner = torch.ones(layout.block, layout.block, dtype=torch.bool).tril()
    for head in range(layout.heads):
        entries = entries_of(layout.rows, head)
        partial = entries.tile >= 0
        if case.seqlen % layout.block or not _only_causal(
            entries.line[partial], entries.idx[partial], layout, entries.tile[partial], corner
        ):
            raise Skip("knows whole blocks and causality only")
        table[head, entries.line, entries.idx] = 1
    return table.repeat_interleave(case.heads // layout.heads, dim=0)


def _only_causal(line: Tensor, idx: Tensor, layout: Layout, tile: Tensor, corner: Tensor) -> bool:
    used = tile.unique().long()
    return bool((line == idx).all()) and all(bool((layout.tiles[int(t)] == corner).all()) for t in used)


def load_original(root: StrPath) -> Any:
    """The module ``interface`` of the checkout's package.

    The original may have this library's own name: its modules are then loaded while ours stand aside, and keep only the names that they
    have bound by then. Its ``__init__`` is not run, since it asks for an installed package's version.

    Raises:
        Skip: no such package lies there.
    """
    root = as_path("root", root)
    found = [folder for base in (root, root / "src") for name in PACKAGES if (folder := base / name / "interface.py").is_file()]
    if not found:
        raise Skip(f"{root} holds no package {' or '.join(PACKAGES)} with interface.py")
    folder = found[0].parent
    name = folder.name
    ours = {key: module for key, module in sys.modules.items() if key == name or key.startswith(f"{name}.")}
    for key in ours:
        del sys.modules[key]
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    try:
        return importlib.import_module(f"{name}.interface")
    finally:
        for key in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[key]
        sys.modules.update(ours)
