"""The contract of object stores: what every backend promises, asked of all of them; and artifacts and lines on top."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from storage.address import open_objects
from storage.artifacts import ArtifactStore
from storage.cache import CachedObjects
from storage.directory import DirectoryObjects
from storage.errors import Conflict, Damaged, InvalidInput, Missing, Unavailable
from storage.lines import Entry, Line
from storage.manifest import Lineage
from storage.objects import MemoryObjects, ObjectStore
from storage.overlay import Overlay
from storage.refs import CheckpointRef, Ref, StateRef, UpdateRef
from storage.streams import PIECE, Filed, Held, copy

R = TypeVar("R")
WRITERS = 16
BAD_KEYS = [
    "",
    ".",
    "..",
    "../x",
    "/x",
    "a//b",
    "a/../b",
    "a/./b",
    "a/..",
    "a/",
    ".hidden",
    "a/.part",
    "a\\b",
    "a\n",
    "a b",
]


@pytest.fixture(params=["memory", "directory", "s3", "s3 and a cache"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """An empty store of each backend, opened by its address as a user would."""
    address: dict[str, Callable[[], str]] = {
        "memory": lambda: "memory:",
        "directory": lambda: (tmp_path / "a store with spaces").as_uri(),
        "s3": lambda: request.getfixturevalue("s3_url"),
    }
    if request.param == "s3 and a cache":
        return open_objects(request.getfixturevalue("s3_url"), tmp_path / "cache", 2**30)
    return open_objects(address[request.param]())


def at_once(work: Callable[[int], object], count: int = WRITERS) -> list[object]:
    """The results of `work(0)` ... `work(count - 1)`, started at the same moment in as many threads."""
    gate = threading.Barrier(count)

    def wait_and_work(number: int) -> object:
        gate.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(wait_and_work, range(count)))


class TestObjectStore:
    """Reads, writes, first writes and listings mean the same everywhere."""

    @pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)), b"\r\n\x00" * 1000])
    def test_what_is_put_is_got(self, objects: ObjectStore, data: bytes) -> None:
        objects.put("folder/under/key.bin", data)
        assert objects.get("folder/under/key.bin") == data
        assert objects.view("folder/under/key.bin") == data
        assert objects.size("folder/under/key.bin") == len(data)

    def test_large_objects(self, objects: ObjectStore) -> None:
        data = torch.arange(5 * 2**20, dtype=torch.int32).numpy().tobytes()
        objects.put("large", data)
        assert sha256(objects.get("large")).digest() == sha256(data).digest()
        assert objects.size("large") == 20 * 2**20

    @pytest.mark.parametrize("size", [0, 1, 5_000_000, 18 * 2**20])
    def test_what_is_written_in_pieces_is_read_in_pieces(self, objects: ObjectStore, size: int) -> None:
        data = torch.arange(size // 4 + 1, dtype=torch.int32).numpy().tobytes()[:size]
        pieces = [memoryview(data)[start : start + 3_000_001] for start in range(0, size, 3_000_001)]
        objects.write("key", size, iter(pieces))
        assert objects.size("key") == size
        found = list(objects.read("key"))
        assert max((len(piece) for piece in found), default=0) <= 16 * 2**20
        assert sha256(b"".join(found)).digest() == sha256(data).digest() == sha256(objects.view("key")).digest()

    def test_pieces_that_do_not_come_are_never_seen(self, objects: ObjectStore) -> None:
        """Too few, too many, or an error among them: the old content stays, and nothing new is there."""
        objects.put("old", b"before")

        def failing() -> Iterator[bytes]:
            yield b"first"
            raise Damaged("the source is damaged")

        for key in ("old", "new"):
            for wrong in (4, 6):
                with pytest.raises(InvalidInput, match="were announced"):
                    objects.write(key, wrong, [b"12", b"345"])
            with pytest.raises(Damaged, match="the source"):
                objects.write(key, 10, failing())
        assert [*objects.list("")] == ["old"]
        assert objects.get("old") == b"before"

    @pytest.mark.parametrize("size", [0, 1, PIECE, 2 * PIECE + 5])
    def test_what_is_added_is_named_by_its_content(self, objects: ObjectStore, tmp_path: Path, size: int) -> None:
        data = torch.arange(size // 4 + 1, dtype=torch.int32).numpy().tobytes()[:size]
        file = tmp_path / "a file"
        file.write_bytes(data)
        asked = []
        for content in (Held(data), Filed(file)):
            name = objects.add("blob", content, lambda name: bool(asked.append(name)))
            assert name == content.name() == sha256(data).hexdigest()
            assert [*objects.list("")] == [f"blob/{name}"] and objects.get(f"blob/{name}") == data
            objects.delete(f"blob/{name}")
            assert objects.add("blob", content, lambda name: True) == name
            assert not [*objects.list("")]
        assert asked == [name, name]

    def test_a_file_that_changes_under_way_is_never_named_wrongly(self, objects: ObjectStore, tmp_path: Path) -> None:
        """Whichever of its contents is stored bears its own name; else nothing is, and the error names the file."""
        file = tmp_path / "weights.bin"

        def known(name: str) -> bool:
            file.write_bytes(b"b" * 2 * PIECE)
            return False

        file.write_bytes(b"a" * 2 * PIECE)
        problem = ""
        try:
            name = objects.add("blob", Filed(file), known)
        except Damaged as error:
            problem = str(error)
        else:
            assert sha256(objects.get(f"blob/{name}")).hexdigest() == name
        if problem:
            assert "weights.bin" in problem
            assert not [*objects.list("")]

    def test_objects_are_copied_between_stores_and_checked(self, objects: ObjectStore) -> None:
        other, data = MemoryObjects(), bytes(range(256)) * 70_000
        key = f"blob/{sha256(data).hexdigest()}"
        for source, target in ((other, objects), (objects, MemoryObjects())):
            source.put(key, data)
            assert copy(source, target, key) == len(data)
            assert target.get(key) == data
        wrong = f"blob/{'0' * 64}"
        objects.put(wrong, data)
        with pytest.raises(Damaged, match=wrong):
            copy(objects, other, wrong)
        assert other.size(wrong) is None
        with pytest.raises(Missing, match="nothing"):
            copy(objects, other, "blob/nothing")

    def test_nothing_is_missing_and_has_no_size(self, objects: ObjectStore) -> None:
        with pytest.raises(Missing, match="nothing/here"):
            objects.get("nothing/here")
        with pytest.raises(Missing, match="nothing/here"):
            objects.view("nothing/here")
        with pytest.raises(Missing, match="nothing/here"):
            list(objects.read("nothing/here"))
        assert objects.size("nothing/here") is None
        assert list(objects.list("")) == []

    def test_a_view_is_the_reader_s_own(self, objects: ObjectStore) -> None:
        """Written on, kept while the object changes: neither side sees the other."""
        objects.put("key", b"first")
        view = objects.view("key")
        view[0] = ord("F")
        assert objects.get("key") == b"first"
        objects.put("key", b"second")
        assert bytes(view) == b"First"

    def test_put_replaces(self, objects: ObjectStore) -> None:
        objects.put("key", b"a longer first version")
        objects.put("key", b"second")
        assert objects.get("key") == b"second"
        assert objects.size("key") == 6
        assert list(objects.list("")) == ["key"]

    def test_create_does_not_replace(self, objects: ObjectStore) -> None:
        assert objects.create("line/main/0", b"first") is True
        assert objects.create("line/main/0", b"second") is False
        assert objects.get("line/main/0") == b"first"
        objects.put("put", b"before")
        assert objects.create("put", b"after") is False
        assert objects.get("put") == b"before"

    def test_create_has_one_winner(self, objects: ObjectStore) -> None:
        for turn in range(10):
            key, texts = f"race/{turn}", [f"writer {number} of turn {turn}".encode() for number in range(WRITERS)]
            won = at_once(lambda number, key=key, texts=texts: objects.create(key, texts[number]))  # type: ignore[misc]
            assert sorted(map(str, won)) == ["False"] * (WRITERS - 1) + ["True"]
            assert objects.get(key) == texts[won.index(True)]
        assert len(list(objects.list("race/"))) == 10

    def test_a_reader_never_sees_half_a_put(self, objects: ObjectStore) -> None:
        versions = [bytes([number]) * 300_000 for number in range(4)]
        objects.put("key", versions[0])

        def work(number: int) -> object:
            if number < 2:
                for version in versions * 3:
                    objects.put("key", version)
                return True
            return all(objects.get("key") in versions for _ in range(12))

        assert all(at_once(work, 6))

    def test_list_is_sorted_and_takes_any_prefix(self, objects: ObjectStore) -> None:
        keys = ["blob/a1", "blob/a2", "blob/b1", "blobs/a1", "line/main/00000000", "line/main-2/00000000", "top"]
        for key in reversed(keys):
            objects.put(key, key.encode())
        assert list(objects.list("")) == sorted(keys)
        for prefix in ("blob", "blob/", "blob/a", "blob/a1", "line/main/", "line/main", "t", "nothing", "blob/a1/"):
            assert list(objects.list(prefix)) == sorted(key for key in keys if key.startswith(prefix)), prefix

    def test_list_goes_past_the_first_thousand(self, objects: ObjectStore) -> None:
        keys = [f"many/{number:05d}" for number in range(1100)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: objects.put(key, b""), keys))
        assert list(objects.list("many/")) == keys
        assert len(list(objects.list("many/0109"))) == 10

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_keys_that_could_lead_elsewhere_are_refused(self, objects: ObjectStore, key: str) -> None:
        writes = (lambda key: objects.put(key, b""), lambda key: objects.create(key, b""))
        for use in (objects.get, objects.size, objects.stat, objects.delete, *writes):
            with pytest.raises(InvalidInput, match="not an object key"):
                use(key)
        assert list(objects.list("")) == []

    def test_listed_tells_sizes_and_times(self, objects: ObjectStore) -> None:
        before = time.time()
        objects.put("blob/a", b"12345")
        objects.create("blob/b", b"")
        objects.put("other", b"1")
        found = list(objects.listed("blob/"))
        assert [(one.key, one.bytes) for one in found] == [("blob/a", 5), ("blob/b", 0)]
        assert all(before - 2 <= one.modified <= time.time() + 2 for one in found)
        assert [one.key for one in objects.listed("")] == list(objects.list(""))
        stat = objects.stat("blob/a")
        assert stat is not None and stat[:2] == ("blob/a", 5)
        assert abs(stat.modified - found[0].modified) < 1  # S3 tells whole seconds in one answer and less in another
        assert objects.stat("nothing/here") is None

    def test_what_is_deleted_is_gone_and_may_be_written_again(self, objects: ObjectStore) -> None:
        objects.put("blob/a", b"1")
        objects.put("blob/ab", b"2")
        objects.delete("blob/a")
        objects.delete("blob/a")  # twice is no error: a retried request must not fail
        objects.delete("nothing/here")
        assert list(objects.list("")) == ["blob/ab"]
        assert objects.size("blob/a") is None
        with pytest.raises(Missing):
            objects.get("blob/a")
        assert objects.create("blob/a", b"3")
        assert objects.get("blob/a") == b"3"

    def test_the_address_opens_the_same_store(self, objects: ObjectStore) -> None:
        objects.put("key", b"content")
        again = open_objects(objects.url)
        assert again.url == objects.url
        # Memory is the exception: each store has its own, which is why it has no more of an address than `memory:`.
        assert again.size("key") == (None if isinstance(objects, MemoryObjects) else 7)


# Runs in a process of its own, because a limit on file size cannot be raised again by who set it. The limit makes the
# operating system itself refuse the write in its middle, as a full disk or an exhausted quota does.
_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from storage.errors import StoreFull
from storage.directory import DirectoryObjects

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
store = DirectoryObjects(Path(sys.argv[1]))
for write in (store.put, store.create, lambda key, data: store.write(key, len(data), [data[:9], data[9:]])):
    for key in ("old", "new", "folder/new"):
        try:
            if write(key, b"n" * 1_000_000) is False and key == "old":
                continue
        except StoreFull as error:
            assert "nothing half-written was left" in str(error)
        else:
            sys.exit(f"{write} of {key} did not notice")
store.put("fits", b"f" * 1000)
"""


