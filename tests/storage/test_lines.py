"""The journal of a line: what was merged, what was taken back, and who may open it."""

from __future__ import annotations

from hashlib import sha256

import pytest

from storage.errors import Conflict, Damaged, InvalidInput, Missing
from storage.lines import Entry, Line
from storage.objects import MemoryObjects
from storage.refs import CheckpointRef, Ref, StateRef, UpdateRef

MERGER = {"name": "average", "version": 1}


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
    state = StateRef(ref("state", f"{before.state} {task}"))
    return line.fold(before, task, UpdateRef(ref("update", task)), state)


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
        (CheckpointRef(ref("checkpoint", "other")), MERGER, "base"),
        (BASE, {"name": "ties", "version": 1}, "merger"),
        (BASE, {**MERGER, "scale": 0.3}, "merger"),
    ],
    ids=["base", "merger", "settings"],
)
def test_opening_with_something_else_is_refused(line: Line, base: CheckpointRef, merger: dict, what: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(Conflict, match=f"'main' was opened with {what}"):
        line.open(base, merger)
    assert len(list(line.entries())) == 1


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


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"number": 1}', b"\xff"])
def test_an_entry_that_cannot_be_read_is_damaged(line: Line, objects: MemoryObjects, data: bytes) -> None:
    fold(line, "a")
    objects.put("line/main/00000001", data)
    with pytest.raises(Damaged, match="line/main/00000001"):
        line.head()
    with pytest.raises(Damaged, match="line/main/00000001"):
        line.history()
