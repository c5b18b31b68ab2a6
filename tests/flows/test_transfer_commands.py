"""`deltaworks copy`, `mirror`, `line export`, `line import` and `table` as a person meets them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from typer.testing import CliRunner, Result

from flows.cli import app
from storage.address import open_objects
from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.index import VERSION, index_file, indexed
from storage.lines import Fold, Line
from storage.manifest import Lineage
from storage.refs import CheckpointRef, ScoresRef
from storage.roots import read_journals
from storage.tables import write_rows
from storage.verify import verify
from tasks.mergers import Average
from tasks.recipe import Recipe
from tests.builders import checkpoint_of
from tests.storage.test_transfer import content
from tests.tasks.test_refold import grow


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    return home(tmp_path / "here", monkeypatch)


def home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    """A store with a line of three merges."""
    use(folder, monkeypatch)
    store = ArtifactStore(DirectoryObjects(folder / "store"))
    grow(store, Recipe(Average()), 3)
    return store


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAWORKS_HOME", str(folder))
    monkeypatch.setenv("DELTAWORKS_STORE", f"file://{folder}/store")
    monkeypatch.setenv("COLUMNS", "100")


def deltaworks(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_copy_takes_what_is_needed_and_once(store: ArtifactStore, tmp_path: Path) -> None:
    head = Line(store.objects, "main").head()
    assert head.state is not None
    done = deltaworks("copy", head.state[:20], str(tmp_path / "there"))
    assert done.exit_code == 0 and "0 were there" in done.output
    there = ArtifactStore(DirectoryObjects(tmp_path / "there"))
    assert set(there.refs()) == {head.state, head.base}
    again = json.loads(deltaworks("copy", head.state, f"file://{tmp_path}/there", "--json").stdout)
    assert (again["objects"], again["bytes"]) == (0, 0)
    assert deltaworks("copy", head.state).exit_code == 2
    assert "begins with" in deltaworks("copy", "update/00000", str(tmp_path / "there")).output


def test_a_mirror_on_an_s3_server_is_a_store_that_works(
    store: ArtifactStore, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mirrored, damaged here, repaired from there; the line goes on there, and the table is the same."""
    assert deltaworks("pin", Line(store.objects, "main").head().update or "", "--why", "good").exit_code == 0
    first = json.loads(deltaworks("mirror", s3_url, "--json").stdout)
    assert first["entries"] == 4 and first["left_out"] == {}
    assert json.loads(deltaworks("mirror", s3_url, "--json").stdout)["objects"] == 0
    there = open_objects(s3_url)
    assert content(there) == content(store.objects)

    blob = next(iter(store.objects.list("blob/")))
    store.objects.delete(blob)
    assert deltaworks("mirror", s3_url).exit_code == 0  # it has what is lost here
    left = deltaworks("mirror", str(tmp_path / "second"))
    assert left.exit_code == 1 and f"left out  {blob}" in left.output
    assert deltaworks("verify", "--all", "--repair-from", s3_url).exit_code == 0
    assert store.objects.size(blob)

    assert deltaworks("table", "artifacts", "--to", str(tmp_path / "here.parquet")).exit_code == 0
    monkeypatch.setenv("DELTAWORKS_STORE", s3_url)
    assert deltaworks("line", "rollback", "main", "1", "--why", "a test").exit_code == 0
    assert deltaworks("verify", "--all").exit_code == 0
    assert "main" in deltaworks("du").output
    assert deltaworks("prune", "--grace", "0", "--states", "--yes").exit_code == 0
    assert deltaworks("table", "entries", "--to", str(tmp_path / "there.csv")).exit_code == 0
    assert deltaworks("line", "export", "main", str(tmp_path / "main.tar")).exit_code == 0
    objects = ArtifactStore(there)
    assert verify(objects, objects.refs(), journals=read_journals(there).lines).findings == ()