def test_a_full_disk_leaves_the_old_content_and_no_scraps(tmp_path: Path) -> None:
    store = DirectoryObjects(tmp_path / "store")
    store.put("old", b"old content")
    child = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(store.root)], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert store.get("old") == b"old content"
    files = sorted(path.name for path in store.root.rglob("*") if path.is_file())
    assert files == ["fits", "old"]


# No key is the folder of another: a directory cannot hold `a` and `a/b` at once, and no key of ours needs that.
_NAMES = st.sampled_from(["a", "b/x", "b/y", "b-/x", "c/d/e", "c/d/f-1_2.json"])
_DATA = st.binary(max_size=40)


class StoreModel(RuleBasedStateMachine):
    """A store must behave like a dictionary whatever is done to it, in whatever order."""

    make: Callable[[], ObjectStore]

    @initialize()
    def start(self) -> None:
        self.store = self.make()
        self.model: dict[str, bytes] = {}

    @rule(key=_NAMES, data=_DATA)
    def put(self, key: str, data: bytes) -> None:
        self.store.put(key, data)
        self.model[key] = data

    @rule(data=_DATA)
    def put_a_blob(self, data: bytes) -> None:
        """Under the name that a cache keeps it by."""
        self.put(key=f"blob/{sha256(data).hexdigest()}", data=data)

    @rule(key=_NAMES, data=_DATA)
    def write(self, key: str, data: bytes) -> None:
        self.store.write(key, len(data), [data[:7], data[7:]])
        self.model[key] = data

    @rule(key=_NAMES, data=_DATA)
    def create(self, key: str, data: bytes) -> None:
        assert self.store.create(key, data) is (key not in self.model)
        self.model.setdefault(key, data)

    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(["a", *sorted(self.model)]))
        self.store.delete(key)
        self.model.pop(key, None)

    @rule(key=_NAMES)
    def get(self, key: str) -> None:
        found = None
        with suppress(Missing):
            found = self.store.get(key)
        assert found == self.model.get(key)

    @rule(prefix=st.sampled_from(["", "b", "b/", "b/x", "c/d", "c/d/", "z/"]))
    def list(self, prefix: str) -> None:
        assert [*self.store.list(prefix)] == sorted(key for key in self.model if key.startswith(prefix))

    @invariant()
    def contents_agree(self) -> None:
        model = getattr(self, "model", {})
        for key, data in model.items():
            assert self.store.size(key) == len(data)
            assert bytes(self.store.view(key)) == b"".join(map(bytes, self.store.read(key))) == data
        if model:
            assert {one.key: one.bytes for one in self.store.listed("")} == {key: len(model[key]) for key in model}


