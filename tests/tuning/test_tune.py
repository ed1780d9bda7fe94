"""`s2attn tune`: what it would measure, what it writes, and that launches find it again."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from s2attn.backends import Pages, Requests, Scoring
from s2attn.backends.triton import Triton, table
from s2attn.backends.triton.backend import triton_version
from s2attn.backends.triton.table import Situation, file_name, read_table, tuned_tiles, write_table
from s2attn.backends.triton.tiles import SHARED_MEMORY, Tiles, choose_tiles, shared_bytes
from s2attn.schedule.cuts import LEAST_TOKENS
from s2attn.tuning import tune as tuning
from s2attn.tuning.candidates import candidates, check_density, compiled_ahead, fallback, refined, small_target, targets
from s2attn.tuning.clock import Timing
from s2attn.tuning.paged import Batch
from s2attn.tuning.tune import check_results, overall, tune, tune_lines
from s2attn.tuning.tune_session import TunePlan, run_tune, run_tune_plan

SITUATION = Situation("forward", "bfloat16", 128, 128, 64, "medium")


def test_the_most_used_situations_come_first_and_each_once():
    wanted = targets(dims=[64, 128], blocks=[32, 64, 128])
    assert wanted[0].situation == SITUATION
    assert len({target.situation for target in wanted}) == len(wanted) == 2 * 3 * 3 * 4


@pytest.mark.parametrize("block", [32, 64, 128])
def test_problems_lie_in_their_class_of_density(block):
    ops = ["dq", "decode"]
    for target in targets(dims=[64], blocks=[block], ops=ops) + targets(dims=[16], blocks=[block], ops=ops, tiny=True):
        check_density(target, target.layout(torch.device("cpu")))


@pytest.mark.parametrize("limit", sorted(set(SHARED_MEMORY.values())))
def test_candidates_fit_and_begin_with_the_fallback(limit):
    for target in targets(dims=[64, 128], blocks=[32, 64]):
        found = candidates(target.situation, limit)
        assert found[0] == fallback(target.situation, limit) and len(set(found)) == len(found) > 4
        assert all(shared_bytes(target.situation.op, tiles, *[target.situation.head_dim] * 2, 2) <= limit for tiles in found)


def test_a_table_is_found_again(tmp_path, monkeypatch):
    tiles = Tiles(128, 64, 8, 3, 16384)
    write_table(tmp_path / file_name("NVIDIA H200", "3.6.0"), "NVIDIA H200", [(SITUATION, tiles, {"median_s": 1.0})], {})
    monkeypatch.setenv(table.VARIABLE, str(tmp_path))
    assert tuned_tiles("NVIDIA H200", "3.6.1", SITUATION) == tiles
    assert tuned_tiles("NVIDIA H200", "3.7.0", SITUATION) is None
    assert tuned_tiles("NVIDIA H100", "3.6.0", SITUATION) is None
    assert tuned_tiles("NVIDIA H200", "3.6.0", Situation("dq", "bfloat16", 128, 128, 64, "medium")) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(schema=9), "schema must be 1; got 9"),
        (lambda data: data["rows"][0]["tiles"].update(line_tokens=48), "powers of two"),
        (lambda data: data["rows"][0]["tiles"].update(num_stages=0), "at least one stage"),
        (lambda data: data["rows"][0]["tiles"].update(form="quick"), "form must be one of plain, specialised, hopper"),
        (lambda data: data["rows"][0].pop("op"), "KeyError"),
    ],
)
def test_a_table_that_was_damaged_is_refused(tmp_path, change, words):
    path = tmp_path / "gpu.json"
    write_table(path, "gpu", [(SITUATION, Tiles(64, 64, 4, 3), {})], {})
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=words):
        read_table(path)


def test_checked_in_tables_hold_what_a_launch_can_use():
    for path in table.PACKAGED.glob("*.json"):
        assert read_table(path), path.name


def test_wrong_results_are_refused():
    right = [torch.tensor([1.0, 2.0, -torch.inf])]
    check_results(right, [torch.tensor([1.0, 2.0, -torch.inf])])
    for wrong in ([1.1, 2.0, -torch.inf], [1.0, torch.nan, -torch.inf], [1.0, 2.0, 0.0]):
        with pytest.raises(ArithmeticError, match="wrong result"):
            check_results(right, [torch.tensor(wrong)])


@pytest.fixture
def interpreted():
    pytest.importorskip("triton", reason="triton is not installed")


def test_decoding_is_measured_on_few_and_many_sequences_of_both_page_sizes():
    for target in targets(dims=[128], blocks=[64], ops=["decode"]):
        cases = target.cases
        assert {(case.batch, case.page_size) for case in cases} == {(b, p) for b in (1, 16, 64) for p in (16, 64)}
        assert all((case.pattern, case.heads, case.kv_heads, case.head_dim) == (target.pattern, 32, 8, 128) for case in cases)
        assert all(max(case.lengths) == target.seqlen == 32768 for case in cases)


def test_every_way_of_cutting_is_tried_with_the_best_tiles_and_compiled_ahead():
    (target,) = targets(dims=[128], blocks=[64], ops=["decode"])[:1]
    found = candidates(target.situation, 232448)
    assert refined(target, found[:2]) == [replace(tiles, cut=cut) for tiles in found[:2] for cut in ("direct", "split", "stream")]
    ahead = compiled_ahead(target.situation, 232448)
    assert {(tiles.listed_tokens, tiles.num_warps, tiles.num_stages, tiles.cut) for _, tiles in ahead} == {
        (tiles.listed_tokens, tiles.num_warps, tiles.num_stages, cut) for tiles in found for cut in ("split", "stream")
    }


@pytest.mark.parametrize("block", [32, 64, 128])
def test_lists_are_cut_where_decoding_is_compiled_ahead(block):
    """A problem so small that nothing is cut would compile no kernel that joins."""
    for target in targets(dims=[128], blocks=[block], ops=["decode"]):
        small = small_target(target.situation)
        assert {case.page_size for case in small.cases} == {16, 64}
        assert int(small.layout(torch.device("cpu")).rows.counts.max()) * block >= 2 * LEAST_TOKENS


def test_one_timing_stands_for_all_problems():
    one, other = Timing(2.0, 1.0, 4.0, 15), Timing(8.0, 4.0, 16.0, 9)
    assert overall({"": one}) == one
    assert overall({"a": one, "b": other}) == Timing(4.0, 2.0, 8.0, 9)


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
def test_tiles_for_decoding_are_written_and_found_again(tmp_path, interpreted, monkeypatch):
    wanted = targets(dims=[16], blocks=[16], ops=["decode"], dtype="float32", tiny=True)[:1]
    path, (measured,) = tune(wanted, tmp_path, tiny=True)
    assert measured.tiles is not None, tune_lines([measured])
    (row,) = json.loads(path.read_text())["rows"]
    assert row["tried"] == 5 and not row["refused"] and row["median_s"] <= row["fallback_s"]
    assert list(row["problems"]) == ["1 sequence, pages of 16", "2 sequences, ragged, pages of 32"]
    # A launch over the same rows looks for this very row.
    seen = []
    backend = Triton(lambda wanted, *more: seen.append(wanted) or read_table(path)[wanted])
    layout, case = wanted[0].layout(torch.device("cpu")), wanted[0].cases[0]
    batch = Batch.of(case)
    pages, requests = Pages(batch.k_pages, batch.v_pages, batch.block_table[:, None]), Requests(batch.seq_lens, None)
    backend.forward_paged(batch.q, pages, requests, layout, Scoring(0.25))
    assert seen == [measured.target.situation]


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
def test_a_small_run_writes_its_table_row_by_row(tmp_path, interpreted, monkeypatch):
    wanted = targets(dims=[16], blocks=[16], dtype="float32", tiny=True)[:3]
    seen = []
    monkeypatch.setattr(
        tuning, "write_table", lambda path, device, rows, facts: (seen.append(len(rows)), write_table(path, device, rows, facts))
    )
    path, done = tune(wanted, tmp_path, tiny=True)
    assert seen == [1, 2, 3] and all(m.tiles is not None for m in done), tune_lines(done)
    assert read_table(path) == {m.target.situation: m.tiles for m in done}
    rows = json.loads(path.read_text())["rows"]
    assert all(row["median_s"] <= row["fallback_s"] and row["tried"] >= 2 and not row["refused"] for row in rows)


def test_what_the_time_did_not_allow_is_said(tmp_path, interpreted):
    _, done = tune(targets(dims=[16], blocks=[16], ops=["dq"], dtype="float32", tiny=True), tmp_path, tiny=True, limit_s=0.0)
    assert all("was over" in line for line in tune_lines(done))


def test_words_of_the_command_line_are_checked():
    given = {"out": None, "ops": "dq", "dims": "64", "blocks": "64", "dtype": "bfloat16", "size": "full", "limit": 1.0}
    for change, words in (
        ({"size": "huge"}, "--size must be one of full, tiny"),
        ({"dims": "64,x"}, "--dims must be numbers"),
        ({"ops": "softmax"}, "ops must be some of forward, dq, dkv, decode"),
        ({"blocks": "48"}, "blocks must be"),
    ):
        with pytest.raises(ValueError, match=words):
            run_tune(**given | change)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="size must be tiny where there is no CUDA device"):
            run_tune(**given)


ONE = property(lambda self: targets(dims=self.dims, blocks=self.blocks, ops=self.ops, dtype=self.dtype, tiny=True)[2:])
WORKER = """
import os, sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_tune import ONE
from s2attn.tuning import tune, tune_session
from s2attn.tuning.benches import AttentionBench

