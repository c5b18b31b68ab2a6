"""The journal of a line: what was merged, what was taken back, and who may open it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest

from storage.errors import Conflict, Damaged, InvalidInput, Missing
from storage.lines import Entry, Fold, Line
from storage.objects import MemoryObjects
from storage.options import rebuild_options
from storage.refs import CheckpointRef, Ref, StateRef, UpdateRef

MERGER = {"name": "average", "version": 1}
TIES = {"name": "ties", "version": 1, "density": 0.2}


def ref(kind: str, text: str) -> Ref:
    """A well-formed ref that stands for `text`; lines do not look behind the refs they are given."""
    return Ref(f"{kind}/{sha256(text.encode()).hexdigest()}")


BASE = CheckpointRef(ref("checkpoint", "base"))


@pytest.fixture
def objects() -> MemoryObjects:
    return MemoryObjects()


@pytest.fixture
def line(objects: MemoryObjects) -> Line:
    line = Line(objects, "main")
    line.open(BASE, MERGER)
    return line


def fold(line: Line, task: str) -> Entry:
    """Merge `task` onto the head. The state's ref follows from everything merged before, as a real one does."""
    before = line.head()
    state = state_of(before.state, task, 1.0, before.merger)
    return line.fold(before, task, UpdateRef(ref("update", task)), state)


def state_of(before: StateRef | None, task: str, weight: float, merger: Mapping[str, Any]) -> StateRef:
    return StateRef(ref("state", f"{before} {task} {weight} {sorted(merger.items())}"))


def merged(line: Line) -> str:
    return "".join(entry.task for entry in line.history())


def test_a_new_line_holds_its_base_and_merger(line: Line) -> None:
    head = line.head()
    assert (head.number, head.action, head.step, head.state) == (0, "open", 0, None)
    assert (head.base, dict(head.merger)) == (BASE, MERGER)
    assert line.history() == []


def test_folds_are_numbered_and_kept_in_order(line: Line) -> None:
    made = [fold(line, task) for task in "abc"]
    assert [(entry.number, entry.step, entry.task) for entry in made] == [(1, 1, "a"), (2, 2, "b"), (3, 3, "c")]
    assert merged(line) == "abc"
    assert line.head().state == made[-1].state
    assert [entry.action for entry in line.entries()] == ["open", "fold", "fold", "fold"]
    assert all(entry.at for entry in line.entries())


def test_more_than_ten_entries_are_in_order(line: Line) -> None:
    for task in "abcdefghijkl":
        fold(line, task)
    assert (merged(line), line.head().number) == ("abcdefghijkl", 12)


def test_rolling_back_appends(line: Line) -> None:
    first, *_ = [fold(line, task) for task in "abc"]
    back = line.rollback(first, "b hurt a")
    assert (back.number, back.step, back.state, back.why) == (4, 1, first.state, "b hurt a")
    assert line.head().state == first.state
    assert merged(line) == "a"
    assert len(list(line.entries())) == 5


def test_folding_goes_on_from_where_it_was_rolled_back(line: Line) -> None:
    first, *_ = [fold(line, task) for task in "abc"]
    line.rollback(first, "")
    assert fold(line, "d").step == 2
    assert merged(line) == "ad"


def test_rolling_back_to_the_beginning(line: Line) -> None:
    beginning = line.head()
    fold(line, "a")
    back = line.rollback(beginning, "start again")
    assert (back.state, back.step) == (None, 0)
    assert merged(line) == ""
    fold(line, "b")
    assert merged(line) == "b"


def test_rolling_back_to_what_was_rolled_back(line: Line) -> None:
    """The history is that of the state, not a prefix of whatever was merged last."""
    first, second = fold(line, "a"), fold(line, "b")
    line.rollback(first, "")
    third = fold(line, "c")
    line.rollback(second, "b was better than c")
    assert (merged(line), line.head().state) == ("ab", second.state)
    line.rollback(third, "no, it was not")
    assert (merged(line), line.head().state) == ("ac", third.state)
    fold(line, "d")
    assert merged(line) == "acd"


