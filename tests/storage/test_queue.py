"""The queue of a line: what waits, in which order, and that no crash loses or doubles anything."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from storage.address import open_objects
from storage.artifacts import ArtifactStore
from storage.errors import Conflict, Damaged, InvalidInput
from storage.objects import MemoryObjects, ObjectStore
from storage.pins import pin, unpin
from storage.queue import Queue
from storage.refs import CheckpointRef
from storage.roots import read_journals
from storage.sweep import Wishes, sweep
from storage.transfer import mirror
from tests.builders import checkpoint_of, memory_store, random_tensors
from tests.storage.queueing import check, content, play
from tests.storage.test_lines import BASE

NAMES = "abcde"


@pytest.fixture(params=["memory", "folder", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "s3":
        return open_objects(request.getfixturevalue("s3_url"))
    return MemoryObjects() if request.param == "memory" else open_objects(str(tmp_path / "store"))


def filled(objects: ObjectStore, names: str = "abc") -> Queue:
    queue = Queue(objects, "main")
    for name in names:
        queue.submit(content(name), f"/inbox/{name}", BASE, name)
    return queue


def states(queue: Queue) -> dict[str, str]:
    return {one.task: one.state for one in queue.submissions()}


def test_what_is_submitted_waits_in_its_order_once(objects: ObjectStore) -> None:
    queue = filled(objects)
    again, is_new = Queue(objects, "main").submit(content("b"), "/elsewhere", BASE, "other", 2.0)
    assert (again.task, again.reference, again.weight, is_new) == ("b", "/inbox/b", 1.0, False)
    assert [one.task for one in queue.submissions()] == ["a", "b", "c"]
    first = Queue(objects, "main").next()
    assert first is not None and first.task == "a" and first.arrived


def test_a_life(objects: ObjectStore) -> None:
    queue = filled(objects)
    assert queue.start(content("a"), by="run 1").by == "run 1"
    assert queue.merge(content("a"), 7)
    assert not queue.merge(content("a"), 7)
    queue.start(content("b"))
    assert queue.quarantine(content("b"), "Mismatch", "wrong\n  base")
    assert not queue.quarantine(content("a"), "Mismatch", "too late: it is merged")
    assert states(Queue(objects, "main")) == {"a": "merged", "b": "quarantined", "c": "pending"}
    kept = Queue(objects, "main").find(content("b"))
    assert kept is not None and (kept.kind, kept.why) == ("Mismatch", "wrong base")
    queue.requeue(content("b"), "the base was ingested", "/moved/b")
    assert [one.task for one in queue.submissions()] == ["a", "c", "b"], "what comes back goes to the end"
    back = queue.find(content("b"))
    assert back is not None and (back.state, back.reference, back.tries) == ("pending", "/moved/b", 0)
    queue.discard(content("c"), "not wanted")
    assert states(queue) == {"a": "merged", "b": "pending", "c": "discarded"}
    for wrong in ("requeue", "discard", "start"):
        with pytest.raises(Conflict, match="is merged"):
            getattr(queue, wrong)(content("a"))
    with pytest.raises(Conflict, match="no submission"):
        queue.discard(content("x"))


def test_a_run_that_died_leaves_its_submission_to_the_next_one() -> None:
    objects = MemoryObjects()
    queue = filled(objects)
    for tries in (1, 2):
        one = Queue(objects, "main").next()
        assert one is not None and one.task == "a"
        assert Queue(objects, "main").start(one.content).tries == tries
    assert queue.release(content("a"), "the store was away")
    found = queue.find(content("a"))
    assert found is not None and (found.state, found.tries, found.why) == ("pending", 0, "the store was away")
    assert not queue.release(content("a"), "again")


def test_others_are_told_once_and_again_after_a_requeue() -> None:
    queue = filled(MemoryObjects(), "a")
    assert [queue.announce(content("a")) for _ in range(3)] == [True, False, False]
    queue.quarantine(content("a"), "InvalidInput", "")
    queue.requeue(content("a"))
    assert queue.announce(content("a"))


def test_the_policy_is_kept_until_somebody_sets_another() -> None:
    queue = Queue(MemoryObjects(), "main")
    assert queue.policy() == {}
    assert queue.keep_policy({"codec": {"name": "dense"}}) == {"codec": {"name": "dense"}}
    assert queue.keep_policy({"codec": {"name": "ternary"}}) == {"codec": {"name": "dense"}}
    queue.set_policy({"codec": {"name": "ternary"}})
    queue.set_policy({"codec": {"name": "ternary"}})
    assert (queue.policy(), queue.count) == ({"codec": {"name": "ternary"}}, 2)


def test_submitting_the_same_at_the_same_time_is_submitting_it_once(objects: ObjectStore) -> None:
    gate = threading.Barrier(6)
    new: list[bool] = []

    def submit(number: int) -> None:
        queue = Queue(objects, "main")
        gate.wait()
        new.append(queue.submit(content("same"), f"/from/{number}", BASE, "same")[1])
        queue.submit(content(str(number)), f"/from/{number}", BASE, str(number))

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(new) == [False] * 5 + [True]
    assert len(Queue(objects, "main").submissions()) == 7


@pytest.mark.parametrize(
    "wrong",
    [
        {"content": "abc"},
        {"base": "update/" + "0" * 64},
        {"task": ""},
        {"task": "a\x1b[2Jb"},
        {"reference": ""},
        {"weight": 0.0},
        {"weight": float("nan")},
    ],
)
def test_what_cannot_be_is_refused_before_it_is_written(wrong: dict[str, object]) -> None:
    objects = MemoryObjects()
    given = {"content": content("a"), "reference": "/a", "base": BASE, "task": "a", "weight": 1.0, **wrong}
    with pytest.raises(InvalidInput):
        Queue(objects, "main").submit(**given)  # type: ignore[arg-type]
    assert list(objects.list("")) == []
    with pytest.raises(InvalidInput, match="not a queue name"):
        Queue(objects, "../main")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"number": 1}, "says that it is event 1"),
        ({"action": "burn"}, "does not know"),
        ({"action": "merge"}, "which is unknown"),
        ({"more": 1}, "not an event"),
        ({"task": "\x1b"}, "not an event"),
    ],
)
def test_events_that_do_not_fit_are_damage_and_stop_a_prune(change: dict[str, object], said: str) -> None:
    store = memory_store()
    filled(store.objects, "a")
    event = json.loads(store.objects.get("queue/main/00000000"))
    store.objects.put("queue/main/00000000", json.dumps({**event, **change}).encode())
    with pytest.raises(Damaged, match=said):
        Queue(store.objects, "main").submissions()
    with pytest.raises(Damaged, match="the prune stops"):
        sweep(store, Wishes(grace=0))


def test_a_gap_is_damage() -> None:
    objects = MemoryObjects()
    filled(objects, "abc")
    objects.delete("queue/main/00000001")
    with pytest.raises(Damaged, match="00000001 is missing"):
        Queue(objects, "main").submissions()


def waiting(store: ArtifactStore) -> tuple[CheckpointRef, CheckpointRef]:
    """A line's base, and a checkpoint in the store that waits to be merged into it."""
    base, tuned = (checkpoint_of(random_tensors(seed), store) for seed in (0, 1))
    Queue(store.objects, "main").submit(content("a"), tuned, base, "a")
    return base, tuned


