"""Copies and mirrors are equal to what they were made of, whatever was there before and whenever they were killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.address import open_objects
from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.errors import Conflict, Damaged, Missing
from storage.lines import Line
from storage.objects import MemoryObjects, ObjectStore
from storage.pins import pin
from storage.refs import CheckpointRef, short
from storage.roots import read_journals
from storage.transfer import copy, mirror
from storage.verify import verify
from tests.builders import checkpoint_of, memory_store, update_of
from tests.storage.graphs import MERGER, Graph, graphs


def content(objects: ObjectStore, prefix: str = "") -> dict[str, bytes]:
    return {key: objects.get(key) for key in objects.list(prefix)}


@settings(max_examples=80, deadline=None)
@given(graphs(), st.data())
def test_a_copy_is_the_artifact_and_all_it_needs(graph: Graph, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(sorted(graph.needs)), min_size=1, max_size=3))
    target = memory_store()
    sent = copy(chosen, graph.store, target)
    wanted = graph.reach(chosen)
    keys = wanted | {f"blob/{blob}" for ref in wanted for blob in graph.blobs[ref]}
    assert content(target.objects) == {key: graph.store.objects.get(key) for key in keys}
    assert (sent.objects, sent.bytes) == (len(keys), sum(len(graph.store.objects.get(key)) for key in keys))
    again = copy(chosen, graph.store, target)
    assert (again.objects, again.bytes, again.held) == (0, 0, len(keys))


@settings(max_examples=40, deadline=None)
@given(graphs())
def test_a_mirror_has_everything_that_something_names(graph: Graph) -> None:
    target = memory_store()
    sent = mirror(graph.store, target)
    expected = content(graph.store.objects)
    loose = [key for key, data in expected.items() if data.startswith(b"loose")]
    assert content(target.objects) == {key: data for key, data in expected.items() if key not in loose}
    assert sent.left_out == ()
    assert sent.entries == len([key for key in expected if key.startswith("line/")])
    again = mirror(graph.store, target)
    assert (again.objects, again.entries) == (0, 0)


class Killed(MemoryObjects):
    """A store whose writer is killed after so many objects."""

    left = 10**9

    def put(self, key: str, data: bytes) -> None:
        self._count()
        super().put(key, data)

    def create(self, key: str, data: bytes) -> bool:
        self._count()
        return super().create(key, data)

    def _count(self) -> None:
        if self.left <= 0:
            raise KeyboardInterrupt
        self.left -= 1


@settings(max_examples=50, deadline=None)
@given(graphs(), st.integers(0, 40))
def test_killed_at_any_moment_it_goes_on(graph: Graph, left: int) -> None:
    objects = Killed()
    objects.left = left
    target = ArtifactStore(objects)
    try:
        mirror(graph.store, target)
    except KeyboardInterrupt:
        assert verify(target, target.refs(), journals=read_journals(objects).lines).findings == ()
    objects.left = 10**9
    mirror(graph.store, target)
    undisturbed = memory_store()
    mirror(graph.store, undisturbed)
    assert content(objects) == content(undisturbed.objects)


@pytest.fixture
def store() -> ArtifactStore:
    return memory_store()


def test_what_is_damaged_is_not_copied(store: ArtifactStore) -> None:
    base = checkpoint_of({"a": torch.ones(3), "b": torch.zeros(3)}, store)
    update = update_of({"a": torch.full((3,), 7.0)}, base, store)
    blob = f"blob/{store.open(base).record('a').blob}"
    good = store.objects.get(blob)
    store.objects.put(blob, good[:-1] + b"#")
    target = memory_store()
    with pytest.raises(Damaged, match=f"{blob} is damaged"):
        copy([update], store, target)
    assert list(target.refs()) == []
    store.objects.delete(blob)
    with pytest.raises(Damaged, match=blob):
        copy([update], store, target)
    store.objects.put(blob, good)
    store.objects.delete(base)
    with pytest.raises(Missing, match=base):
        copy([update], store, target)
    assert list(target.refs()) == []


def test_a_mirror_leaves_out_what_is_damaged_and_what_needs_it(store: ArtifactStore) -> None:
    bases = [checkpoint_of({"a": torch.full((3,), value)}, store) for value in (1.0, 2.0)]
    updates = [update_of({"a": torch.full((3,), 7.0)}, base, store) for base in bases]
    for name, base in zip(("bad", "good"), bases, strict=True):
        Line(store.objects, name).open(base, MERGER)
    pin(store, updates[0])
    blob = f"blob/{store.open(bases[0]).record('a').blob}"
    store.objects.put(blob, b"?")
    target = memory_store()
    sent = mirror(store, target)
    assert set(target.refs()) == {bases[1], updates[1]}
    assert Line.names(target.objects) == ["good"]
    assert not list(target.objects.list("pin/"))
    assert [key for key, _ in sent.left_out] == [blob, "line/bad"]
    assert short(bases[0]) in dict(sent.left_out)["line/bad"]
    assert verify(target, target.refs(), journals=read_journals(target.objects).lines).findings == ()


def test_a_half_object_in_the_target_is_written_again(store: ArtifactStore) -> None:
    base = checkpoint_of({"a": torch.ones(3)}, store)
    blob = f"blob/{store.open(base).record('a').blob}"
    target = memory_store()
    target.objects.put(blob, b"half")
    copy([base], store, target)
    assert target.objects.get(blob) == store.objects.get(blob)


def test_histories_that_differ_stop_a_mirror_before_anything_is_written(store: ArtifactStore) -> None:
    base = checkpoint_of({"a": torch.ones(3)}, store)
    other = checkpoint_of({"a": torch.zeros(3)}, store)
    target = memory_store()
    Line(store.objects, "main").open(base, MERGER)
    Line(target.objects, "main").open(CheckpointRef(other), MERGER)
    before = content(target.objects)
    with pytest.raises(Conflict, match="another history in memory:: entry 0 differs"):
        mirror(store, target)
    assert content(target.objects) == before


def test_a_mirror_that_is_ahead_keeps_what_it_has(store: ArtifactStore) -> None:
    base = checkpoint_of({"a": torch.ones(3)}, store)
    line = Line(store.objects, "main")
    line.open(base, MERGER)
    target = memory_store()
    mirror(store, target)
    there = Line(target.objects, "main")
    there.rollback(there.head(), "a note there")
    assert mirror(store, target).entries == 0
    assert there.head().number == 1
    line.rollback(line.head(), "another note here")
    with pytest.raises(Conflict, match="entry 1 differs"):
        mirror(store, target)


def test_many_objects_are_listed_once_and_copied(store: ArtifactStore) -> None:
    refs = [checkpoint_of({"a": torch.full((2,), float(number))}, store) for number in range(300)]
    target = memory_store()
    reported: list[tuple[int, int]] = []
    assert copy(refs, store, target, lambda *some: reported.append(some)).objects == 600
    assert reported[-1] == (600, 600) and len(reported) == 600
    assert copy(refs, store, target).held == 600


def test_to_an_s3_server_and_back(s3_url: str, tmp_path: Path) -> None:
    store = ArtifactStore(DirectoryObjects(tmp_path / "store"))
    base = checkpoint_of({"a": torch.ones(3)}, store)
    update = update_of({"a": torch.zeros(3)}, base, store)
    Line(store.objects, "main").open(base, MERGER)
    pin(store, update, "a test")
    there = ArtifactStore(open_objects(s3_url))
    assert copy([update], store, there).objects == 4
    assert mirror(store, there).entries == 1
    blob = f"blob/{store.open(update).record('a').blob}"
    store.objects.put(blob, b"?")
    back = ArtifactStore(DirectoryObjects(tmp_path / "back"))
    mirror(there, back)
    assert content(back.objects) == content(there.objects)
    assert verify(back, back.refs(), journals=read_journals(back.objects).lines).findings == ()
