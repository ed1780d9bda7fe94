"""Tensor-parallel attention on two processes, and what it saves to sum its output in chunks of rows while other rows are computed.

The network of this machine is its own memory, so every sum is made to take longer, as long as its rows are many: 0.4 s for all of them.
The times are those of this run and no more than an illustration; that the results agree is checked.
"""

import socket
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import multiprocessing

import s2attn
from s2attn.distributed import projection

TOKENS, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 2048, 8, 4, 32, 256
PATTERN = s2attn.Local(4) | s2attn.Stride(8)
SECONDS = 0.4


class SlowSum:
    """An all-reduce on a line that is busy with its bytes for a while, one after another."""

    last = None

    def __init__(self, part, group):
        before, SlowSum.last = SlowSum.last, self

        def run():
            if before is not None:
                before.wait()
            time.sleep(SECONDS * part.shape[1] / TOKENS)
            dist.all_reduce(part, group=group)

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def wait(self):
        self.thread.join()


def times():
    """Seconds of one forward and backward for some sizes of chunks, and the largest difference from a single chunk."""
    projection.begin_sum = SlowSum
    rank, ranks = dist.get_rank(), dist.get_world_size()
    heads = s2attn.head_range(rank, ranks, num_heads=HEADS, num_kv_heads=KV_HEADS)
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)  # the same on both
    torch.manual_seed(rank)  # each has its own heads' weights
    sizes = [count // ranks * HEAD_DIM for count in (HEADS, KV_HEADS, KV_HEADS)]
    into, out = torch.randn(sum(sizes), WIDTH) / WIDTH**0.5, torch.randn(WIDTH, sizes[0]) / WIDTH**0.5

    def qkv(rows, begin):
        return [part.unflatten(-1, (-1, HEAD_DIM)) for part in (rows @ into.T).split(sizes, dim=-1)]

    found, reference = {}, None
    for rows in (TOKENS, TOKENS, 1024, 512, 256):  # the first one is a warm-up
        start = time.perf_counter()
        result = projection.overlapped_attention(x, qkv, PATTERN, out, rows=rows, heads=heads)
        (grad,) = torch.autograd.grad(result.square().mean(), x)
        seconds = time.perf_counter() - start
        reference = (result, grad) if reference is None else reference
        off = max(float((a - b).detach().abs().max()) for a, b in zip((result, grad), reference, strict=True))
        found[rows] = (seconds, off)
    return found


def on_rank(rank, ranks, port, results):
    """One process of the group; only the first one reports."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    found = times()
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


if __name__ == "__main__":
    print(f"{TOKENS} tokens on 2 processes; all sums of a direction take {SECONDS} s")
    results = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(on_rank, args=(2, free_port(), results), nprocs=2)
    for rows, (seconds, off) in results.get().items():
        assert off < 1e-4, off
        print(f"chunks of {rows:4} rows: {seconds:.2f} s")