def test_opening_again_finds_the_line(line: Line, objects: MemoryObjects) -> None:
    fold(line, "a")
    assert Line(objects, "main").open(BASE, MERGER).number == 0
    assert merged(Line(objects, "main")) == "a"


@pytest.mark.parametrize(
    ("base", "merger", "what"),
    [
        (CheckpointRef(ref("checkpoint", "other")), MERGER, "opened with base"),
        (BASE, {"name": "ties", "version": 1, "density": 0.2}, r"rebuild main --merger ties --set density=0\.2`"),
        (BASE, {**MERGER, "scale": 0.3}, r"rebuild main --set scale=0\.3`"),
        (BASE, {**MERGER, "version": 2}, "rebuild main`"),
        (BASE, {**MERGER, "scaling": {"name": "lines", "version": 1, "rule": "multi"}}, "--scaling lines --set"),
    ],
    ids=["base", "merger", "settings", "version", "scaling"],
)
def test_opening_with_something_else_is_refused(line: Line, base: CheckpointRef, merger: dict, what: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(Conflict, match=what):
        line.open(base, merger)
    assert len(list(line.entries())) == 1


def rebuild(
    line: Line, tasks: str, merger: Mapping[str, Any] = MERGER, weights: Mapping[str, float] | None = None
) -> Entry:
    """Merge `tasks` again, in this order."""
    folds: list[Fold] = []
    for task in tasks:
        weight = (weights or {}).get(task, 1.0)
        before = folds[-1].state if folds else None
        folds.append(Fold(task, UpdateRef(ref("update", task)), state_of(before, task, weight, merger), weight))
    return line.rebuild(line.head(), merger, folds)


def test_a_rebuild_is_one_more_entry_with_all_that_it_merged(line: Line) -> None:
    for task in "abc":
        fold(line, task)
    made = line.rebuild(
        line.head(), TIES, [Fold("c", UpdateRef(ref("update", "c")), StateRef(ref("state", "c")))], "why"
    )
    assert (made.number, made.action, made.step, made.task, made.why) == (4, "rebuild", 1, "c", "why")
    head = line.head()
    assert head == made
    assert (head.state, dict(head.merger)) == (made.folds[-1].state, TIES)
    assert merged(line) == "c"
    assert [entry.action for entry in line.entries()] == ["open", "fold", "fold", "fold", "rebuild"]


def test_a_line_goes_on_after_a_rebuild(line: Line) -> None:
    for task in "abc":
        fold(line, task)
    rebuild(line, "ca", TIES)
    added = fold(line, "d")
    assert (added.step, dict(added.merger)) == (3, TIES)
    assert merged(line) == "cad"


def test_rolling_back_over_a_rebuild_and_into_it(line: Line) -> None:
    for task in "abc":
        fold(line, task)
    before = line.head()
    rebuild(line, "cab", TIES)
    inside = line.history()[1]
    line.rollback(before, "it was better")
    assert (merged(line), dict(line.head().merger)) == ("abc", MERGER)
    line.rollback(inside, "or not")
    assert (merged(line), dict(line.head().merger), line.head().step) == ("ca", TIES, 2)
    assert fold(line, "d").step == 3
    assert merged(line) == "cad"


def test_states_that_stay_keep_their_entries(line: Line) -> None:
    """So that what was registered of them is found again."""
    for task in "abcd":
        fold(line, task)
    rebuild(line, "abd")
    assert [(entry.task, entry.number, entry.step) for entry in line.history()] == [
        ("a", 1, 1),
        ("b", 2, 2),
        ("d", 5, 3),
    ]


def test_weights_are_kept(line: Line) -> None:
    before = line.head()
    line.fold(before, "a", UpdateRef(ref("update", "a")), StateRef(ref("state", "a")), 0.5)
    assert [entry.weight for entry in line.history()] == [0.5]
    rebuild(line, "ba", weights={"a": 2.0})
    assert [(entry.task, entry.weight) for entry in line.history()] == [("b", 1.0), ("a", 2.0)]
    assert line.head().weight == 2.0
    first = line.history()[0]
    line.rollback(line.history()[1], "the same")
    assert line.head().weight == 2.0
    line.rollback(first, "")
    assert line.head().weight == 1.0


def test_factors_are_kept(line: Line) -> None:
    update, state = UpdateRef(ref("update", "a")), StateRef(ref("state", "a"))
    first = line.fold(line.head(), "a", update, state, 1.0, 0.5)
    second = line.fold(first, "b", UpdateRef(ref("update", "b")), StateRef(ref("state", "b")), 1.0, 2.0)
    assert [entry.factor for entry in line.history()] == [0.5, 2.0]
    assert line.rollback(first, "").factor == 0.5
    assert line.rollback(second, "").factor == 2.0
    assert [entry.fold for entry in line.history()] == [first.fold, second.fold]
    line.rebuild(line.head(), MERGER, [first.fold])
    assert line.head().factor == 0.5
    assert [(entry.number, entry.factor) for entry in line.history()] == [(1, 0.5)], "nothing new, so the old entry"


def test_one_state_with_two_factors_is_two_places_to_go_back_to(line: Line) -> None:
    beginning = line.head()
    update, state = UpdateRef(ref("update", "a")), StateRef(ref("state", "a"))
    small = line.fold(beginning, "a", update, state, 1.0, 0.5)
    line.rollback(beginning, "search again")
    large = line.fold(line.head(), "a", update, state, 1.0, 2.0)
    for wanted in (small, large, small):
        assert line.rollback(wanted, "").factor == wanted.factor
        assert line.history() == [wanted]
    line.rebuild(line.head(), MERGER, [replace(small.fold, factor=3.0)])
    assert [(entry.number, entry.factor) for entry in line.history()] == [(line.head().number, 3.0)]


def test_another_factor_that_came_first_is_a_conflict(line: Line) -> None:
    before, update, state = line.head(), UpdateRef(ref("update", "a")), StateRef(ref("state", "a"))
    line.fold(before, "a", update, state, 1.0, 0.5)
    with pytest.raises(Conflict, match="entry 1 already holds update/"):
        line.fold(before, "a", update, state, 1.0, 2.0)


def test_a_rebuilt_line_opens_with_the_merger_that_it_has_now(line: Line) -> None:
    fold(line, "a")
    rebuild(line, "a", TIES)
    line.open(BASE, TIES)
    with pytest.raises(Conflict, match=r"merges with .*'ties'.*line rebuild main --merger average`"):
        line.open(BASE, MERGER)
    line.rollback(line.history()[0], "")
    line.open(BASE, TIES)
    line.open(BASE, MERGER, [TIES])
    with pytest.raises(Conflict, match="merges with"):
        line.open(BASE, MERGER, [{**TIES, "density": 0.5}])


def steps(line: Line) -> list[tuple[str, int, str, Any]]:
    return [(one.task, one.number, one.action, one.merger["name"]) for one in line.steps()]


def test_without_rebuilds_that_bring_an_update_the_steps_are_the_history(line: Line) -> None:
    first, *_ = [fold(line, task) for task in "abcd"]
    assert line.steps() == line.history()
    rebuild(line, "acd", TIES)
    assert line.steps() == line.history()
    rebuild(line, "ad")
    assert line.steps() == line.history()
    line.rollback(first, "")
    assert line.steps() == line.history() == [first]


def test_a_rebuild_that_brings_an_update_is_the_step_of_that_update(line: Line) -> None:
    """It merged the others again, but they came in before."""
    for task in "ab":
        fold(line, task)
    brought = rebuild(line, "abc", TIES)
    assert [(one.number, one.merger["name"]) for one in line.history()] == [(3, "ties")] * 3
    assert steps(line) == [("a", 1, "fold", "average"), ("b", 2, "fold", "average"), ("c", 3, "rebuild", "ties")]
    assert line.steps()[-1] == brought == line.entry(3)
    last = fold(line, "d")
    assert line.steps()[2:] == [brought, last]
    assert merged(line) == "abcd"

    inside = line.history()[1]
    line.rollback(inside, "c and d were harmful")
    assert steps(line) == [("a", 3, "fold", "ties"), ("b", 3, "fold", "ties")]
    line.rollback(last, "they were not")
    assert line.steps()[2:] == [brought, last]
    rebuild(line, "abc", TIES)
    assert line.steps()[2:] == [brought], "that state is known, and so is how it came to be"
    rebuild(line, "abc")
    assert [one.number for one in line.steps()] == [1, 2, 8]
    with pytest.raises(Missing, match="has no entry 9"):
        line.entry(9)


def test_the_first_update_of_a_line_may_come_in_by_a_rebuild(line: Line) -> None:
    brought = rebuild(line, "a", TIES)
    assert line.steps() == [brought]
    assert [one.action for one in line.history()] == ["fold"]


@pytest.mark.parametrize("how", ["fold", "rollback", "rebuild"])
def test_a_rebuild_that_came_too_late_is_refused(line: Line, how: str) -> None:
    first = fold(line, "a")
    before = fold(line, "b")
    if how == "fold":
        fold(line, "c")
    elif how == "rollback":
        line.rollback(first, "")
    else:
        rebuild(line, "b")
    held = list(line.entries())
    with pytest.raises(Conflict, match="entry 3 already holds update/"):
        line.rebuild(before, MERGER, [first.fold])
    assert list(line.entries()) == held


def test_a_rollback_does_not_undo_what_it_has_not_seen(line: Line) -> None:
    first, seen = fold(line, "a"), fold(line, "b")
    fold(line, "c")
    with pytest.raises(Conflict):
        line.rollback(first, "", after=seen)
    assert merged(line) == "abc"


def test_the_same_rebuild_again_is_no_second_one(line: Line) -> None:
    before = fold(line, "a")
    made = line.rebuild(before, TIES, [before.fold], "once")
    assert line.rebuild(before, TIES, [before.fold], "once more") == made
    assert len(list(line.entries())) == 3


def test_a_rebuild_of_nothing_is_refused(line: Line) -> None:
    with pytest.raises(InvalidInput, match="at least one update"):
        line.rebuild(fold(line, "a"), MERGER, [])


def test_entries_of_earlier_versions_are_read(line: Line, objects: MemoryObjects) -> None:
    """As they were written before entries had weights, and before there were rebuilds."""
    update, state = ref("update", "a"), ref("state", "a")
    written = (
        f'{{"action":"fold","at":"2025-11-03T10:00:00+00:00","base":"{BASE}","merger":{{"name":"average","version":1}},'
        f'"number":1,"state":"{state}","step":1,"task":"a","update":"{update}","why":""}}'
    )
    objects.put("line/main/00000001", written.encode())
    assert line.head() == Entry(
        1, "fold", BASE, MERGER, 1, "a", UpdateRef(update), StateRef(state), at="2025-11-03T10:00:00+00:00"
    )
    assert line.history()[0].fold == Fold("a", UpdateRef(update), StateRef(state), 1.0)
    rebuild(line, "ba")
    assert merged(line) == "ba"
    lately = objects.get("line/main/00000002").replace(b'"factor":1.0,', b"")  # weights and rebuilds, but no factors
    assert b"factor" not in lately
    before = line.head()
    objects.put("line/main/00000002", lately)
    assert line.head() == before
    assert [entry.factor for entry in line.history()] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("held", "wanted", "options"),
    [
        (MERGER, TIES, "--merger ties --set density=0.2"),
        (TIES, {**TIES, "density": 0.5}, "--set density=0.5"),
        (TIES, {**TIES, "version": 2}, ""),
        (TIES, {**TIES, "beta": None, "parts": [1, 2]}, "--set beta=null --set 'parts=[1, 2]'"),
        (
            TIES,
            {**TIES, "sparsify": {"name": "dare", "version": 1, "seed": 3}},
            "--sparsify dare --set sparsify.seed=3",
        ),
        ({**TIES, "scaling": {"name": "lines", "version": 1}}, TIES, "--scaling none"),
    ],
)
def test_options_that_lead_from_one_merger_to_another(
    held: dict[str, Any], wanted: dict[str, Any], options: str
) -> None:
    assert rebuild_options(held, wanted) == options


