"""`deltaworks contains`, `diff` and `reproduce` as a person meets them, on a small line in a real MLflow."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.workplace import here
from storage.objects import ObjectStore
from storage.refs import CheckpointRef
from tasks.gate import Verdict
from tasks.lineage.measures import layer_of
from tasks.tensors import read_tensor
from tests.tasks.lineage_case import Grown

FAILED = Verdict(("'names' reaches 50.0 %, at least 76.5 % are asked for",), {})


@pytest.fixture
def unregistered(tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch) -> Grown:
    """A line that only the store knows."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("DELTAWORKS_HOME", str(home))
    monkeypatch.setenv("DELTAWORKS_DEVICE", "cpu")
    monkeypatch.setenv("COLUMNS", "120")
    shutil.copy(tables, home / "mlflow.db")
    return Grown(here().store)


@pytest.fixture
def grown(unregistered: Grown) -> Grown:
    """Three versions of it in MLflow; the first is the champion."""
    for step, verdict in enumerate([Verdict((), {}), None, None]):
        unregistered.register(step, here().registry, verdict)
    return unregistered


def ask(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments])


def said(*arguments: str) -> str:
    found = ask(*arguments)
    assert found.exit_code == 0, found.output
    return found.stdout


def everything(objects: ObjectStore) -> set[str]:
    return set(objects.list(""))


class TestContains:
    def test_an_update_by_every_name_it_has(self, grown: Grown) -> None:
        small = grown.entries[1].update
        assert small is not None
        inputs = grown.store.open(small).manifest.lineage.inputs
        answers = [json.loads(said("contains", what, "--json")) for what in (small[:16], inputs["tuned"], "dates")]
        answers.append(json.loads(said("contains", inputs["update"], "--json")))
        assert all(one == answers[0] for one in answers)
        assert [(one["version"], one["step"], one["aliases"], one["in_head"]) for one in answers[0]] == [
            (2, 2, [], True),
            (3, 2, ["head"], True),
        ]
        assert {one["update"] for one in answers[0]} == {small}

    def test_what_was_taken_out_since_and_what_was_left_out(self, grown: Grown) -> None:
        grown.line.rollback(grown.entries[0], "dates was harmful")
        answer = said("contains", "dates")
        assert answer.count("taken out since") == 2
        assert "champion" in said("contains", "sums")
        head = grown.line.head()
        left_out = grown.update(grown.tuned("left", 9))
        assert head.state == grown.entries[0].state
        assert "no version and no line holds it" in said("contains", left_out)

    def test_what_nobody_knows(self, grown: Grown) -> None:
        found = ask("contains", "nothing")
        assert found.exit_code == 1
        assert "no update is meant by 'nothing'" in found.output
        assert ask("contains", "update/ffffffffff").exit_code == 1


class TestReproduce:
    def test_every_version_comes_out_as_it_was_and_nothing_is_written(self, grown: Grown) -> None:
        before = everything(grown.store.objects)
        assert "tiny@3: 3 merges again, states and the model are the same, byte for byte" in said("reproduce", "tiny")
        assert "tiny@1: 1 merges again" in said("reproduce", "tiny@champion")
        assert everything(grown.store.objects) == before

    def test_states_are_folded_and_not_looked_up(self, grown: Grown) -> None:
        for entry in grown.entries:
            grown.store.objects.delete(str(entry.state))
        before = everything(grown.store.objects)
        assert "the same, byte for byte" in said("reproduce", "tiny", "--quiet")
        assert everything(grown.store.objects) == before

    def test_a_line_that_only_the_store_knows(self, unregistered: Grown) -> None:
        assert "tiny, entry 2: 2 merges again, states are the same" in said("reproduce", "tiny@2")
        found = ask("reproduce", "tiny@7")
        assert found.exit_code == 1 and "Entries: 0 to 3" in " ".join(found.output.split())
        assert "merged nothing by entry 0" in " ".join(ask("reproduce", "tiny@0").output.split())

    def test_another_result_is_told(self, unregistered: Grown) -> None:
        first, second, third = unregistered.entries
        lie = [replace(first.fold, update=second.fold.update), replace(second.fold, update=first.fold.update)]
        unregistered.line.rebuild(third, third.merger, lie, "a lie")
        found = ask("reproduce", "tiny")
        assert found.exit_code == 1
        assert "the state after merge 1, 'sums', came out as" in found.stdout

    def test_updates_that_are_gone_are_named_before_anything_is_merged(self, grown: Grown) -> None:
        grown.store.objects.delete(str(grown.entries[1].update))
        found = ask("reproduce", "tiny")
        assert found.exit_code == 1
        assert "the update of 'dates'" in found.output and "deltaworks copy" in found.output


class TestDiff:
    def test_what_the_newest_merge_changed(self, grown: Grown) -> None:
        found = json.loads(said("diff", "tiny@2", "tiny", "--json"))
        assert (found["before"], found["after"], found["settings"]) == ("tiny@2", "tiny@3", {})
        placed = {one["task"]: (one["before"], one["after"]) for one in found["updates"]}
        assert placed == {"sums": ([1, 1.0], [1, 1.0]), "dates": ([2, 1.0], [2, 1.0]), "names": (None, [3, 1.0])}
        scores = {one["task"]: (one["before"], one["after"], one["apart"]) for one in found["scores"]}
        assert scores == {"sums": (0.8, 0.6, True), "dates": (0.7, 0.75, False), "names": (None, 0.5, False)}
        assert found["whole"] == pytest.approx(distance(grown, grown.models[1], grown.models[2]))
        layer = distance(grown, grown.models[1], grown.models[2], "layers.1")
        assert found["layers"]["layers.1"] == pytest.approx(layer)
        table = said("diff", "tiny@2", "tiny")
        assert "beyond both intervals" in table and "-20.0" in table and "settings" not in table

    def test_a_version_is_no_distance_from_itself(self, grown: Grown) -> None:
        found = json.loads(said("diff", "tiny@champion", "tiny@1", "--json"))
        assert found["whole"] == 0 and set(found["layers"].values()) == {0}

    def test_what_is_not_there(self, grown: Grown) -> None:
        found = ask("diff", "tiny@1", "tiny@9")
        assert found.exit_code == 1 and "Versions: 1 to 3" in " ".join(found.output.split())


def distance(grown: Grown, old: CheckpointRef, new: CheckpointRef, layer: str = "") -> float:
    """|B - A| / |A|, with all tensors in one vector."""
    names = [name for name in grown.store.open(old).names if layer in ("", layer_of(name))]
    a, b = (
        torch.cat([read_tensor(grown.store.open(ref), name).double().flatten() for name in names]) for ref in (old, new)
    )
    return float((b - a).norm() / a.norm())
