"""`deltaworks line fold` as a person meets it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from storage.address import open_objects
from storage.artifacts import ArtifactStore
from storage.lines import Line
from storage.refs import UpdateRef
from tests.builders import checkpoint_of, random_tensors, update_of


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    monkeypatch.setenv("DELTAWORKS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DELTAWORKS_STORE", f"file://{tmp_path}/store")
    monkeypatch.setenv("DELTAWORKS_DEVICE", "cpu")
    return ArtifactStore(open_objects(f"file://{tmp_path}/store"))


@pytest.fixture
def updates(store: ArtifactStore) -> list[UpdateRef]:
    base = checkpoint_of(random_tensors(0), store)
    return [update_of(random_tensors(seed), base, store) for seed in (1, 2, 3)]


def fold(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["line", "fold", *arguments])


def test_begin_a_line_go_on_and_do_nothing_twice(store: ArtifactStore, updates: list[UpdateRef]) -> None:
    first = fold("mine", *updates[:2], "--merger", "tsv_m", "--quiet")
    assert first.exit_code == 0, first.stderr
    assert "next: " in first.output
    second = fold("mine", updates[2][:20], "--task", "third", "--quiet")
    assert second.exit_code == 0, second.stderr
    again = fold("mine", updates[0], "--quiet")
    assert "already, as step 1" in again.output
    line = Line(store.objects, "mine")
    assert [entry.update for entry in line.history()] == updates
    assert (line.head().merger["name"], line.head().task) == ("tsv_m", "third")


def test_mistakes_are_answered_and_change_nothing(store: ArtifactStore, updates: list[UpdateRef]) -> None:
    for arguments, said in (
        ((updates[0],), "there is no line 'mine'"),
        ((updates[0], "--merger", "tsvm"), "did you mean tsv_m"),
        ((*updates, "--task", "all"), "--task names a single update"),
        (("update/ffff", "--merger", "average"), "no update in"),
    ):
        done = fold("mine", *arguments)
        assert done.exit_code == 1
        assert said in " ".join(done.stderr.split())
    assert Line.names(store.objects) == []
    assert fold("mine", updates[0], "--merger", "average", "--quiet").exit_code == 0
    other = fold("mine", updates[1], "--merger", "ties")
    assert other.exit_code == 1
    assert "line rebuild mine --merger ties" in " ".join(other.stderr.split())
    assert Line(store.objects, "mine").head().step == 1
