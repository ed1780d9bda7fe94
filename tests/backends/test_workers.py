"""Pieces on several threads: in order, with the caller's settings restored, and with the same bits as on one."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch

from s2attn.backends import Backend, get_backend
from s2attn.backends.portable import run as walk
from s2attn.backends.portable.workers import alone, in_order, usual_threads
from tests.support.problems import random_problem, run

CPU = torch.device("cpu")


@pytest.mark.usefixtures("two_threads")
def test_results_come_in_order() -> None:
    def work(i: int) -> int:
        time.sleep(0.002 * (i % 3))
        return i

    assert list(in_order(work, range(20), CPU)) == list(range(20))


@pytest.mark.usefixtures("two_threads")
def test_each_piece_computes_alone_and_without_autograd() -> None:
    def work(i: int) -> tuple[int, bool, int]:
        time.sleep(0.002)
        return torch.get_num_threads(), torch.is_grad_enabled(), threading.get_ident()

    seen = list(in_order(work, range(12), CPU))
    assert {threads for threads, _, _ in seen} == {1} and not any(grad for _, grad, _ in seen)
    assert len({ident for _, _, ident in seen}) == 2 and threading.get_ident() in {ident for _, _, ident in seen}
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_the_caller_does_not_wait_for_a_slow_piece() -> None:
    slow = threading.Event()

    def work(i: int) -> int:
        if i == 0 and threading.current_thread() is not threading.main_thread():
            assert slow.wait(10)  # until all others are done
        elif i == 3:
            slow.set()
        return i

    assert list(in_order(work, range(4), CPU)) == [0, 1, 2, 3]


@pytest.mark.usefixtures("two_threads")
def test_the_first_error_in_order_is_raised() -> None:
    def fail(i: int) -> None:
        time.sleep(0.01 if i == 0 else 0.0)
        raise ValueError(f"piece {i}")

    with pytest.raises(ValueError, match="piece 0"):
        list(in_order(fail, range(6), CPU))


def test_alone_says_how_many_threads_there_usually_are() -> None:
    torch.set_num_threads(3)
    with alone() as outer, alone() as inner:
        assert (outer, inner, usual_threads(), torch.get_num_threads()) == (3, 3, 3, 1)
    assert usual_threads() == torch.get_num_threads() == 3


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("count", [1, 9])
def test_an_error_reaches_the_caller_and_settings_are_restored(count: int) -> None:
    def fail(i: int) -> None:
        raise ValueError(f"piece {i}")

    with pytest.raises(ValueError, match="piece 0"):
        list(in_order(fail, range(count), CPU))
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_abandoned_iterator_restores_settings() -> None:
    results = in_order(lambda i: i, range(50), CPU)
    assert next(results) == 0
    results.close()
    assert torch.get_num_threads() == 2


def test_other_devices_use_no_threads() -> None:
    seen = list(in_order(lambda i: threading.get_ident(), range(5), torch.device("meta")))
    assert set(seen) == {threading.get_ident()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(walk, "CHUNK_BYTES", 200_000)
    p = random_problem(4, 2, 4, 300, 300, 32, causal=True, batch=2).to(dtype)
    backend = get_backend("portable")
    alone = run(backend, p)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        together = run(backend, p)
        assert all(torch.equal(getattr(together, name), getattr(alone, name)) for name in ("out", "lse", "dq", "dk", "dv"))


def test_autocast_and_autograd_stay_outside(backend: Backend) -> None:
    p = random_problem(4, 2, 2, 100, 100, 32, causal=True).to(torch.float32)
    expected = run(backend, p)
    for tensor in (p.q, p.k, p.v):
        tensor.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(backend, p)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(getattr(got, name), getattr(expected, name)) and not getattr(got, name).requires_grad


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_reaches_the_threads(monkeypatch: pytest.MonkeyPatch, made_inside: bool) -> None:
    monkeypatch.setattr(walk, "CHUNK_BYTES", 200_000)
    p = random_problem(4, 2, 4, 300, 300, 32, causal=True, batch=2).to(torch.float32)
    expected = run(get_backend("portable"), p)
    with torch.inference_mode():
        if made_inside:
            p = replace(p, **{name: getattr(p, name).clone() for name in ("q", "k", "v", "dout")})
        got = run(get_backend("portable"), p)
    assert torch.equal(got.out, expected.out) and torch.equal(got.dk, expected.dk)


@pytest.mark.usefixtures("two_threads")
def test_calls_that_overlap_leave_the_setting_as_it_was() -> None:
    def call(pause: float) -> None:
        list(in_order(lambda i: time.sleep(pause), range(4), CPU))

    users = [threading.Thread(target=call, args=(pause,)) for pause in (0.004, 0.013, 0.001)]
    for user in users:
        user.start()
        time.sleep(0.002)
    for user in users:
        user.join()
    after: list[int] = []
    late = threading.Thread(target=lambda: after.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert after == [2] and torch.get_num_threads() == 2