def test_a_line_travels_as_a_file(store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(tmp_path / "main.tar")
    assert "4 entries" in deltaworks("line", "export", "main", file).output
    again = deltaworks("line", "export", "main", file)
    assert again.exit_code == 1 and "is there already" in again.output
    use(tmp_path / "elsewhere", monkeypatch)
    found = deltaworks("line", "import", file)
    assert found.exit_code == 0 and "line main: 4 new entries" in found.output
    there = DirectoryObjects(tmp_path / "elsewhere" / "store")
    assert content(there, "line/") == content(store.objects, "line/")
    assert deltaworks("line", "rollback", "main", "1", "--why", "a test").exit_code == 0
    twin = deltaworks("line", "import", file, "--as", "twin")
    assert twin.exit_code == 0 and "line twin" in twin.output
    assert deltaworks("line", "import", file).exit_code == 0  # an older one: nothing new
    (tmp_path / "evil.tar").write_bytes(b"x" * 700)
    bad = deltaworks("line", "import", str(tmp_path / "evil.tar"))
    assert bad.exit_code == 1 and "is not a tar" in bad.output and "Traceback" not in bad.output


def scored(store: ArtifactStore) -> ScoresRef:
    head = Line(store.objects, "main").head()
    model = store.draft("checkpoint", Lineage("materialize", {"base": head.base, "state": head.state or ""}))
    model.facts["task"] = ["not", "a", "text"]
    draft = store.draft("scores", Lineage("evaluate", {"model": model.commit(), "base": head.base}))
    rows = [{"task": "t1", "metric": "accuracy", "value": 0.5, "samples": 10, "factor": None, "extra": "x"}]
    rows += [{"task": "t2", "metric": "f1", "value": 0.25, "samples": 20, "factor": 1.5, "extra": "y"}]
    draft.add_asset("scores.parquet", write_rows(rows))
    return ScoresRef(draft.commit())


def test_tables_have_types_and_are_complete(store: ArtifactStore, tmp_path: Path) -> None:
    ref = scored(store)
    line = Line(store.objects, "main")
    head, folds = line.head(), line.history()
    merged = [Fold(one.task, one.fold.update, one.fold.state, one.weight) for one in folds[:2]]
    line.rebuild(head, head.merger, merged, 'a, "quoted" reason\nin two lines')

    def read(subject: str) -> pa.Table:
        assert deltaworks("table", subject, "--to", str(tmp_path / f"{subject}.parquet")).exit_code == 0
        assert deltaworks("table", subject, "--to", str(tmp_path / f"{subject}.csv")).exit_code == 0
        found = pyarrow.parquet.read_table(tmp_path / f"{subject}.parquet")
        texts = pyarrow.csv.ParseOptions(newlines_in_values=True)
        assert pyarrow.csv.read_csv(tmp_path / f"{subject}.csv", parse_options=texts).num_rows == found.num_rows
        return found

    artifacts = read("artifacts")
    assert artifacts["ref"].to_pylist() == sorted(store.refs())
    sizes = {one: store.open(one).manifest.tensor_bytes for one in store.refs()}
    assert dict(zip(artifacts["ref"].to_pylist(), artifacts["tensor_bytes"].to_pylist(), strict=True)) == sizes
    assert artifacts.schema.field("parameters").type == pa.int64()
    assert artifacts["task"].to_pylist().count("") == artifacts.num_rows  # the list is no text

    updates = read("updates").to_pylist()
    assert {one["ref"] for one in updates} == {one.update for one in folds}
    assert {one["ref"]: one["lines"] for one in updates} == {
        one.update: "main" if one.step <= 2 else "" for one in folds
    }
    assert {one["base"] for one in updates} == {head.base}

    entries = read("entries")
    assert entries.schema.field("at").type == pa.timestamp("ms", tz="UTC")
    listed = entries.to_pylist()
    assert [(one["number"], one["place"], one["action"]) for one in listed] == [
        *((0, 1, "open"), (1, 1, "fold"), (2, 1, "fold"), (3, 1, "fold")),
        *((4, 1, "rebuild"), (4, 2, "rebuild")),
    ]
    assert [one["task"] for one in listed] == ["", "t1", "t2", "t3", "t1", "t2"]
    assert [one["weight"] for one in listed] == [1.0, 1.0, 2.0, 1.0, 1.0, 2.0]
    assert [one["head"] for one in listed] == [False] * 4 + [True] * 2
    assert abs((datetime.now(UTC) - listed[0]["at"]).total_seconds()) < 300
    assert listed[-1]["why"] == 'a, "quoted" reason\nin two lines'

    scores = read("scores").to_pylist()
    assert [(one["ref"], one["task"], one["metric"], one["value"], one["samples"]) for one in scores] == [
        (ref, "t1", "accuracy", 0.5, 10),
        (ref, "t2", "f1", 0.25, 20),
    ]
    assert [one["factor"] for one in scores] == [None, 1.5]
    assert {one["state"] for one in scores} == {head.state}
    assert json.loads(scores[1]["about"]) == {"extra": "y"}


def test_a_table_reads_only_what_is_new(store: ArtifactStore, tmp_path: Path) -> None:
    file = index_file(tmp_path / "index", store.url)
    count = len(list(store.refs()))
    first = indexed(store, file)
    assert first.read == count
    assert indexed(store, file) == type(first)(first.rows, 0)
    new = checkpoint_of({"new": torch.ones(2)}, store)
    assert indexed(store, file).read == 1
    file.write_bytes(file.read_bytes() + b'{"ref":"update/12')  # killed in the middle of a line
    newer = checkpoint_of({"newer": torch.ones(2)}, store)
    found = indexed(store, file)
    assert found.read == 1 and {new, newer} <= found.rows.keys()
    assert indexed(store, file).read == 0
    store.objects.delete(new)
    assert new not in indexed(store, file).rows
    assert new not in file.read_text()
    file.write_text(file.read_text().replace(f'"index":{VERSION}', '"index":0'))
    assert indexed(store, file).read == count + 1
    assert indexed(store, file, rebuild=True).read == count + 1
    store.objects.put(newer, b"{}")
    assert indexed(store, file).unread == ()  # what was read once is known
    broken = indexed(store, file, rebuild=True)
    assert broken.unread == (newer,) and newer not in broken.rows


def test_a_table_says_what_it_lacks(store: ArtifactStore, tmp_path: Path) -> None:
    ref = CheckpointRef(next(iter(store.refs("checkpoint"))))
    store.objects.put(ref, b"{}")
    found = deltaworks("table", "artifacts", "--to", str(tmp_path / "a.csv"))
    assert found.exit_code == 1 and f"left out: {ref}" in found.output
    assert f'\n"{ref}' not in (tmp_path / "a.csv").read_text()
    assert "ends in one of .parquet, .csv" in deltaworks("table", "scores", "--to", str(tmp_path / "a.xls")).output
    absent = deltaworks("table", "scores", "--to", str(tmp_path / "absent" / "a.csv"))
    assert absent.exit_code == 1 and "cannot write" in absent.output
