"""Verify follows every name of an artifact: blobs, and the updates that the facts of a joint state list."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from storage.artifacts import ArtifactStore
from storage.checked import Checked
from storage.lines import Fold, Line
from storage.manifest import Lineage
from storage.objects import MemoryObjects
from storage.refs import CheckpointRef, Ref, StateRef, UpdateRef, short
from storage.roots import read_journals
from storage.verify import verify, verify_and_repair, verify_lines
from tests.builders import checkpoint_of, memory_store


@pytest.fixture
def store() -> ArtifactStore:
    return memory_store()


def update(store: ArtifactStore, number: int) -> UpdateRef:
    draft = store.draft("update", Lineage("extract"))
    draft.add("a", {"tensor": torch.full((3,), float(number))}, role="bare", dtype="F32", shape=(3,))
    return UpdateRef(draft.commit())


def joint_state(store: ArtifactStore, updates: list[UpdateRef]) -> StateRef:
    draft = store.draft("state", Lineage("fold", {"update": updates[-1]}, {"name": "sce"}))
    draft.facts.update({"count": len(updates), "updates": list(updates), "weights": [1.0] * len(updates)})
    return StateRef(draft.commit())


def blob_of(store: ArtifactStore, ref: Ref) -> str:
    return f"blob/{store.open(ref).record('a').blob}"


def test_the_updates_of_a_joint_state_are_read(store: ArtifactStore) -> None:
    state = joint_state(store, [update(store, 1), update(store, 2)])
    verdict = verify(store, [state])
    assert (verdict.artifacts, verdict.blobs, verdict.findings) == (3, 2, ())


def test_a_damaged_update_names_the_states_that_need_it(store: ArtifactStore) -> None:
    updates = [update(store, number) for number in (1, 2)]
    states = [joint_state(store, updates[:1]), joint_state(store, updates)]
    blob = blob_of(store, updates[0])
    store.objects.put(blob, b"?" * len(store.objects.get(blob)))
    (finding,) = verify(store, store.refs()).findings
    assert finding.object == blob
    assert set(finding.needed_by) == {short(one) for one in (updates[0], *states)}


def test_a_missing_update_names_the_states_that_need_it(store: ArtifactStore) -> None:
    gone = UpdateRef(Ref(f"update/{'7' * 64}"))
    states = [joint_state(store, [gone]), joint_state(store, [gone, update(store, 1)])]
    (finding,) = verify(store, store.refs()).findings
    assert finding.object == gone
    assert "not" in finding.problem
    assert set(finding.needed_by) == {short(one) for one in states}


def test_what_a_rebuild_merged_is_looked_for(store: ArtifactStore) -> None:
    base = CheckpointRef(store.draft("checkpoint", Lineage("ingest")).commit())
    first, second = update(store, 1), update(store, 2)
    inner, outer = joint_state(store, [first]), joint_state(store, [first, second])
    line = Line(store.objects, "main")
    line.open(base, {"name": "sce"})
    line.rebuild(line.head(), {"name": "sce"}, [Fold("a", first, inner), Fold("b", second, outer)])
    assert verify_lines(store) == []
    gone = UpdateRef(Ref(f"update/{'7' * 64}"))
    line.rebuild(line.head(), {"name": "sce"}, [Fold("a", gone, inner), Fold("b", second, outer)])
    (finding,) = verify_lines(store)
    assert (finding.object, finding.needed_by) == (gone, ("line 'main' entry 2",))


def test_a_state_that_an_older_entry_names_may_be_gone_but_not_the_head_s(store: ArtifactStore) -> None:
    """It can be folded again from the updates, which are looked for."""
    base = CheckpointRef(store.draft("checkpoint", Lineage("ingest")).commit())
    first, second = update(store, 1), update(store, 2)
    inner, outer = joint_state(store, [first]), joint_state(store, [first, second])
    line = Line(store.objects, "main")
    line.open(base, {"name": "sce"})
    line.fold(line.fold(line.head(), "a", first, inner), "b", second, outer)
    store.objects.delete(inner)
    assert verify_lines(store) == []
    verdict = verify(store, [], journals=read_journals(store.objects).lines)
    assert verdict.findings == ()
    assert [(one.object, one.needed_by) for one in verdict.pruned] == [(inner, ("line 'main'",))]
    store.objects.delete(outer)
    verdict = verify(store, [], journals=read_journals(store.objects).lines)
    assert [(one.object, one.needed_by) for one in verdict.findings] == [(outer, ("line 'main' entry 2",))]
    assert [one.object for one in verify_lines(store)] == [outer]


def test_the_base_of_an_update_is_needed(store: ArtifactStore) -> None:
    """And so are the blobs that a lossless one is stated onto."""
    base, onto = checkpoint_of({"a": torch.ones(3)}, store), checkpoint_of({"b": torch.zeros(2)}, store)
    blob = store.open(onto).record("b").blob
    draft = store.draft("update", Lineage("compress", {"base": base}))
    draft.add("a", {"tensor": torch.ones(2)}, role="bare", dtype="F32", shape=(2,), onto=blob)
    lossless = draft.commit()
    assert verify(store, [lossless]).findings == ()
    store.objects.delete(base)
    store.objects.delete(f"blob/{blob}")
    found = verify(store, [lossless]).findings
    assert {one.object: one.needed_by for one in found} == {
        base: (short(lossless),),
        f"blob/{blob}": (short(lossless),),
    }


class Interrupted(MemoryObjects):
    """A store whose reader presses Ctrl-C after so many blobs."""

    reads = 0
    limit = 10**9

    def read(self, key: str) -> Iterator[memoryview]:
        self.reads += 1
        if self.reads > self.limit:
            raise KeyboardInterrupt
        return super().read(key)


def test_an_interrupted_verify_goes_on_where_it_stopped(tmp_path: Path) -> None:
    objects = Interrupted()
    store = ArtifactStore(objects)
    refs = [update(store, number) for number in range(40)]
    damaged = blob_of(store, refs[0])
    objects.put(damaged, b"?")
    objects.limit = 25
    with pytest.raises(KeyboardInterrupt):
        verify(store, refs, checked=Checked(tmp_path / "checked"))
    good = Checked(tmp_path / "checked")
    assert 10 < len(good.blobs) <= 25
    objects.limit, objects.reads = 10**9, 0
    verdict = verify(store, refs, checked=good)
    assert (verdict.blobs, verdict.resumed, objects.reads) == (40, good.found_before, 40 - good.found_before)
    assert [one.object for one in verdict.findings] == [damaged]
    assert verdict.bytes == sum(len(objects.get(blob_of(store, ref))) for ref in refs[1:])
    good.clear()
    assert not (tmp_path / "checked").exists()
    objects.reads = 0
    assert verify(store, refs, checked=Checked(tmp_path / "checked")).resumed == 0
    assert objects.reads == 40


def test_what_was_found_good_counts_for_a_day(tmp_path: Path) -> None:
    path, now = tmp_path / "checked", int(time.time())
    old, new, later = ("a" * 64, "b" * 64, "c" * 64)
    path.write_text(
        f"{old} 1 {now - 90_000}\n{new} 2 {now - 80_000}\n{later} 3 {now + 9_000}\n{'d' * 64} 4\n\xff{'e' * 10}"
    )
    assert Checked(path).blobs == {new: 2}
    checked = Checked(path)
    checked.add("f" * 64, 5)
    checked.close()
    assert Checked(path).blobs == {new: 2, "f" * 64: 5}


def test_damage_is_repaired_from_a_copy(store: ArtifactStore) -> None:
    """A manifest that was lost brings blobs to light that were lost with it."""
    copy = memory_store()
    updates = [update(one, number) for one in (store, copy) for number in (1, 2)][:2]
    state = joint_state(store, updates)
    blobs = [blob_of(store, ref) for ref in updates]
    store.objects.put(blobs[0], b"?")
    store.objects.delete(blobs[1])
    store.objects.delete(updates[1])
    verdict = verify_and_repair(store, [state], copy)
    assert verdict.findings == ()
    assert sorted(verdict.repaired) == sorted([*blobs, updates[1]])
    assert verify(store, [state]).findings == ()
    assert [store.objects.get(blob) for blob in blobs] == [copy.objects.get(blob) for blob in blobs]


def test_what_the_copy_lacks_too_is_named_and_nothing_wrong_is_taken(store: ArtifactStore) -> None:
    copy = memory_store()
    refs = [update(one, number) for one in (store, copy) for number in (1, 2, 3)][:3]
    blobs = [blob_of(store, ref) for ref in refs]
    for blob in blobs:
        store.objects.put(blob, b"?")
    copy.objects.delete(blobs[0])
    copy.objects.put(blobs[1], b"not it either")
    verdict = verify_and_repair(store, refs, copy)
    assert verdict.repaired == (blobs[2],)
    problems = {one.object: one.problem for one in verdict.findings}
    assert set(problems) == set(blobs[:2])
    assert "is not in memory: either" in problems[blobs[0]]
    assert "is damaged in memory: too" in problems[blobs[1]]
    assert store.objects.get(blobs[1]) == b"?"


def test_a_gap_in_a_journal_is_found(store: ArtifactStore) -> None:
    line = Line(store.objects, "main")
    head = line.open(CheckpointRef(store.draft("checkpoint", Lineage("ingest")).commit()), {"name": "sce"})
    for number in range(3):
        one = update(store, number)
        head = line.fold(head, f"t{number}", one, joint_state(store, [one]))
    store.objects.delete("line/main/00000002")
    (finding,) = verify_lines(store)
    assert finding.object == "line/main"
    assert "00000002 is not in" in finding.problem
