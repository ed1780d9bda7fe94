"""The suite `decode`: its cases, what they list, its truth, and a tiny run on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from s2attn import Dense, Local, Stride
from s2attn.bench import decoding
from s2attn.bench.clock import Meter
from s2attn.bench.compared import compare_text
from s2attn.bench.decoding import DecodeOracle, WholeFlex, run_decode_case
from s2attn.bench.paged import Batch, DecodeCase, decode_suite, listed_in, uniform_twin
from s2attn.bench.report import report_page
from s2attn.bench.rows import Effort
from s2attn.bench.runner import run_suite
from s2attn.bench.session import Plan
from s2attn.bench.tables import record_text
from s2attn.patterns import Head, Shape, Window

FAST = Effort(rounds=1, min_rounds=1, budget_s=0.1)
S2 = Local(2, 16) | Stride(4, block=16)


def case_of(**more) -> DecodeCase:
    shape = {"page_size": 16, "heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float32"}
    return DecodeCase(**{"name": "case", "pattern": S2, "batch": 3, "context": 200, **shape, **more})


def test_full_cases_are_those_that_were_promised() -> None:
    cases = decode_suite()
    assert len({case.name for case in cases}) == len(cases)
    assert {case.batch for case in cases} >= {1, 16, 128} and {case.context for case in cases} >= {8192, 32768, 131072}
    assert {case.page_size for case in cases} == {16, 64} and {case.q_len for case in cases} == {1, 4}
    assert {case.head_dim for case in cases} == {64, 128} and {case.ragged for case in cases} == {True, False}
    assert {(case.heads, case.kv_heads) for case in cases} == {(32, 8)}
    assert max(sum(case.lengths) for case in cases) <= 1 << 21, "keys and values of one case must fit beside a copy of them"
    for case in [*cases, *decode_suite(size="small"), *decode_suite(size="tiny")]:
        assert json.loads(json.dumps(case.facts())) == case.facts()


@pytest.mark.parametrize("heads", ["kv", "query"])
def test_listed_keys_are_those_of_the_pages_that_some_head_reads(heads: str) -> None:
    case = case_of(pattern=Window(20) | Stride(4, block=16, heads=heads), q_len=3)
    found, keys, pairs = listed_in(case, case.pattern, case.lengths), 0, 0
    shape, rows = Shape(200), torch.arange(197, 200).numpy()[:, None]
    for g in range(2):
        seen = [case.pattern.at(Head(h, 4, 2)).allowed(rows, torch.arange(200).numpy()[None], shape) for h in (2 * g, 2 * g + 1)]
        pairs += sum(int(one.sum()) for one in seen)
        pages = torch.nn.functional.pad(torch.from_numpy(seen[0] | seen[1]).any(0), (0, 8)).unflatten(0, (-1, 16)).any(1)
        keys += 16 * int(pages[:-1].sum()) + 8 * int(pages[-1])
    assert (found.pairs, found.keys) == (3 * pairs, 3 * keys)
    assert found.bytes(case) == 3 * keys * 2 * 16 * 4


@pytest.mark.parametrize(
    "case", [case for size in ("full", "small") for case in decode_suite(size=size) if case.ragged], ids=lambda case: case.name
)
def test_a_uniform_batch_lists_as_many_bytes_as_a_ragged_one(case: DecodeCase) -> None:
    twin = uniform_twin(case)
    ours, theirs = (listed_in(one, one.pattern, one.lengths).keys for one in (case, twin))
    assert twin.batch == case.batch and len(set(twin.lengths)) == 1 and len(set(case.lengths)) > 1
    assert ours / theirs == pytest.approx(1, rel=0.03 if "power" not in case.name else 0.1)


def test_flex_over_padded_keys_means_what_the_pattern_means() -> None:
    for case in (case_of(q_len=3, ragged=True, batch=4), case_of(q_len=2, pattern=Window(20))):
        peer = WholeFlex(Batch.of(case), "cpu", "torch")
        assert peer.mask_heads() == (4 if case.ragged else None)
        seen, room = peer.seen(), torch.arange(case.context)
        for b, length in enumerate(case.lengths):
            rows, keys = torch.arange(length - case.q_len, length), torch.arange(length)
            for h in range(4):
                theirs = seen(torch.tensor(b), torch.tensor(h), torch.arange(case.q_len)[:, None], room[None])
                ours = case.pattern.at(Head(h, 4, 2)).allowed(rows.numpy()[:, None], keys.numpy()[None], Shape(length))
                assert not theirs[:, : case.context - length].any()
                assert torch.equal(theirs[:, case.context - length :], torch.from_numpy(ours))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_page_that_was_not_read_is_seen(dtype: str) -> None:
    case = case_of(context=1024, dtype=dtype, pattern=Window(800))
    batch = Batch.of(case)
    oracle, peer = DecodeOracle(batch), decoding.Paged(batch, "cpu", "torch")
    out = peer.prepare()[0]()
    assert oracle.check(case.pattern, out).within
    less = replace(case, pattern=Window(784))
    assert not oracle.check(case.pattern, decoding.Paged(replace(batch, case=less), "cpu", "torch").prepare()[0]()).within


def test_the_tiny_suite_runs_on_a_cpu_and_can_be_read() -> None:
    cases = decode_suite(size="tiny")
    record = run_suite("decode", cases, effort=FAST)
    assert record["complete"] and {row["case"] for row in record["rows"]} == {case.name for case in cases}
    for row in record["rows"]:
        if row["peer"] in ("s2attn", "sdpa"):
            assert row["status"] == "ok", row
            assert row["error"] <= row["error_bound"] and row["share_of_copy"] == row["gbps"] / row["copy_gbps"] > 0
        if row["peer"] == "s2attn":
            assert row["metadata_s"] >= 0 and ("over_uniform" in row) == row["ragged"]
            assert row["listed_bytes"] == pytest.approx(row["density"] * row["dense_bytes"])
    absent = {(row["peer"], row["why"]) for row in record["rows"] if row["status"] != "ok"}
    assert ("flash", "needs a CUDA device") in absent and ("s2attn-dense", "is s2attn itself where the pattern is dense") in absent
    head, *lines = record_text(record).splitlines()[1 : 2 + len(cases)]
    assert "of a copy" in head and "new lengths" in head and [line.startswith("tiny") for line in lines] == [True] * len(cases)
    assert "### Decoding from pages" in report_page({"tiny": record})
    assert "tiny S2, 4 queries, ragged" in compare_text({"tiny": record})


def test_a_wrong_result_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda *args, **more: 1.01 * right(*args, **more))
    rows = {row["peer"]: row for row in run_decode_case(case_of(), FAST)}
    assert rows["s2attn"]["status"] == "failed" and rows["s2attn"]["why"].startswith("ArithmeticError: wrong result")
    assert rows["sdpa"]["status"] == "ok"


def test_a_decode_that_cannot_be_captured_is_timed_with_its_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that can be is told not to look at numbers."""
    graphs: list[bool | None] = []
    looks: list[bool] = []

    class Watched(Meter):
        def arm(self, call, start, graph=None):
            graphs.append(graph)
            return super().arm(call, start, graph)

    right = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda *args, validate=True, **more: looks.append(validate) or right(*args, **more))
    for unchecked, graph in (({}, False), ({"validate": False}, True)):
        monkeypatch.setattr(decoding, "UNCHECKED", unchecked)
        graphs.clear(), looks.clear()
        assert run_decode_case(case_of(pattern=Dense()), FAST, meter=Watched())[0]["status"] == "ok"
        assert graphs[0] is graph and set(looks) == {not graph}


def test_new_lengths_are_timed_beside_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    right = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda *args, **more: seen.append(more["seq_lens"].tolist()) or right(*args, **more))

    class Counting(Meter):
        def first_seconds(self, call):
            call()
            return float(len(seen))

    peer = decoding.Paged(Batch.of(case_of(batch=2)), "cpu", "torch")
    assert peer.metadata_s(Counting()) == 1.0 and seen == [[200, 200], [199, 199]]


def test_small_cases_are_for_suites_that_have_them() -> None:
    assert Plan("out", ("decode",), "small").suite("decode") == decode_suite(size="small")
    with pytest.raises(ValueError, match="size may be small for decode, select, hyper alone; got it for forward, decode"):
        Plan("out", ("forward", "decode"), "small")
    with pytest.raises(ValueError, match="context must be an integer >= 16"):
        case_of(ragged=True, context=8)