def test_a_merge_that_came_too_late_is_refused(line: Line) -> None:
    before = line.head()
    fold(line, "a")
    with pytest.raises(Conflict, match="entry 1 already holds update/"):
        line.fold(before, "b", UpdateRef(ref("update", "b")), StateRef(ref("state", "b")))
    assert merged(line) == "a"


def test_the_same_merge_again_is_no_second_one(line: Line) -> None:
    """A lost answer is repeated blindly."""
    before = line.head()
    first = fold(line, "a")
    assert first.update and first.state
    line.fold(before, "a", first.update, first.state)
    assert merged(line) == "a"


def test_lines_do_not_see_each_other(line: Line, objects: MemoryObjects) -> None:
    other = Line(objects, "main-2")
    other.open(BASE, {"name": "ties", "version": 1})
    fold(line, "a")
    assert (other.head().number, merged(other)) == (0, "")
    assert Line.names(objects) == ["main", "main-2"]


def test_a_line_that_is_not_there_is_missing(line: Line, objects: MemoryObjects) -> None:
    with pytest.raises(Missing, match=r"no line 'mian'.*main"):
        Line(objects, "mian").head()


@pytest.mark.parametrize("name", ["", "Main", "a/b", "../a", "a b", "-a", "ä", "a.b", "a\n"])
def test_names_that_are_none(objects: MemoryObjects, name: str) -> None:
    with pytest.raises(InvalidInput, match="not a line name"):
        Line(objects, name)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"{}", b'{"number": 1}', b"\xff", b'{"folds": [1]}', b'{"folds": 1}']
)
def test_an_entry_that_cannot_be_read_is_damaged(line: Line, objects: MemoryObjects, data: bytes) -> None:
    fold(line, "a")
    objects.put("line/main/00000001", data)
    with pytest.raises(Damaged, match="line/main/00000001"):
        line.head()
    with pytest.raises(Damaged, match="line/main/00000001"):
        line.history()


def test_an_action_of_a_later_version_is_not_passed_over(line: Line, objects: MemoryObjects) -> None:
    fold(line, "a")
    data = objects.get("line/main/00000001").replace(b'"fold"', b'"squash"')
    objects.put("line/main/00000001", data)
    with pytest.raises(Damaged, match="'squash', which this version does not know"):
        line.history()


def test_going_back_to_what_never_was_is_damaged(line: Line) -> None:
    other = replace(fold(line, "a"), state=StateRef(ref("state", "elsewhere")))
    line.rollback(other, "")
    with pytest.raises(Damaged, match="line/main/00000002 goes back to state/"):
        line.history()


def test_an_entry_that_nobody_could_read_is_not_written() -> None:
    line = Line(MemoryObjects(), "a")
    head = line.open(BASE, MERGER)
    state = state_of(None, "a", 1.0, MERGER)
    for task, weight in (("two\nlines", 1.0), ("x", float("nan"))):
        with pytest.raises(InvalidInput, match="line 'a', entry 1"):
            line.fold(head, task, UpdateRef(ref("update", "a")), state, weight)
    assert line.head() == head