class MemoryModel(StoreModel):
    make = staticmethod(MemoryObjects)


class DirectoryModel(StoreModel):
    def make(self) -> ObjectStore:
        self.folder = TemporaryDirectory()
        return DirectoryObjects(Path(self.folder.name))

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


class CachedModel(DirectoryModel):
    """With room for a few copies."""

    def make(self) -> ObjectStore:
        self.folder = TemporaryDirectory()
        return CachedObjects(MemoryObjects(), Path(self.folder.name), 400)


class OverlayModel(DirectoryModel):
    def make(self) -> ObjectStore:
        return Overlay(MemoryObjects(), super().make())


TestMemoryModel, TestDirectoryModel = MemoryModel.TestCase, DirectoryModel.TestCase
TestCachedModel, TestOverlayModel = CachedModel.TestCase, OverlayModel.TestCase
# No deadline: a directory waits for its disk at every write, for as long as the disk likes.
for _test in (TestMemoryModel, TestDirectoryModel, TestCachedModel, TestOverlayModel):
    _test.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


class TestArtifactsAndLines:
    """The two users of object stores keep their own promises over every backend."""

    @pytest.fixture
    def store(self, objects: ObjectStore) -> ArtifactStore:
        return ArtifactStore(objects)

    @pytest.fixture
    def ref(self, store: ArtifactStore) -> Ref:
        return commit(store, torch.arange(6, dtype=torch.float32).reshape(2, 3))

    def test_a_tensor_comes_back_bit_for_bit(self, store: ArtifactStore, ref: Ref) -> None:
        artifact = store.open(ref, "update")
        assert artifact.names == ["layer.weight"]
        assert torch.equal(artifact.parts("layer.weight")["tensor"], torch.arange(6.0).reshape(2, 3))
        assert artifact.asset("config.json") == b"{}"
        assert list(store.refs("update")) == [ref]
        assert store.resolve(ref[:15]) == ref

    def test_same_work_same_ref(self, store: ArtifactStore, ref: Ref) -> None:
        before = list(store.objects.list(""))
        assert commit(store, torch.arange(6.0).reshape(2, 3)) == ref
        assert list(store.objects.list("")) == before
        assert commit(store, torch.zeros(2, 3)) != ref

    @pytest.mark.parametrize(
        "harm",
        [
            lambda data: data[:-1],
            lambda data: data[:0],
            lambda data: data[:-1] + bytes([data[-1] ^ 1]),
            lambda data: data + b"\x00",
        ],
        ids=["truncated", "emptied", "one bit", "extended"],
    )
    def test_harm_to_a_blob_is_found_and_named(
        self, store: ArtifactStore, ref: Ref, harm: Callable[[bytes], bytes]
    ) -> None:
        artifact = store.open(ref)
        key = f"blob/{artifact.record('layer.weight').blob}"
        store.objects.put(key, harm(store.objects.get(key)))
        with pytest.raises(Damaged, match=key) as caught:
            artifact.parts("layer.weight")
        assert "layer.weight" in str(caught.value)

    def test_harm_to_a_manifest_is_found_and_named(self, store: ArtifactStore, ref: Ref) -> None:
        store.objects.put(ref, store.objects.get(ref).replace(b'"F32"', b'"F16"'))
        with pytest.raises(Damaged, match=ref[:19]):
            store.open(ref)

    def test_of_two_merges_onto_one_entry_one_wins(self, objects: ObjectStore) -> None:
        line = Line(objects, "main")
        head = line.open(named(CheckpointRef, "checkpoint", "base"), {"name": "average", "version": 1})
        for turn in range(5):

            def fold(number: int, head: Entry = head, turn: int = turn) -> Entry | Conflict:
                update = named(UpdateRef, "update", f"{turn}.{number}")
                try:
                    return Line(objects, "main").fold(head, "task", update, named(StateRef, "state", update))
                except Conflict as error:
                    return error

            results = at_once(fold, 2)
            winners = [result for result in results if isinstance(result, Entry)]
            assert len(winners) == 1, results
            assert any(isinstance(result, Conflict) for result in results)
            head = line.head()
            assert (head.number, head.step) == (turn + 1, turn + 1)
            assert (head.update, head.state) == (winners[0].update, winners[0].state)
        assert [entry.step for entry in line.history()] == [1, 2, 3, 4, 5]

    def test_the_same_merge_twice_is_one_entry(self, objects: ObjectStore) -> None:
        line = Line(objects, "main")
        head = line.open(named(CheckpointRef, "checkpoint", "base"), {"name": "average", "version": 1})
        update, state = named(UpdateRef, "update", "u"), named(StateRef, "state", "s")
        at_once(lambda _: Line(objects, "main").fold(head, "task", update, state), 4)
        assert len(line.history()) == 1


