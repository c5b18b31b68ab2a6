"""Prune: nothing that somebody wants ever goes, whoever writes meanwhile; and what nobody wants does."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.address import open_objects
from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.errors import Damaged, Missing
from storage.lines import Line
from storage.manifest import Lineage
from storage.objects import MemoryObjects
from storage.pins import pin, pins, unpin
from storage.refs import CheckpointRef, Ref, StateRef, UpdateRef, short
from storage.roots import read_journals
from storage.saves import Saves
from storage.sweep import GRACE, Wishes, mark, sweep
from storage.verify import verify
from tests.builders import checkpoint_of, memory_store, update_of
from tests.storage.graphs import MERGER, Graph, graphs, of_kind

LATER = GRACE + 3600.0  # seconds after which nothing that a test wrote is young


def later() -> float:
    return time.time() + LATER


@settings(max_examples=120, deadline=None)
@given(graphs(), st.booleans(), st.booleans(), st.data())
def test_exactly_what_nobody_wants_goes(graph: Graph, states: bool, sources: bool, data: st.DataObject) -> None:
    registered = set(data.draw(st.lists(st.sampled_from(sorted(graph.needs)), max_size=2)))
    roots = graph.bases | graph.pinned | registered | set(of_kind(graph, "scores"))
    updates = {update for folds in graph.lines.values() for update, _ in folds}
    heads = {folds[-1][1] for folds in graph.lines.values() if folds}
    all_states = {state for folds in graph.lines.values() for _, state in folds}
    wanted = graph.reach(roots | updates | (all_states if states else heads))
    if sources:
        wanted |= graph.reach(updates, sources=True)
    before = {name: Line(graph.store.objects, name).history() for name in graph.lines}

    swept = sweep(graph.store, Wishes(states=states, sources=sources, registered=frozenset(registered)), now=later())

    assert set(graph.store.refs()) == wanted
    blobs = {key.partition("/")[2] for key in graph.store.objects.list("blob/")}
    assert blobs == {blob for ref in wanted for blob in graph.blobs[ref]}
    assert set(graph.store.objects.list("memo/")) == {key for key, ref in graph.memos.items() if ref in wanted}
    assert set(graph.store.objects.list("measured/")) == {key for key, ref in graph.measured.items() if ref in wanted}
    assert {one.ref for one in pins(graph.store)} == graph.pinned
    assert swept.harmed == ()
    assert verify(graph.store, graph.store.refs(), journals=read_journals(graph.store.objects).lines).findings == ()
    assert {name: Line(graph.store.objects, name).history() for name in graph.lines} == before
    assert len(mark(graph.store, Wishes(states=states, sources=sources, registered=frozenset(registered)))) == 0


class Killed(MemoryObjects):
    """A store whose pruner is killed after so many deletions."""

    left = 10**9

    def delete(self, key: str) -> None:
        if self.left <= 0:
            raise KeyboardInterrupt
        self.left -= 1
        super().delete(key)


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(0, 12))
def test_killed_at_any_moment_nothing_dangles(graph: Graph, left: int) -> None:
    objects = Killed()
    for one in graph.store.objects.listed(""):
        objects.put(one.key, graph.store.objects.get(one.key))
    objects.left = left
    store, wishes = ArtifactStore(objects), Wishes(states=False, sources=False)
    try:
        sweep(store, wishes, now=later())
    except KeyboardInterrupt:
        assert verify(store, store.refs(), journals=read_journals(objects).lines).findings == ()
    objects.left = 10**9
    sweep(store, wishes, now=later())
    sweep(graph.store, wishes, now=later())
    assert list(objects.list("")) == list(graph.store.objects.list(""))


@pytest.fixture
def store() -> ArtifactStore:
    return memory_store()


def test_what_is_young_stays_and_what_it_needs(store: ArtifactStore) -> None:
    base = checkpoint_of({"a": torch.ones(3)}, store)
    store.write_blob(b"of a draft that is not committed yet")
    found = mark(store, Wishes())
    assert (len(found), len(found.young)) == (0, 3)
    objects = store.objects
    assert isinstance(objects, MemoryObjects)
    for one in list(objects.listed("")):
        objects._written[one.key] -= LATER
    update = update_of({"a": torch.zeros(3)}, base, store)
    kept = {base, update, *(f"blob/{blob}" for ref in (base, update) for blob in store.open(ref).manifest.blobs())}
    assert sweep(store, Wishes()).objects == 1
    assert set(objects.list("")) == kept


def test_what_was_remembered_lately_stays(store: ArtifactStore) -> None:
    """A step that is found done renews its memo: the run that goes on with its ref must find it."""
    objects = store.objects
    assert isinstance(objects, MemoryObjects)
    used, forgotten = (checkpoint_of({"a": torch.full((2,), value)}, store) for value in (1.0, 2.0))
    for key, ref in (("used", used), ("forgotten", forgotten)):
        store.remember(key, ref, {})
    for one in list(objects.listed("")):
        objects._written[one.key] -= LATER
    store.remember("used", used, {})
    sweep(store, Wishes())
    assert list(store.refs()) == [used]
    assert (store.recall("used"), store.recall("forgotten")) == ((used, {}), None)


class Busy(MemoryObjects):
    """A store in which somebody else acts as soon as the first blob is removed."""

    meanwhile: Callable[[], object] | None = None

    def delete(self, key: str) -> None:
        super().delete(key)
        if key.startswith("blob/") and self.meanwhile is not None:
            act, self.meanwhile = self.meanwhile, None
            act()


@pytest.mark.parametrize("again", ["written", "listed"])
def test_somebody_uses_a_blob_while_it_is_swept(again: str) -> None:
    """Written again it is there again. Only listed it is lost: that is found, and the step will be done again."""
    objects = Busy()
    store = ArtifactStore(objects)
    old = checkpoint_of({"a": torch.ones(3)}, store)
    record = store.open(old).record("a")
    newcomers: list[Ref] = []

    def use() -> None:
        draft = store.draft("checkpoint", Lineage("test"))
        if again == "written":
            draft.add("a", {"tensor": torch.ones(3)}, role="bare", dtype="F32", shape=(3,))
        else:
            draft.share(record)
        draft.facts["new"] = True
        newcomers.append(draft.commit())
        store.remember("key", newcomers[0], {})

    objects.meanwhile = use
    swept = sweep(store, Wishes(), now=later())
    assert newcomers
    if again == "written":
        assert swept.harmed == () and store.recall("key") == (newcomers[0], {})
        assert verify(store, newcomers).findings == ()
    else:
        assert swept.harmed == (newcomers[0],) and store.recall("key") is None


def test_what_is_written_again_between_the_look_and_the_removal_stays() -> None:
    """The first blob that goes makes its writer act: the second, which was condemned with it, is written again."""
    objects = Busy()
    store = ArtifactStore(objects)
    old = checkpoint_of({"a": torch.ones(3), "b": torch.zeros(3)}, store)
    blobs = sorted(f"blob/{blob}" for blob in store.open(old).manifest.blobs())
    data = {blob: objects.get(blob) for blob in blobs}

    def again() -> None:
        for blob in blobs:
            objects.put(blob, data[blob])
            objects._written[blob] += LATER  # at the time of the sweep

    objects.meanwhile = again
    sweep(store, Wishes(), now=later())
    assert blobs[1] in set(objects.list("blob/"))


def test_writers_and_a_pruner_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads write artifacts of the very blobs that another thread prunes, over and over; none of them is harmed.

    A day is half a second here, and the grace period three: what is older is made very old, blobs and manifests.
    """
    monkeypatch.setattr("storage.artifacts.FRESH", 0.5)
    store = ArtifactStore(DirectoryObjects(tmp_path))
    values = [torch.full((4,), float(number)) for number in range(40)]
    stop, made = threading.Event(), []

    def write(seed: int) -> None:
        picks = random.Random(seed)
        while not stop.is_set():
            draft = store.draft("checkpoint", Lineage("test"))
            for name in range(5):
                value = picks.choice(values)
                draft.add(f"t{name}", {"tensor": value}, role="bare", dtype="F32", shape=value.shape)
            draft.facts.update({"seed": seed, "number": len(made)})
            made.append(draft.commit())

    def forget() -> None:
        for path in [*tmp_path.glob("blob/*"), *tmp_path.glob("checkpoint/*")]:
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - 3:
                    os.utime(path, (1, 1))

    removed = 0
    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write, seed) for seed in range(2)]
        deadline = time.monotonic() + 8
        while time.monotonic() < deadline:
            forget()
            removed += sweep(store, Wishes(grace=3600)).objects
        stop.set()
        for one in writers:
            one.result()
    assert removed > 20 and len(made) > 20
    assert verify(store, store.refs()).findings == ()