found, calls = tune.candidates, AttentionBench.calls

def deadly(self, tiles):
    if tiles.form == "hopper":
        os.kill(os.getpid(), 9)
    return calls(self, tiles)

AttentionBench.calls = deadly
tune.candidates = lambda *given, **more: [*found(*given, **more)[:2], replace(found(*given, **more)[0], form="hopper")]
tune_session.TunePlan.targets = ONE
sys.exit(tune_session.main_tune_work(Path(sys.argv[2]), Path(sys.argv[3])))
"""


def test_a_candidate_that_ends_the_process_costs_itself_alone(tmp_path, interpreted, capfd, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(TunePlan, "targets", ONE)
    plan = TunePlan(("dq",), (16,), (16,), "float32", True, str(tmp_path), limit_s=300.0)
    lines = run_tune_plan(plan, (sys.executable, "-c", WORKER, str(Path(__file__).parent)))
    (row,) = json.loads((tmp_path / file_name("interpreter", triton_version())).read_text())["rows"]
    assert row["refused"] == ["hopper: the process ended with signal 9"] and row["tried"] == 2
    assert len(lines) == 2 and "x the untuned" in lines[0]
    assert capfd.readouterr().out.count("ended: hopper in dq float32 16 wide, block 16, dense: the process ended with signal 9") == 1


def test_the_fallback_is_what_launches_choose():
    assert fallback(SITUATION, 232448) == choose_tiles("forward", 128, 128, 2, 64, 232448)
