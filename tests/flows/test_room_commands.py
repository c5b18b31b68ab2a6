"""`deltaworks verify`, `du`, `prune`, `pin` as a person meets them."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.words import seconds
from storage.artifacts import ArtifactStore
from storage.checked import Checked
from storage.directory import DirectoryObjects
from storage.errors import InvalidInput
from storage.lines import Line
from storage.refs import Ref, short
from storage.registry import Registry, Stage
from tasks.mergers import Average
from tasks.recipe import Recipe
from tasks.sizes import size
from tests.builders import checkpoint_of
from tests.tasks.test_refold import grow


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    """A store with a line of three merges, and a checkpoint that nobody wants."""
    monkeypatch.setenv("DELTAWORKS_HOME", str(tmp_path))
    monkeypatch.setenv("DELTAWORKS_STORE", f"file://{tmp_path}/store")
    monkeypatch.setenv("COLUMNS", "100")
    store = ArtifactStore(DirectoryObjects(tmp_path / "store"))
    grow(store, Recipe(Average()), 3)
    checkpoint_of({"loose": torch.ones(5000)}, store)
    return store


@pytest.fixture
def loose(store: ArtifactStore) -> Ref:
    (found,) = (ref for ref in store.refs("checkpoint") if "loose" in store.open(ref))
    return found


def deltaworks(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def data(*arguments: str) -> Any:
    found = deltaworks(*arguments)
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def age(store: ArtifactStore, days: float) -> None:
    then = time.time() - days * 86_400
    assert isinstance(store.objects, DirectoryObjects)
    for path in store.objects.root.rglob("*"):
        os.utime(path, (then, then))


def test_prune_shows_then_removes(store: ArtifactStore, loose: Ref) -> None:
    assert "nothing needs 0 objects" in deltaworks("prune").output
    assert "2 more" in deltaworks("prune").output and "younger than 7 days" in deltaworks("prune").output
    age(store, 8)
    before = list(store.objects.list(""))
    for words in (("prune",), ("prune", "--dry-run"), ("prune", "--yes", "--dry-run")):
        shown = deltaworks(*words)
        assert shown.exit_code == 0, shown.output
        assert short(loose) in shown.output and "--yes does it" in shown.output
        assert list(store.objects.list("")) == before
    listed = data("prune", "--json")
    assert listed["manifests"] == [loose] and len(listed["blobs"]) == 1
    done = deltaworks("prune", "--yes")
    assert done.exit_code == 0 and "2 objects removed" in done.output
    assert set(before) - set(store.objects.list("")) == {loose, *listed["blobs"]}
    states, sizes = set(store.refs("state")), {one.key: one.bytes for one in store.objects.listed("")}
    done = data("prune", "--yes", "--json", "--states")
    gone = set(sizes) - set(store.objects.list(""))
    assert {key for key in gone if key.startswith("state/")} == states - {Line(store.objects, "main").head().state}
    assert done == {"objects": len(gone), "bytes": sum(sizes[key] for key in gone), "harmed": []}
    assert deltaworks("verify", "--all").exit_code == 0


def test_a_registered_model_stays(store: ArtifactStore, loose: Ref, tmp_path: Path) -> None:
    age(store, 8)
    registry = Registry(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "artifacts")
    registry.register("chain", "key", Stage("main", loose), [], store.address(loose), "")
    assert data("prune", "--json")["manifests"] == []


def test_without_its_registry_a_prune_stops(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to know what is registered is no reason to think that nothing is."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    age(store, 8)
    before = list(store.objects.list(""))
    found = deltaworks("prune", "--yes")
    assert found.exit_code == 1 and "Unavailable: MLflow at http://127.0.0.1:9" in found.output
    assert list(store.objects.list("")) == before


def test_pins_keep_and_let_go(store: ArtifactStore, loose: Ref) -> None:
    age(store, 8)
    assert deltaworks("pin", loose[:20], "--why", "a [keeper]").exit_code == 0
    assert f"{loose}  20" in deltaworks("pins").output and "a [keeper]" in deltaworks("pins").output
    assert data("pins", "--json")[0]["ref"] == loose
    assert data("prune", "--json")["manifests"] == []
    assert deltaworks("unpin", loose[:20]).exit_code == 0
    assert "nothing is pinned" in deltaworks("pins").output
    assert data("prune", "--json")["manifests"] == [loose]
    assert "not pinned" in deltaworks("unpin", loose).output


def test_du_adds_up(store: ArtifactStore, loose: Ref) -> None:
    age(store, 8)
    found = data("du", "--json")
    total = sum(one.bytes for one in store.objects.listed(""))
    assert (found["bytes"], found["objects"]) == (total, len(list(store.objects.list(""))))
    own = sum(store.objects.size(key) or 0 for key in (loose, f"blob/{store.open(loose).record('loose').blob}"))
    assert found["unneeded_bytes"] == own and found["unneeded_objects"] == 2
    line = found["lines"]["main"]
    assert line["artifacts"] == 1 + 3 + 3
    assert line["bytes"] == line["alone"] == total - own - found["others"]["line"]
    artifacts = sum(one["alone"] for one in found["kinds"].values())
    assert artifacts <= total - found["others"]["line"] == found["apart"] - found["shared"]
    assert set(found["updates"]) == set(store.refs("update"))
    printed = deltaworks("du").output
    assert "main" in printed and "unneeded  2 objects" in printed and size(total) in printed


def test_verify_a_line_and_repair_it(store: ArtifactStore, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    head = Line(store.objects, "main").head()
    record = store.open(head.update or "").manifest.tensors[0]
    blob = tmp_path / "store" / "blob" / record.blob
    blob.write_bytes(b"?")
    bad = deltaworks("verify", "--line", "main")
    assert bad.exit_code == 1
    assert f"blob/{record.blob}" in bad.output and "line 'main' entry 3" in bad.output
    listed = deltaworks("verify", "--all", "--json")
    assert listed.exit_code == 1
    (finding,) = json.loads(listed.stdout)["bad"]
    assert finding["object"] == f"blob/{record.blob}" and short(head.update or "") in finding["needed_by"]
    mended = deltaworks("verify", "--line", "main", "--repair-from", f"file://{tmp_path}/copy")
    assert mended.exit_code == 0, mended.output
    assert f"repaired  blob/{record.blob}" in mended.output
    assert deltaworks("verify", "--all").exit_code == 0
    nothing = deltaworks("verify", "--line", "main", "--all")
    assert nothing.exit_code == 2 and "either a ref, --line or --all" in nothing.output


def test_verify_goes_on_after_an_interruption(store: ArtifactStore, tmp_path: Path) -> None:
    blobs = [key.partition("/")[2] for key in store.objects.list("blob/")]
    for words, expected in (((), 3), (("--afresh",), 0)):
        checked = Checked.of_store(tmp_path / "verified", store.url)
        for blob in blobs[:3]:
            checked.add(blob, 1)
        checked.close()
        assert data("verify", "--all", "--json", *words)["resumed"] == expected
        assert not list((tmp_path / "verified").iterdir())


def test_a_rollback_to_a_pruned_state_merges_it_again(store: ArtifactStore) -> None:
    line = Line(store.objects, "main")
    second = line.history()[1].fold.state
    assert deltaworks("prune", "--states", "--grace", "0", "--yes").exit_code == 0
    assert not store.has(second)
    told = deltaworks("verify", "--all")
    assert told.exit_code == 0 and "2 older states of line 'main' were pruned" in told.output
    back = deltaworks("line", "rollback", "main", "2", "--why", "a test")
    assert back.exit_code == 0, back.output
    assert "2 states were pruned: merging again" in back.output
    assert (line.head().state, store.has(second)) == (second, True)
    assert deltaworks("line", "rollback", "main", "--entry", "3", "--why", "forth again").exit_code == 0


@pytest.mark.parametrize(
    ("text", "expected"), [("7d", 604_800), ("12h", 43_200), ("1.5m", 90), ("0", 0), ("2w", 1_209_600)]
)
def test_times(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "7 days", "1y", "nan"])
def test_no_times(text: str) -> None:
    with pytest.raises(InvalidInput, match="is not a time"):
        seconds(text)


def test_sizes() -> None:
    assert [size(one) for one in (0, 999, 1000, 5.25e6, 7e12, 7e15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "5.2 MB",
        "7.0 TB",
        "7000.0 TB",
    ]