class Merging(MemoryObjects):
    """A store in which somebody else acts right after one key is removed."""

    watched = ""
    act: Callable[[], object]

    def delete(self, key: str) -> None:
        super().delete(key)
        if key == self.watched:
            self.act()


def test_a_merge_that_comes_between_keeps_its_blobs() -> None:
    """An old update that nobody wanted is made again and merged, after the first look and before its blobs go."""
    objects = Merging()
    store = ArtifactStore(objects)
    base = checkpoint_of({"a": torch.ones(3)}, store)
    line = Line(objects, "main")
    head = line.open(base, MERGER)
    update = update_of({"a": torch.zeros(3)}, base, store)
    manifest = objects.get(update)

    def merge() -> None:
        objects.put(update, manifest)
        draft = store.draft("state", Lineage("fold", {"base": base, "update": update}, MERGER))
        draft.facts["updates"] = [update]
        line.fold(head, "a", update, StateRef(draft.commit()))

    objects.watched, objects.act = update, merge
    assert sweep(store, Wishes(), now=later()).harmed == ()
    assert verify(store, store.refs(), journals=read_journals(objects).lines).findings == ()
    assert line.head().update == update


def test_pins(store: ArtifactStore) -> None:
    ref = checkpoint_of({"a": torch.ones(3)}, store)
    with pytest.raises(Missing, match="not pinned"):
        unpin(store, ref)
    with pytest.raises(Missing, match="Only what is there"):
        pin(store, Ref(f"update/{'7' * 64}"))
    pin(store, ref, "the one we ship")
    store.objects.put("pin/notes.txt", b"a stray file")
    assert [(one.ref, one.why) for one in pins(store)] == [(ref, "the one we ship")]
    store.objects.put(f"pin/{ref}", b"{")
    assert [one.ref for one in pins(store)] == [ref]
    assert sweep(store, Wishes(), now=later()).objects == 0
    unpin(store, ref)
    assert sweep(store, Wishes(), now=later()).objects == 2
    assert list(store.refs()) == []