def test_a_prune_leaves_what_waits() -> None:
    store = memory_store()
    base, tuned = waiting(store)
    queue = Queue(store.objects, "main")
    for act in (lambda: None, lambda: queue.quarantine(content("a"), "Mismatch", "")):
        act()
        sweep(store, Wishes(grace=0))
        assert store.has(base) and store.has(tuned)
    queue.discard(content("a"))
    pin(store, base)
    sweep(store, Wishes(grace=0))
    assert store.has(base) and not store.has(tuned)
    unpin(store, base)


def test_a_mirror_has_the_queue_too() -> None:
    store, copy = memory_store(), memory_store()
    _, tuned = waiting(store)
    mirror(store, copy)
    assert copy.has(tuned)
    assert Queue(copy.objects, "main").submissions() == Queue(store.objects, "main").submissions()
    assert [one.path for one in read_journals(copy.objects).queues] == ["queue/main"]


class Life(RuleBasedStateMachine):
    """The model: state and order of every submission. Two handles take turns, as two processes would."""

    contents = st.sampled_from(NAMES)
    which = st.integers(0, 1)

    @initialize()
    def begin(self) -> None:
        objects = MemoryObjects()
        self.handles = [Queue(objects, "main"), Queue(objects, "main")]
        self.order: list[str] = []
        self.states: dict[str, str] = {}

    @rule(name=contents, which=which)
    def submit(self, name: str, which: int) -> None:
        _, is_new = self.handles[which].submit(content(name), f"/{name}", BASE, name)
        assert is_new == (name not in self.states)
        if is_new:
            self.order.append(name)
            self.states[name] = "pending"

    @rule(name=contents, which=which, action=st.sampled_from(["start", "requeue", "discard"]))
    def move(self, name: str, which: int, action: str) -> None:
        to, of = {
            "start": ("running", ("pending", "running")),
            "requeue": ("pending", ("quarantined", "discarded")),
            "discard": ("discarded", ("pending", "running", "quarantined")),
        }[action]
        act = getattr(self.handles[which], action)
        if self.states.get(name) not in of:
            with pytest.raises(Conflict):
                act(content(name))
            return
        act(content(name))
        self.states[name] = to
        if action == "requeue":
            self.order.remove(name)
            self.order.append(name)

    @rule(name=contents, which=which, action=st.sampled_from(["merge", "quarantine", "release"]))
    def end(self, name: str, which: int, action: str) -> None:
        to, of, more = {
            "merge": ("merged", ("pending", "running", "quarantined", "discarded"), (1,)),
            "quarantine": ("quarantined", ("pending", "running"), ("Mismatch", "why")),
            "release": ("pending", ("running",), ("why",)),
        }[action]
        fits = self.states.get(name) in of
        assert getattr(self.handles[which], action)(content(name), *more) == fits
        if fits:
            self.states[name] = to

    @invariant()
    def both_see_the_same(self) -> None:
        for handle in self.handles:
            found = handle.submissions()
            assert [one.task for one in found] == self.order
            assert {one.task: one.state for one in found} == self.states
            first = next((name for name in self.order if self.states[name] in ("pending", "running")), None)
            ahead = handle.next()
            assert (ahead.task if ahead else None) == first


Life.TestCase.settings = settings(max_examples=100, stateful_step_count=20, deadline=None)
TestLife = Life.TestCase


def test_schedules_in_a_folder(tmp_path: Path) -> None:
    """Twelve, and more until six processes were killed: how many are still at work then depends on the disk."""
    killed = seed = 0
    while seed < 12 or killed < 6:
        assert seed < 60, f"of 60 schedules, {killed} processes were killed at work"
        killed += play(f"file://{tmp_path}", f"line-{seed}", seed)
        check(f"file://{tmp_path}", f"line-{seed}")
        seed += 1


def test_schedules_on_s3(s3_url: str) -> None:
    for seed in range(100, 103):
        play(s3_url, f"line-{seed}", seed)
        check(s3_url, f"line-{seed}")


@pytest.mark.slow
def test_hundreds_of_schedules_in_a_folder(tmp_path: Path) -> None:
    for seed in range(1000, 1200):
        play(f"file://{tmp_path}", f"line-{seed}", seed)
        check(f"file://{tmp_path}", f"line-{seed}")
