"""The clock for graphics cards, with a device that is only played: what is captured, what is not, and what a row then says."""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext

import pytest
import torch

from s2attn.tuning.cuda import CudaMeter


class Played(CudaMeter):
    """A device on which a call takes as long as it says."""

    def __init__(self, seconds: float):
        self.takes, self.flushed = seconds, 0

    def sync(self) -> None:
        pass

    def flush(self) -> None:
        self.flushed += 1


class PlayedEvent:
    clock = 0.0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = PlayedEvent.clock

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: PlayedEvent) -> float:
        return 1e3 * (other.at - self.at)


class PlayedGraph:
    """A graph whose replay takes ten microseconds."""

    def replay(self) -> None:
        PlayedEvent.clock += 1e-5


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    log: list[str] = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            log.append("wait")

    @contextmanager
    def graph(made: PlayedGraph, stream: Stream):
        log.append("capture")
        yield

    for name, value in {
        "Event": PlayedEvent,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": PlayedGraph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return log


def test_short_calls_are_captured_and_long_ones_are_not(played: list[str]) -> None:
    for takes, how in ((1e-4, "graph"), (0.02, "events")):
        meter, begun = Played(takes), list[int]()

        def call(takes: float = takes) -> None:
            PlayedEvent.clock += takes

        armed = meter.arm(call, lambda begun=begun: begun.append(1))
        assert armed.how == how and armed.note == ""
        assert meter.seconds(armed.call) == pytest.approx(1e-5 if how == "graph" else takes)
        assert len(begun) == (2 if how == "graph" else 1) and meter.flushed > 0
    assert played == ["wait", "wait", "capture"]


@pytest.mark.parametrize(("takes", "graph", "how"), [(0.02, True, "graph"), (1e-4, False, "events")])
def test_a_case_may_want_a_graph_or_none(played: list[str], takes: float, graph: bool, how: str) -> None:
    def call() -> None:
        PlayedEvent.clock += takes

    assert Played(takes).arm(call, lambda: None, graph=graph).how == how
    assert ("capture" in played) == graph


def test_a_call_that_cannot_be_captured_says_so(played: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def refuses(made: PlayedGraph, stream: object):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuses)

    def call() -> None:
        PlayedEvent.clock += 1e-4

    armed = Played(1e-4).arm(call, lambda: None)
    assert armed.how == "events" and armed.call is call
    assert armed.note == "no CUDA graph (RuntimeError: operation not permitted), so host time may be in it"


def test_host_time_is_bounded_by_a_budget() -> None:
    meter, calls = Played(0.0), list[int]()
    assert meter.host_seconds(lambda: calls.append(1), repeats=5) >= 0 and len(calls) == 5
    meter.host_seconds(lambda: (calls.append(1), time.sleep(0.02)), repeats=5, budget_s=0.01)
    assert len(calls) == 6