def test_a_base_of_a_pinned_update_stays(store: ArtifactStore) -> None:
    base, other = (checkpoint_of({"a": torch.full((3,), value)}, store) for value in (1.0, 2.0))
    update = update_of({"a": torch.zeros(3)}, base, store)
    pin(store, update)
    sweep(store, Wishes(), now=later())
    assert set(store.refs()) == {base, update}
    assert not store.has(other)


def test_where_nobody_can_tell_what_is_needed_nothing_goes(store: ArtifactStore) -> None:
    base = checkpoint_of({"a": torch.ones(3)}, store)
    checkpoint_of({"a": torch.zeros(3)}, store)
    Line(store.objects, "main").open(base, MERGER)
    good = store.objects.get(base)
    store.objects.put(base, good[:-1])
    before = list(store.objects.list(""))
    with pytest.raises(Damaged, match=f"what {short(base)} needs"):
        sweep(store, Wishes(), now=later())
    store.objects.put(base, good)
    store.objects.put("line/main/00000001", b"{")
    with pytest.raises(Damaged, match="line/main cannot be read"):
        sweep(store, Wishes(), now=later())
    assert list(store.objects.list("")) == [*before[:-1], "line/main/00000000", "line/main/00000001"]


def test_what_is_not_ours_stays(store: ArtifactStore) -> None:
    for key in ("notes/readme.txt", "update/README", "table/x", "line/main.txt"):
        store.objects.put(key, b"somebody's")
    store.objects.delete("line/main.txt")
    sweep(store, Wishes(grace=0), now=later())
    assert list(store.objects.list("")) == ["notes/readme.txt", "table/x", "update/README"]


def test_saves_of_trainings_that_were_given_up_go_after_the_grace_period(store: ArtifactStore) -> None:
    saves = Saves(store.objects, "a" * 64)
    saves.write(10, {"epoch": 0.5}, {"weight": torch.ones(3)})
    keys = set(store.objects.list("training/"))
    young = mark(store, Wishes())
    assert not young.memos
    assert {one.key for one in young.young} == keys
    assert saves.newest() is not None
    later = time.time() + GRACE + 60
    assert {one.key for one in mark(store, Wishes(), now=later).memos} == keys
    sweep(store, Wishes(), now=later)
    assert saves.newest() is None
    assert not list(store.objects.list("training/"))


def test_on_an_s3_server(s3_url: str) -> None:
    store = ArtifactStore(open_objects(s3_url))
    base = checkpoint_of({"a": torch.ones(3)}, store)
    update = update_of({"a": torch.zeros(3)}, base, store)
    lost = update_of({"a": torch.full((3,), 2.0)}, base, store)
    line = Line(store.objects, "main")
    line.open(CheckpointRef(base), MERGER)
    store.remember("lost", lost, {})
    pin(store, UpdateRef(update))
    assert len(mark(store, Wishes())) == 0  # all is young
    assert len(mark(store, Wishes(), now=later())) == 3  # a memo, an update, a blob
    assert sweep(store, Wishes(), now=later()).objects == 3
    assert set(store.refs()) == {base, update}
    assert verify(store, store.refs(), journals=read_journals(store.objects).lines).findings == ()
