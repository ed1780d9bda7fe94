"""Tasks: a solver that knows only the rules on paper finds the answer in the text, once; masks, depths and seeds mean what they say."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.tasks import TASKS, Copy, Needle, Passkey, Recall, Task, TaskBatch, Tracking, task_named


def solve_passkey(before: str, length: int) -> list[str]:
    context, question = before.split("?")
    assert question == "#"
    return re.findall(r"#(\d+);", context)


def solve_needle(before: str, length: int) -> list[str]:
    context, question = before.split("?")
    asked = re.fullmatch(r":([A-Z]{2})=", question)
    assert asked
    return [number for name, number in re.findall(r":([A-Z]{2})=(\d+);", context) if name == asked[1]]


def solve_recall(before: str, length: int) -> list[str]:
    context, question = before.split("?")
    asked = re.search(r",([A-Z]{2})$", question)
    assert asked
    return [number for name, number in re.findall(r",([A-Z]{2})(\d{2})", context) if name == asked[1]]


def solve_copy(before: str, length: int) -> list[str]:
    found = re.fullmatch(r"\.?\[([a-z]+)\|([a-z]*)", before)
    assert found
    original, copied = found.groups()
    assert original.startswith(copied)
    return [original[len(copied) :][:length]]


def solve_tracking(before: str, length: int) -> list[str]:
    context, question = before.split("?")
    known: dict[str, str] = {}
    for name, source in re.findall(r"!([A-Z]{2})=(\d{2}|[A-Z]{2});", context):
        assert name not in known, "a variable is assigned once"
        known[name] = known[source] if source.isalpha() else source
    assert question[0] == "!" and question[3] == "="
    return [known[question[1:3]]]


SOLVERS: dict[str, Callable[[str, int], list[str]]] = {
    "passkey": solve_passkey,
    "needle": solve_needle,
    "recall": solve_recall,
    "copy": solve_copy,
    "tracking": solve_tracking,
}


def solved(batch: TaskBatch, row: int, name: str) -> list[str]:
    """Every answer that the text before the scored one allows."""
    asked = (batch.asked[row] == 1).nonzero()[:, 0]
    return SOLVERS[name](batch.text(row)[: int(asked[0])], len(asked))


def test_every_task_has_a_solver() -> None:
    assert set(SOLVERS) == set(TASKS)


@pytest.mark.parametrize("name", sorted(TASKS))
@given(extra=st.integers(0, 300), depth=st.floats(0, 1), seed=st.integers(0, 2**30))
@settings(max_examples=40, deadline=None)
def test_the_answer_is_in_the_text_and_unique(name: str, extra: int, depth: float, seed: int) -> None:
    task = task_named(name)
    batch = task.batch(task.shortest + extra, 2, seed=seed, depth=depth)
    for row in range(2):
        assert solved(batch, row, name) == [batch.answer(row)]


@given(pairs=st.integers(1, 40), seed=st.integers(0, 2**30), depth=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_recall_with_other_numbers_of_pairs_and_queries(pairs: int, seed: int, depth: float) -> None:
    task = Recall(pairs=pairs, queries=max(1, pairs // 2))
    batch = task.batch(task.shortest + 7, 1, seed=seed, depth=depth)
    assert solved(batch, 0, "recall") == [batch.answer(0)]
    context, questions = batch.text(0).split("?")
    assert [context.count(one) for one in re.findall(r",[A-Z]{2}\d{2}", questions)] == [1] * task.queries, "what only teaches is true, too"


@given(hops=st.integers(1, 5), chains=st.integers(2, 5), seed=st.integers(0, 2**30), depth=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_tracking_needs_every_hop(hops: int, chains: int, seed: int, depth: float) -> None:
    task = Tracking(hops, chains)
    batch = task.batch(task.shortest + 50, 1, seed=seed, depth=depth)
    text = batch.text(0)
    assert solved(batch, 0, "tracking") == [batch.answer(0)]
    known = dict(re.findall(r"!(\w\w)=(\w\w);", text))
    name, steps = text[-5:-3], 0
    while name.isalpha():
        name, steps = known[name], steps + 1
    assert steps == hops + 1


@pytest.mark.parametrize("name", sorted(TASKS))
def test_masks_mark_the_answer_and_nothing_else(name: str) -> None:
    batch = task_named(name).batch(200, 3, seed=1)
    assert batch.inputs.shape == batch.targets.shape == batch.loss_mask.shape == (3, 200)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert bool((batch.loss_mask | ~batch.score_mask).all()), "what is scored also teaches"
    for row in range(3):
        scored = bytes(batch.targets[row][batch.score_mask[row]].tolist()).decode()
        assert scored == batch.answer(row)
        letters = bytes(batch.targets[row][batch.loss_mask[row]].tolist()).decode()
        assert letters.islower() if name == "copy" else letters.isdigit()
        assert len(letters) == (99 if name == "copy" else 8 if name == "recall" else len(scored))


@pytest.mark.parametrize("task", [Passkey(), Needle(keys=1), Needle(keys=6), Recall(), Tracking(), Copy()])
def test_depth_runs_from_the_start_to_right_before_the_question(task: Task) -> None:
    length, span = 1000, length_of_span(task)
    places = [int(task.batch(length, 1, seed=5, depth=i / 4).needed[0]) for i in range(5)]
    assert places[0] <= 2 and places == sorted(places)
    end = task.batch(length, 1, seed=5, depth=1.0)
    last = end.text(0).index("|") if isinstance(task, Copy) else end.text(0).index("?")
    assert places[-1] + span == last
    room = last - span
    assert places == pytest.approx([room * i / 4 for i in range(5)], abs=span)


def length_of_span(task: Task) -> int:
    """Tokens of what the answer needs: a piece, or a chain of them."""
    widths = {"passkey": 6, "needle": 9, "recall": 5, "copy": 8, "tracking": 21}
    return widths[task.name]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_needed_piece_begins_where_it_is_said_to(name: str) -> None:
    batch = task_named(name).batch(300, 8, seed=2)
    for row in range(8):
        piece = batch.text(row)[int(batch.needed[row]) :]
        answer = batch.answer(row)
        starts = {"passkey": "#" + answer, "copy": answer}
        if name in starts:
            assert piece.startswith(starts[name])
        else:
            assert re.match(rf"[:,!][A-Z]{{2}}=?{answer}", piece)


def test_sequences_depend_on_seed_number_and_nothing_else() -> None:
    task = Needle()
    some, more = task.batch(100, 2, seed=(3, 4)), task.batch(100, 5, seed=(3, 4))
    assert same(some, TaskBatch(more.tokens[:2], more.asked[:2], more.needed[:2]))
    assert not torch.equal(some.tokens, task.batch(100, 2, seed=(3, 5)).tokens)
    # A seed that another one with a zero behind it must not be.
    assert not torch.equal(task.batch(100, 1, seed=(3, 4)).tokens, task.batch(100, 1, seed=(3, 4, 0)).tokens)


def same(a: TaskBatch, b: TaskBatch) -> bool:
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.asked, b.asked) and torch.equal(a.needed, b.needed)


def test_a_length_of_128k_is_made_on_the_fly() -> None:
    batch = Passkey().batch(131072, 1, seed=0, depth=0.5)
    assert batch.inputs.shape == (1, 131072)
    assert solved(batch, 0, "passkey") == [batch.answer(0)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Passkey().batch(10, 1, seed=0), r"length must be at least 11 for passkey; got 10"),
        (lambda: Passkey().batch(64, 1, seed=0, depth=1.5), r"depth must be from 0 to 1; got 1.5"),
        (lambda: Recall(pairs=4, queries=5), r"Recall queries must be at most the pairs \(4\); got 5"),
        (lambda: Recall(pairs=677), r"Recall pairs must be at most 676"),
        (lambda: Needle(keys=677), r"Needle keys must be at most 676"),
        (lambda: Tracking(hops=200, chains=4), r"Tracking chains must leave a name .*; got 804"),
        (lambda: Copy(span=0), r"Copy span must be an integer >= 1; got 0"),
        (lambda: task_named("chess"), r"task must be one of passkey, needle, recall, copy, tracking; got 'chess'"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
