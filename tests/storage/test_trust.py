"""Hostile stores: whatever manifests and journals say, the answer is a clear error: nothing outside the store is
touched, no memory is taken on their word, and nothing runs for ever."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.errors import Damaged, InvalidInput
from storage.lines import Line
from storage.manifest import Asset, Lineage, Manifest, TensorRecord, canonical, decode_manifest, digest, encode_manifest
from storage.needs import Needs, needed_by
from storage.refs import Ref
from storage.roots import read_journals
from storage.verify import verify
from tests.builders import checkpoint_of, memory_store, update_of

BLOB = digest(b"")
GOOD: dict[str, Any] = json.loads(
    encode_manifest(
        Manifest(
            "update",
            Lineage("test", {"base": f"checkpoint/{BLOB}"}),
            (TensorRecord("a", "bare", "F32", (1,), BLOB, 0),),
            assets={"config.json": Asset(BLOB, 0)},
        )
    )
)


def tensor(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda found: found["tensors"][0].update(values)


HARMS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a blob outside": tensor(blob="../../../etc/passwd"),
    "an absolute blob": tensor(blob="/etc/passwd"),
    "a blob of other digits": tensor(blob="G" * 64),
    "a blob with a line end": tensor(blob=BLOB[:63] + "\n"),
    "a base outside": tensor(onto="../" * 21 + "a"),
    "a number as blob": tensor(blob=7),
    "a terminal's commands in a name": tensor(name="a\x1b[2J"),
    "text turned round": tensor(name="a\u202egnp.exe"),
    "a null in a name": tensor(name="a\x00b"),
    "an endless name": tensor(name="a" * 5000),
    "a name of lists": tensor(name=["a"]),
    "controls in a role": tensor(role="\r\n"),
    "a huge size": tensor(bytes=1 << 64),
    "a negative size": tensor(bytes=-1),
    "a size that is true": tensor(bytes=True),
    "a size of a half": tensor(bytes=0.5),
    "a huge shape": tensor(shape=[1 << 40, 1 << 40]),
    "a negative shape": tensor(shape=[-1, -1]),
    "a shape of texts": tensor(shape=["1"]),
    "very many dimensions": tensor(shape=[1] * 100_000),
    "a huge rank": tensor(rank=1 << 70),
    "an error of lists": tensor(error=[]),
    "an asset outside": lambda found: found.update(assets={"../../evil": {"blob": BLOB, "bytes": 0}}),
    "an absolute asset": lambda found: found.update(assets={"/tmp/evil": {"blob": BLOB, "bytes": 0}}),
    "an asset in a folder": lambda found: found.update(assets={"a\\b": {"blob": BLOB, "bytes": 0}}),
    "an asset with controls": lambda found: found.update(assets={"a\nb": {"blob": BLOB, "bytes": 0}}),
    "the folder as an asset": lambda found: found.update(assets={"..": {"blob": BLOB, "bytes": 0}}),
    "an asset elsewhere": lambda found: found.update(assets={"x": {"blob": "../x", "bytes": 0}}),
    "inputs that are a list": lambda found: found["lineage"].update(inputs=["update/1"]),
    "an input of numbers": lambda found: found["lineage"].update(inputs={"base": 7}),
    "an input with controls": lambda found: found["lineage"].update(inputs={"base": "\x1b]0;x\x07"}),
    "a spec that is a text": lambda found: found["lineage"].update(spec="x"),
    "facts that are a list": lambda found: found.update(facts=[1]),
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_what_a_manifest_must_not_say(harm: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    """Signed, as it were: the digest is right, so that only what it says is wrong."""
    found = json.loads(json.dumps(GOOD))
    harm(found)
    store = ArtifactStore(DirectoryObjects(tmp_path / "store"))
    data = canonical(found)
    ref = Ref(f"update/{digest(data)}")
    store.objects.put(ref, data)
    with pytest.raises(Damaged, match="is not a manifest") as caught:
        store.open(ref)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    (finding,) = verify(store, [ref]).findings
    assert finding.object == ref
    assert [one.name for one in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize(
    "data",
    [
        b'{"facts":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        canonical(GOOD).replace(b'"facts":{}', b'"facts":{"x":NaN}'),
        canonical(GOOD).replace(b'"bytes":0', b'"bytes":' + b"9" * 10_000),
        canonical(GOOD).replace(b'"facts":{}', b'"facts":{"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    ],
    ids=["deep", "not a number", "endless digits", "deep facts"],
)
def test_what_a_parser_could_choke_on(data: bytes) -> None:
    with pytest.raises(Damaged, match="update/12345"):
        decode_manifest(data, source="update/12345")


def test_an_artifact_of_another_kind_than_its_name(store: ArtifactStore) -> None:
    data = canonical(GOOD)
    store.objects.put(f"checkpoint/{digest(data)}", data)
    with pytest.raises(Damaged, match="says it is a 'update'"):
        store.open(f"checkpoint/{digest(data)}")


def test_what_is_written_could_be_read(store: ArtifactStore) -> None:
    """The same rules bind the writer: nothing is stored that nobody could open."""
    draft = store.draft("update", Lineage("test"))
    with pytest.raises(InvalidInput, match="printable"):
        draft.add("a\x1bb", {"tensor": torch.ones(1)}, role="bare", dtype="F32", shape=(1,))
    draft.add_asset("../x", b"1")
    with pytest.raises(InvalidInput, match="without folders"):
        draft.commit()
    assert not list(store.refs())


@pytest.fixture
def store() -> ArtifactStore:
    return memory_store()


def test_a_shape_is_not_believed_before_its_bytes_are_there(store: ArtifactStore) -> None:
    """A record may claim as many numbers as exist; the blob decides."""
    small = store.write_tensor("a", {"tensor": torch.ones(2)}, role="bare", dtype="F32", shape=(2,))
    blob = store.objects.get(f"blob/{small.blob}")
    huge = blob.replace(b'"shape":[2]', b'"shape":[9]').replace(b'"shape":[9]', b'"shape":[2000000000]')
    header = huge[8 : huge.rindex(b"}") + 1]
    data = len(header).to_bytes(8, "little") + header + blob[-8:]
    draft = store.draft("update", Lineage("test"))
    draft.share(TensorRecord("a", "bare", "F32", (2_000_000_000,), store.write_blob(data), 1 << 62))
    ref = draft.commit()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Damaged, match="cannot lie"):
        store.open(ref).parts("a")
    verify(store, [ref])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB; the claim is 8 GB


def test_a_long_lineage_is_walked_without_recursion(store: ArtifactStore) -> None:
    """Thousands of artifacts, each needing the one before: by facts, and as bases."""
    ref = checkpoint_of({"a": torch.ones(1)}, store)
    refs: list[Ref] = [ref]
    for number in range(3000):
        draft = store.draft("update", Lineage("test", {"base": refs[-1]}))
        draft.facts["x"] = number
        refs.append(draft.commit())
    needs = Needs(store)
    assert needs.closure([refs[-1]]) == set(refs)
    assert needs.ordered(refs) == refs
    assert needs.users({}).of(refs[0]) == set(refs[1:])


def test_circles_end(store: ArtifactStore) -> None:
    """No digest can be part of itself, but a store that was tampered with may claim what it likes."""
    needs, manifests = Needs(store), {}
    one, two = (Ref(f"update/{digit * 64}") for digit in "12")
    for ref, other in ((one, two), (two, one)):
        manifests[ref] = Manifest("update", Lineage("test"), facts={"updates": [other, ref], "deep": {"x": [[other]]}})
        store.objects.put(ref, encode_manifest(manifests[ref]))
    assert needs.closure([one]) == {one}
    assert isinstance(needs.problems[one], Damaged)
    trusting = Needs(store)
    trusting.known = {ref: needed_by(ref, found) for ref, found in manifests.items()}
    start = time.monotonic()
    assert trusting.closure([one]) == {one, two}
    assert sorted(trusting.ordered([one, two])) == [one, two]
    assert trusting.users({}).of(one) == {two}
    assert time.monotonic() - start < 5


ENTRY_HARMS: dict[str, dict[str, Any]] = {
    "a base elsewhere": {"base": "../../etc/passwd"},
    "a base of another kind": {"base": f"update/{BLOB}"},
    "an update that is a number": {"update": 7},
    "another number": {"number": 5},
    "a merger that is a text": {"merger": "average"},
    "a step that is negative": {"step": -1},
    "a task with controls": {"task": "a\x1b[2J"},
    "a weight that is a text": {"weight": "1"},
    "folds that are numbers": {"folds": [1]},
    "folds without a state": {"folds": [{"task": "a", "update": f"update/{BLOB}", "state": None}]},
    "a reason that is a list": {"why": []},
    "a reason with commands": {"why": "x\x1b]0;title\x07"},
}


@pytest.mark.parametrize("values", ENTRY_HARMS.values(), ids=ENTRY_HARMS)
def test_what_a_journal_must_not_say(store: ArtifactStore, values: dict[str, Any]) -> None:
    line = Line(store.objects, "main")
    line.open(checkpoint_of({"a": torch.ones(1)}, store), {"name": "average"})
    entry = json.loads(store.objects.get("line/main/00000000"))
    store.objects.put("line/main/00000000", json.dumps({**entry, **values}).encode())
    with pytest.raises(Damaged, match="line/main/00000000"):
        line.head()
    assert list(read_journals(store.objects).problems) == ["line/main"]


@pytest.mark.parametrize("key", ["line/main/zzz", "line/main/1", "line/BAD/00000000", "line/x.y/00000000"])
def test_keys_that_are_no_journal(store: ArtifactStore, key: str) -> None:
    update_of({"a": torch.ones(1)}, checkpoint_of({"a": torch.ones(1)}, store), store)
    store.objects.put(key, b"{}")
    assert len(read_journals(store.objects).problems) == 1
