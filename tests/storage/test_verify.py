"""Verify follows every name of an artifact: blobs, and the updates that the facts of a joint state list."""

from __future__ import annotations

import pytest
import torch

from storage.artifacts import ArtifactStore
from storage.lines import Fold, Line
from storage.manifest import Lineage
from storage.refs import CheckpointRef, Ref, StateRef, UpdateRef, short
from storage.verify import verify, verify_lines
from tests.builders import memory_store


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
    assert (verdict.artifacts, verdict.blobs, verdict.findings) == (1, 2, ())


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
    gone = StateRef(Ref(f"state/{'7' * 64}"))
    line.rebuild(line.head(), {"name": "sce"}, [Fold("a", first, gone), Fold("b", second, outer)])
    (finding,) = verify_lines(store)
    assert (finding.object, finding.needed_by) == (gone, ("line 'main' entry 2",))
