"""A line in a tar: the same on the other side, and nothing of it where the file is not what it should be."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.address import open_objects
from storage.archive import export_line, import_line
from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.errors import Conflict, Damaged, DeltaworksError, InvalidInput
from storage.lines import Line
from storage.manifest import Lineage, canonical, digest
from storage.objects import MemoryObjects
from storage.refs import StateRef
from storage.roots import read_journals
from storage.verify import verify
from tests.builders import checkpoint_of, memory_store, update_of
from tests.storage.graphs import MERGER, Graph, graphs
from tests.storage.test_transfer import content

Member = tuple[tarfile.TarInfo, bytes]


def grown(store: ArtifactStore, merges: int = 2) -> Line:
    base = checkpoint_of({"a": torch.ones(3), "b": torch.zeros(2)}, store)
    line = Line(store.objects, "main")
    head, updates = line.open(base, MERGER), []
    for number in range(merges):
        updates.append(update_of({"a": torch.full((3,), float(number))}, base, store))
        draft = store.draft("state", Lineage("fold", {"base": base, "update": updates[-1]}, MERGER))
        draft.facts["updates"] = list(updates)
        head = line.fold(head, f"t{number}", updates[-1], StateRef(draft.commit()))
    return line


@pytest.fixture
def store() -> ArtifactStore:
    store = memory_store()
    grown(store)
    return store


@pytest.fixture
def file(store: ArtifactStore, tmp_path: Path) -> Path:
    export_line(store, "main", tmp_path / "main.tar")
    return tmp_path / "main.tar"


@settings(max_examples=40, deadline=None)
@given(graphs().filter(lambda graph: bool(graph.lines)), st.booleans())
def test_what_is_exported_is_imported(tmp_path_factory: pytest.TempPathFactory, graph: Graph, states: bool) -> None:
    folder = tmp_path_factory.mktemp("archive")
    name = sorted(graph.lines)[0]
    carried = export_line(graph.store, name, folder / "a.tar", states=states)
    target = memory_store()
    found = import_line(folder / "a.tar", target)
    assert found == carried
    base = next(Line(graph.store.objects, name).entries()).base
    folds = graph.lines[name]
    kept = [state for _, state in folds] if states else [state for _, state in folds[-1:]]
    wanted = graph.reach([base, *(update for update, _ in folds), *kept])
    assert set(target.refs()) == wanted
    assert content(target.objects, "line/") == content(graph.store.objects, f"line/{name}/")
    assert verify(target, target.refs(), journals=read_journals(target.objects).lines).findings == ()
    assert import_line(folder / "a.tar", target).entries == 0
    export_line(target, name, folder / "b.tar", states=states)
    assert (folder / "a.tar").read_bytes() == (folder / "b.tar").read_bytes()


def test_other_programs_read_it(file: Path, store: ArtifactStore, tmp_path: Path) -> None:
    """It unpacks into the layout of a store, which is a store."""
    (tmp_path / "unpacked").mkdir()
    subprocess.run(["tar", "-xf", str(file), "-C", str(tmp_path / "unpacked")], check=True)
    unpacked = ArtifactStore(DirectoryObjects(tmp_path / "unpacked"))
    assert Line(unpacked.objects, "main").history() == Line(store.objects, "main").history()
    assert verify(unpacked, unpacked.refs(), journals=read_journals(unpacked.objects).lines).findings == ()
    with tarfile.open(file) as archive:
        assert {one.mtime for one in archive} == {0}


def test_it_grows_where_it_was_imported(file: Path, store: ArtifactStore, tmp_path: Path) -> None:
    target = memory_store()
    assert import_line(file, target).entries == 3
    line = Line(store.objects, "main")
    line.rollback(line.history()[0], "t1 hurt")
    export_line(store, "main", tmp_path / "more.tar", states=True)
    assert import_line(tmp_path / "more.tar", target).entries == 1
    assert import_line(file, target).entries == 0  # an older one changes nothing
    assert content(target.objects, "line/") == content(store.objects, "line/")
    assert import_line(file, target, name="twin").line == "twin"
    assert Line(target.objects, "twin").history() == Line(target.objects, "main").history(until=2)


def test_another_history_is_a_conflict(file: Path) -> None:
    target = memory_store()
    Line(target.objects, "main").open(checkpoint_of({"x": torch.ones(1)}, target), MERGER)
    journal = content(target.objects, "line/")
    with pytest.raises(Conflict, match="another history"):
        import_line(file, target)
    assert content(target.objects, "line/") == journal and len(list(target.refs())) == 1


def test_a_file_is_not_replaced_and_a_broken_line_leaves_none(file: Path, store: ArtifactStore, tmp_path: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(InvalidInput, match="is there already"):
        export_line(store, "main", file)
    assert file.read_bytes() == before
    blob = next(iter(store.objects.list("blob/")))
    store.objects.put(blob, b"?")
    with pytest.raises(Damaged):
        export_line(store, "main", tmp_path / "new.tar")
    assert [one.name for one in tmp_path.iterdir()] == ["main.tar"]
    with pytest.raises(InvalidInput, match="No such file"):
        import_line(tmp_path / "absent.tar", store)
    with pytest.raises(InvalidInput, match="cannot write"):
        export_line(memory_with_line(), "main", tmp_path / "absent" / "new.tar")


def memory_with_line() -> ArtifactStore:
    store = memory_store()
    grown(store)
    return store


def untouched(target: ArtifactStore) -> bool:
    """Nothing became visible; blobs may be there."""
    return not [key for key in target.objects.list("") if not key.startswith("blob/")]


def members(file: Path) -> list[Member]:
    with tarfile.open(file) as archive:
        found = []
        for one in archive:
            held = archive.extractfile(one)
            assert held is not None
            found.append((one, held.read()))
        return found


def written(file: Path, some: list[Member]) -> Path:
    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as archive:
        for one, data in some:
            one.size = len(data) if one.isreg() else 0
            archive.addfile(one, io.BytesIO(data))
    return file


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.9, 0.94])
def test_half_a_file(file: Path, share: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    target = memory_store()
    with pytest.raises(Damaged, match="nothing of this one became visible"):
        import_line(file, target)
    assert untouched(target)


def test_every_cut_and_every_flipped_byte(file: Path) -> None:
    """At each boundary of a block, and one bit in each block: never anything but our own error, nothing visible."""
    data = file.read_bytes()
    end = data.rindex(b"}") + 1
    for start in range(0, end, 512):
        flipped = bytearray(data)
        flipped[start + 7] ^= 4
        for harm in (data[:start], bytes(flipped)):
            file.write_bytes(harm)
            target = memory_store()
            with pytest.raises(DeltaworksError):
                import_line(file, target)
            assert untouched(target)


def renamed(name: str) -> Callable[[list[Member]], None]:
    def harm(found: list[Member]) -> None:
        found[1][0].name = name

    return harm


def added(**fields: Any) -> Callable[[list[Member]], None]:
    def harm(found: list[Member]) -> None:
        one = tarfile.TarInfo("blob/evil")
        for field, value in fields.items():
            setattr(one, field, value)
        found.insert(1, (one, b""))

    return harm


def index(change: Callable[[dict[str, Any]], object]) -> Callable[[list[Member]], None]:
    def harm(found: list[Member]) -> None:
        about = json.loads(found[0][1])
        change(about)
        found[0] = (found[0][0], canonical(about))

    return harm


def both(key: str) -> Callable[[list[Member]], None]:
    """A member under another name, announced as such."""

    def harm(found: list[Member]) -> None:
        index(lambda about: about["objects"][0].__setitem__(0, key))(found)
        found[1][0].name = key

    return harm


HARMS: dict[str, Callable[[list[Member]], None]] = {
    "a path upwards": both("../../evil"),
    "a path upwards in a key": both("blob/../../evil"),
    "an absolute path": both("/tmp/evil"),
    "controls": both("blob/a\nb"),
    "a hidden file": both(".evil"),
    "a memo": both("memo/" + "0" * 64),
    "a pin": both("pin/update/" + "0" * 64),
    "a ref with a line end": both(f"blob/{'0' * 64}\n"),
    "another name than announced": renamed(f"blob/{'0' * 64}"),
    "a symbolic link": added(type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": added(type=tarfile.LNKTYPE, linkname="deltaworks.json"),
    "a device": added(type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    "a pipe": added(type=tarfile.FIFOTYPE),
    "a folder": added(type=tarfile.DIRTYPE),
    "a sparse file": added(type=tarfile.GNUTYPE_SPARSE),
    "what was not announced": added(name="blob/" + "0" * 64),
    "a member less": lambda found: found.pop(),
    "a member twice": lambda found: found.insert(2, found[1]),
    "no index": lambda found: found.pop(0),
    "another format": index(lambda about: about.update(format="deltaworks-line/9")),
    "an index that is a list": lambda found: found.__setitem__(0, (found[0][0], b"[]")),
    "another line": index(lambda about: about.update(line="../x")),
    "the same key twice": index(lambda about: about["objects"].insert(0, about["objects"][0])),
    "a negative size": index(lambda about: about["objects"][0].__setitem__(1, -1)),
    "a size that is a text": index(lambda about: about["objects"][0].__setitem__(1, "1")),
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_hostile_archives(file: Path, harm: Callable[[list[Member]], None], tmp_path: Path) -> None:
    found = members(file)
    harm(found)
    objects = DirectoryObjects(tmp_path / "deep" / "store")
    with pytest.raises(Damaged) as caught:
        import_line(written(tmp_path / "evil.tar", found), ArtifactStore(objects))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    assert untouched(ArtifactStore(objects))
    assert {one.name for one in tmp_path.iterdir()} <= {"main.tar", "evil.tar", "deep"}
    assert not (tmp_path / "deep").exists() or [one.name for one in (tmp_path / "deep").iterdir()] == ["store"]


@pytest.mark.parametrize("what", ["blob/", "update/", "state/", "checkpoint/"])
def test_what_is_lacking_is_missed(file: Path, what: str, tmp_path: Path) -> None:
    """Announced and whole, but for one object that others need."""
    found = members(file)
    dropped = next(number for number, (one, _) in enumerate(found) if one.name.startswith(what))
    name = found.pop(dropped)[0].name
    index(lambda about: about["objects"].pop(dropped - 1))(found)
    target = memory_store()
    with pytest.raises(Damaged, match="which it lacks"):
        import_line(written(tmp_path / "less.tar", found), target)
    assert untouched(target)
    assert not target.objects.size(name)


def test_a_signed_manifest_that_lies(file: Path, tmp_path: Path) -> None:
    """Every digest is right, and what is said is not."""
    found = members(file)
    number = next(number for number, (one, _) in enumerate(found) if one.name.startswith("update/"))
    about = json.loads(found[number][1])
    about["assets"] = {"../../evil": {"blob": digest(b""), "bytes": 0}}
    data = canonical(about)
    found[number][0].name = f"update/{digest(data)}"
    found[number] = (found[number][0], data)
    index(lambda one: one["objects"].__setitem__(number - 1, [f"update/{digest(data)}", len(data), digest(data)]))(
        found
    )
    target = memory_store()
    with pytest.raises(Damaged, match="without folders"):
        import_line(written(tmp_path / "lies.tar", found), target)
    assert untouched(target)


def test_a_header_that_claims_more_than_there_is(file: Path, tmp_path: Path) -> None:
    """Eight exabytes are announced; what is taken is what is there."""
    found = members(file)
    size = (1 << 63) - 1
    index(lambda about: about["objects"][0].__setitem__(1, size))(found)
    claimed = tarfile.TarInfo(found[1][0].name)
    claimed.size = size
    with (tmp_path / "huge.tar").open("wb") as out:
        head = tarfile.TarInfo("deltaworks.json")
        head.size = len(found[0][1])
        out.write(head.tobuf(tarfile.GNU_FORMAT) + found[0][1] + bytes(-head.size % 512))
        out.write(claimed.tobuf(tarfile.GNU_FORMAT) + found[1][1])
    target = memory_store()
    with pytest.raises(Damaged, match="ends in the middle"):
        import_line(tmp_path / "huge.tar", target)
    assert untouched(target)


class Killed(MemoryObjects):
    left = 10**9

    def put(self, key: str, data: bytes) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        super().put(key, data)


def test_killed_at_any_moment_nothing_dangles(file: Path, store: ArtifactStore) -> None:
    count = len(list(store.objects.list("")))
    for left in range(count):
        objects = Killed()
        objects.left = left
        target = ArtifactStore(objects)
        try:
            import_line(file, target)
        except KeyboardInterrupt:
            assert verify(target, target.refs(), journals=read_journals(objects).lines).findings == ()
        objects.left = 10**9
        import_line(file, target)
        assert Line(objects, "main").history() == Line(store.objects, "main").history()


def test_through_an_s3_server(s3_url: str, store: ArtifactStore, file: Path, tmp_path: Path) -> None:
    there = ArtifactStore(open_objects(s3_url))
    import_line(file, there)
    export_line(there, "main", tmp_path / "back.tar")
    assert (tmp_path / "back.tar").read_bytes() == file.read_bytes()