def commit(store: ArtifactStore, tensor: torch.Tensor) -> Ref:
    draft = store.draft("update", Lineage("test"))
    draft.add("layer.weight", {"tensor": tensor}, role="linear.weight", dtype="F32", shape=tensor.shape)
    draft.add_asset("config.json", b"{}")
    return draft.commit()


def named(make: Callable[[Ref], R], kind: str, text: str) -> R:
    """A well-formed ref that stands for `text`; lines do not look behind the refs they are given."""
    return make(Ref(f"{kind}/{sha256(text.encode()).hexdigest()}"))


class TestDirectoryEdges:
    """What a folder can hold that a flat store cannot: folders where files are expected, and the other way round."""

    def test_a_folder_is_no_object(self, tmp_path: Path) -> None:
        objects = DirectoryObjects(tmp_path)
        objects.put("blob/a", b"1")
        assert objects.size("blob") is None
        with pytest.raises(Missing):
            objects.get("blob")

    def test_a_file_in_the_way_is_explained_and_left_alone(self, tmp_path: Path) -> None:
        objects = DirectoryObjects(tmp_path)
        objects.put("a", b"1")
        for write in (objects.put, objects.create):
            with pytest.raises(Unavailable, match="cannot write"):
                write("a/b", b"2")
        assert objects.get("a") == b"1"

    def test_a_folder_that_cannot_be_synced_fails_everybody_who_waits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Syncs of one folder are shared; a failed one must not count for those who waited for it."""
        objects, sync = DirectoryObjects(tmp_path), os.fsync
        broken = threading.Event()
        broken.set()

        def fail(descriptor: int) -> None:
            if broken.is_set() and os.path.isdir(f"/proc/self/fd/{descriptor}"):
                time.sleep(0.01)
                raise OSError(5, "Input/output error")
            sync(descriptor)

        def put(number: int) -> str:
            try:
                objects.put(f"blob/{number}", b"x")
            except Unavailable as error:
                return str(error)
            return "durable"

        monkeypatch.setattr(os, "fsync", fail)
        assert all("Input/output" in str(outcome) for outcome in at_once(put))
        broken.clear()
        assert at_once(put) == ["durable"] * WRITERS

    @pytest.mark.parametrize("prefix", ["../", "/etc/h", "a/../", "a//"])
    def test_lists_do_not_leave_the_store(self, tmp_path: Path, prefix: str) -> None:
        for objects in (DirectoryObjects(tmp_path), MemoryObjects()):
            with pytest.raises(InvalidInput):
                list(objects.list(prefix))
