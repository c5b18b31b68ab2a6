"""Every verb over a store in which somebody put what should not be there: the rest works, nothing else is touched."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from storage.archive import export_line
from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.errors import Damaged
from storage.index import indexed
from storage.lines import Line
from storage.manifest import Lineage, canonical, digest
from storage.refs import Ref, StateRef, UpdateRef
from storage.roots import read_journals
from storage.sweep import GRACE, Wishes, sweep
from storage.transfer import copy, mirror
from storage.usage import usage
from storage.verify import verify
from tests.builders import checkpoint_of, memory_store
from tests.storage.graphs import MERGER
from tests.storage.test_trust import GOOD, HARMS


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """A store with one good line, beside a file that is nobody's business."""
    (tmp_path / "outside").write_text("untouched")
    store = ArtifactStore(DirectoryObjects(tmp_path / "store"))
    Line(store.objects, "main").open(checkpoint_of({"a": torch.ones(3)}, store), MERGER)
    return store


def planted(store: ArtifactStore, harm: Callable[[dict[str, Any]], object]) -> Ref:
    """A manifest with the right digest that says what it must not."""
    found = json.loads(json.dumps(GOOD))
    harm(found)
    data = canonical(found)
    ref = Ref(f"update/{digest(data)}")
    store.objects.put(ref, data)
    return ref


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_the_rest_of_the_store_works(
    store: ArtifactStore, harm: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    good = set(store.objects.list(""))
    bad = planted(store, harm)
    assert [one.object for one in verify(store, store.refs()).findings] == [bad]
    assert usage(store).unread == (bad,)
    with pytest.raises(Damaged, match=bad[:19]):
        copy([bad], store, memory_store())
    target = memory_store()
    assert [key for key, _ in mirror(store, target).left_out] == [bad]
    assert set(target.objects.list("")) == good
    assert indexed(store, tmp_path / "index").unread == (bad,)
    sweep(store, Wishes(), now=time.time() + GRACE + 60)  # nobody wants it, whatever it says
    assert set(store.objects.list("")) == good
    assert (tmp_path / "outside").read_text() == "untouched"
    assert {one.name for one in tmp_path.iterdir()} == {"store", "outside", "index"}


def test_a_line_that_names_such_a_manifest(store: ArtifactStore, tmp_path: Path) -> None:
    bad = planted(store, HARMS["an asset outside"])
    line = Line(store.objects, "main")
    head = line.head()
    state = StateRef(store.draft("state", Lineage("fold")).commit())
    line.fold(head, "evil", UpdateRef(bad), state)
    for verb in (
        lambda: export_line(store, "main", tmp_path / "a.tar"),
        lambda: sweep(store, Wishes(), now=time.time() + GRACE + 60),
    ):
        with pytest.raises(Damaged, match="update/"):
            verb()
    assert not (tmp_path / "a.tar").exists()
    target = memory_store()
    assert {key for key, _ in mirror(store, target).left_out} == {bad, "line/main"}
    assert not list(target.objects.list("line/"))
    (finding,) = verify(store, [], journals=read_journals(store.objects).lines).findings
    assert (finding.object, finding.needed_by) == (bad, ("line 'main' entry 1",))


def test_a_manifest_that_claims_to_be_as_large_as_anything(store: ArtifactStore) -> None:
    """2^62 bytes and numbers in a thousand tensors: sums stay sums, and nothing is taken on their word."""
    blob = store.write_blob(b"small")
    record = {"role": "bare", "dtype": "F32", "shape": [1 << 62], "blob": blob, "bytes": 1 << 62, "codec": "dense@1"}
    tensors = [{**record, "name": f"t{number:04}"} for number in range(1000)]
    data = canonical({**GOOD, "lineage": {"step": "x", "inputs": {}, "spec": {}}, "tensors": tensors, "assets": {}})
    ref = Ref(f"update/{digest(data)}")
    store.objects.put(ref, data)
    start = time.monotonic()
    assert verify(store, [ref]).findings == ()
    found = usage(store).updates[ref]
    assert found.bytes == len(data) + 5
    assert copy([ref], store, memory_store()).bytes == len(data) + 5
    assert time.monotonic() - start < 20
