"""The cache: a second read does not ask the store, and a copy is never believed without being checked."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest

from storage.artifacts import ArtifactStore
from storage.cache import CachedObjects, uncached
from storage.directory import DirectoryObjects
from storage.errors import InvalidInput, Missing
from storage.manifest import Lineage
from storage.objects import MemoryObjects
from storage.verify import verify

DATA = bytes(range(256)) * 40
KEY = f"blob/{sha256(DATA).hexdigest()}"


def blob(number: int, size: int) -> tuple[str, bytes]:
    data = random.Random(number).randbytes(size)
    return f"blob/{sha256(data).hexdigest()}", data


def copies(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def below() -> MemoryObjects:
    return MemoryObjects()


@pytest.fixture
def cached(below: MemoryObjects, tmp_path: Path) -> CachedObjects:
    return CachedObjects(below, tmp_path / "cache", 2**20)


def test_a_second_read_does_not_ask_the_store(below: MemoryObjects, cached: CachedObjects) -> None:
    below.put(KEY, DATA)
    assert (cached.get(KEY), bytes(cached.view(KEY))) == (DATA, DATA)
    del below._objects[KEY]
    assert (cached.get(KEY), bytes(cached.view(KEY))) == (DATA, DATA)
    assert cached.size(KEY) is None  # what is there is asked of the store
    with pytest.raises(Missing):
        list(cached.read(KEY))


def test_what_is_written_is_kept_too(below: MemoryObjects, cached: CachedObjects) -> None:
    cached.put(KEY, DATA)
    del below._objects[KEY]
    assert cached.view(KEY) == DATA


def test_a_view_is_the_reader_s_own(below: MemoryObjects, cached: CachedObjects) -> None:
    cached.put(KEY, DATA)
    cached.view(KEY)[0] = 77
    assert cached.get(KEY) == DATA


@pytest.mark.parametrize("key", ["line/main/00000000", "memo/abc", "blob/short", "other/" + "0" * 64])
def test_what_may_change_is_not_kept(below: MemoryObjects, cached: CachedObjects, key: str) -> None:
    cached.put(key, b"first")
    assert cached.get(key) == b"first"
    below.put(key, b"second")
    assert cached.get(key) == b"second"
    assert cached.create(key, b"third") is False
    assert copies(cached.folder) == []


@pytest.mark.parametrize("harm", [lambda data: data[:-1], lambda data: b"?" + data[1:], lambda data: b""])
def test_a_copy_that_was_harmed_is_fetched_anew(below: MemoryObjects, cached: CachedObjects, harm: object) -> None:
    cached.put(KEY, DATA)
    (copy,) = copies(cached.folder)
    copy.write_bytes(harm(DATA))  # type: ignore[operator]
    again = CachedObjects(below, cached.folder, cached.limit)
    assert again.get(KEY) == DATA
    assert copy.read_bytes() == DATA


def test_harm_on_the_way_does_not_stay(below: MemoryObjects, cached: CachedObjects) -> None:
    """The first read gets wrong bytes; the artifact store looks once more, and must not meet them again."""
    below.put(KEY, DATA)
    right = below.view
    below.view = lambda key: memoryview(bytearray(b"?" + right(key)[1:]))  # type: ignore[method-assign]
    cached.view(KEY)
    below.view = right  # type: ignore[method-assign]
    assert ArtifactStore(cached).read_blob(KEY.partition("/")[2], what="a blob") == DATA


def test_the_oldest_make_room(below: MemoryObjects, cached: CachedObjects) -> None:
    blobs = [blob(number, 50_000) for number in range(40)]
    for key, data in blobs:
        cached.put(key, data)
        cached.view(blobs[0][0])
        time.sleep(0.002)
    held = {path.name for path in copies(cached.folder)}
    assert sum(path.stat().st_size for path in copies(cached.folder)) <= cached.limit
    assert len(held) >= 15
    assert blobs[0][0].partition("/")[2] in held  # used all the time
    assert blobs[1][0].partition("/")[2] not in held
    assert blobs[-1][0].partition("/")[2] in held


def test_scraps_of_processes_that_ended_are_removed(below: MemoryObjects, cached: CachedObjects) -> None:
    folder = cached.folder / "ab"
    folder.mkdir()
    for name, age in ((".old.part", 7200), (".new.part", 0)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age,) * 2)
    cached.put(*blob(0, 10))
    assert [path.name for path in copies(folder)] == [".new.part"]


def work(folder: str, number: int) -> None:
    """Put and read more than fits, in an order of its own."""
    below = DirectoryObjects(Path(folder, "store"))
    cached = CachedObjects(below, Path(folder, "cache"), 2**20)
    blobs = [blob(one, 60_000) for one in range(30)]
    random.Random(number).shuffle(blobs)
    for key, data in [*blobs, *blobs]:
        cached.put(key, data) if below.size(key) is None else None
        assert cached.get(key) == data


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(str(tmp_path), number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert [path for path in copies(tmp_path / "cache") if path.name.startswith(".")] == []
    assert sum(path.stat().st_size for path in copies(tmp_path / "cache")) <= 1.3 * 2**20


def test_a_full_disk_costs_nothing_but_the_copy(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
from storage.cache import CachedObjects
from storage.objects import MemoryObjects
from tests.storage.test_cache import blob
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
cached = CachedObjects(MemoryObjects(), Path(sys.argv[1]), 2**30)
key, data = blob(0, 1_000_000)
cached.put(key, data)
assert cached.get(key) == data
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "cache")], check=True)
    assert copies(tmp_path / "cache") == []


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InvalidInput, match="cache folder"):
        CachedObjects(MemoryObjects(), tmp_path / "file" / "cache", 2**20)


def test_verify_looks_at_the_store_itself(below: MemoryObjects, cached: CachedObjects) -> None:
    store = ArtifactStore(cached)
    draft = store.draft("scores", Lineage("test"))
    draft.add_asset("file", DATA)
    ref = draft.commit()
    assert store.open(ref).asset("file") == DATA
    below.put(KEY, b"?" + DATA[1:])
    assert uncached(cached) is below
    assert [finding.object for finding in verify(store, [ref]).findings] == [KEY]
