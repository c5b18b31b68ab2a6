"""Watching an inbox: complete and new is queued once, whatever happens to the watcher or its cursor."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from storage.address import open_objects
from storage.artifacts import ArtifactStore
from storage.errors import Missing
from storage.lines import Line
from storage.objects import ObjectStore
from storage.refs import CheckpointRef
from tasks.inbox import fingerprint, offer_at
from tasks.mergers import Average
from tasks.recipe import Recipe
from tasks.watch import CHANGING, Watch
from tests.builders import memory_store, perturbed, tiny_model

BASE = CheckpointRef(f"checkpoint/{'0' * 64}")  # type: ignore[arg-type]
MODEL = tiny_model("LlamaForCausalLM")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed in range(4):
        perturbed(MODEL, seed).save_pretrained(folder / str(seed), max_shard_size="20KB")
    return folder


@pytest.fixture
def store() -> ArtifactStore:
    store = memory_store()
    Line(store.objects, "main").open(BASE, Recipe(Average()).spec())
    return store


@pytest.fixture(params=["folder", "s3"])
def inbox(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return open_objects(request.getfixturevalue("s3_url") if request.param == "s3" else str(tmp_path / "inbox"))


def upload(inbox: ObjectStore, model: Path, folder: str, names: list[str] | None = None) -> None:
    for path in sorted(model.iterdir()):
        if names is None or path.name in names:
            inbox.put(f"{folder}/{path.name}", path.read_bytes())


def test_a_checkpoint_is_queued_when_it_is_complete_and_still(
    inbox: ObjectStore, models: Path, store: ArtifactStore
) -> None:
    watch = Watch(inbox, "main", store)
    assert watch.look().is_settled
    names = sorted(path.name for path in (models / "1").iterdir())
    upload(inbox, models / "1", "team/run-1", names[:-2])
    first = watch.look()
    assert "team/run-1" in first.waiting and first.waiting["team/run-1"] != CHANGING
    assert watch.look().queued == ()
    upload(inbox, models / "1", "team/run-1", names[-2:])
    assert watch.look().waiting == {"team/run-1": CHANGING}
    (one,) = watch.look().queued
    assert (one.task, one.base, one.state) == ("run-1", BASE, "pending")
    assert one.reference == f"{inbox.url}/team/run-1"
    assert watch.look() == watch.look() == Watch(inbox, "main", store).look()
    assert len(watch.queue.submissions()) == 1


def test_a_marker_is_enough(inbox: ObjectStore, models: Path, store: ArtifactStore) -> None:
    upload(inbox, models / "1", "run")
    inbox.put("run/_SUCCESS", b"")
    assert [one.task for one in Watch(inbox, "main", store).look().queued] == ["run"]


def looks(watch: Watch, times: int = 2) -> list[str]:
    return [one.task for _ in range(times) for one in watch.look().queued]


def test_the_same_bytes_again_start_nothing(tmp_path: Path, models: Path, store: ArtifactStore) -> None:
    inbox = open_objects(str(tmp_path))
    watch = Watch(inbox, "main", store)
    upload(inbox, models / "1", "first")
    assert looks(watch) == ["first"]
    upload(inbox, models / "1", "second")
    upload(inbox, models / "1", "first")
    for _ in range(3):
        looked = watch.look()
        assert not looked.queued
    assert len(watch.queue.submissions()) == 1
    upload(inbox, models / "2", "first")  # other bytes in the same place are something new
    assert looks(watch) == ["first"]
    assert [one.task for one in watch.queue.submissions()] == ["first", "first"]


@pytest.mark.parametrize("cursor", [None, b"", b"[]", b'{"folders": {"first": 3}}', b"old"])
def test_a_lost_cursor_queues_nothing_twice(
    cursor: bytes | None, tmp_path: Path, models: Path, store: ArtifactStore
) -> None:
    inbox = open_objects(str(tmp_path))
    watch = Watch(inbox, "main", store)
    upload(inbox, models / "1", "first")
    watch.look()
    old = store.objects.get(watch.key)
    assert json.loads(old)["inbox"] == inbox.url
    assert looks(watch, 1) == ["first"]
    if cursor is None:
        store.objects.delete(watch.key)
    else:
        store.objects.put(watch.key, old if cursor == b"old" else cursor)
    watch = Watch(inbox, "main", store)
    found = [watch.look(), watch.look()]
    assert not any(one.queued for one in found)
    assert any("first" in one.known for one in found)


def test_a_watcher_that_is_killed_loses_nothing(tmp_path: Path, models: Path, store: ArtifactStore) -> None:
    """Between the queue and the cursor, and between two looks."""
    inbox = open_objects(str(tmp_path))
    upload(inbox, models / "1", "first")
    Watch(inbox, "main", store).look()

    class Killed(BaseException):
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.objects, "put", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            Watch(inbox, "main", store).look()
    assert not looks(Watch(inbox, "main", store))
    assert [one.task for one in Watch(inbox, "main", store).queue.submissions()] == ["first"]


def test_the_order_is_that_of_completion(tmp_path: Path, models: Path, store: ArtifactStore) -> None:
    inbox = open_objects(str(tmp_path))
    for age, (folder, model) in enumerate([("c", "1"), ("a", "2"), ("b", "3")]):
        upload(inbox, models / model, folder)
        for path in (tmp_path / folder).iterdir():
            os.utime(path, (1_700_000_000 + age, 1_700_000_000 + age))
    assert looks(Watch(inbox, "main", store)) == ["c", "a", "b"]


def test_what_cannot_be_read_is_refused_and_the_others_go_on(
    tmp_path: Path, models: Path, store: ArtifactStore
) -> None:
    shutil.copytree(models / "1", tmp_path / "with space")
    shutil.copytree(models / "2", tmp_path / "good")
    watch = Watch(open_objects(str(tmp_path)), "main", store)
    watch.look()
    looked = watch.look()
    assert [one.task for one in looked.queued] == ["good"]
    assert "not an object key" in looked.refused["with space"]


def test_uploads_in_any_order_and_pauses_are_queued_once_and_whole(
    tmp_path: Path, models: Path, store: ArtifactStore
) -> None:
    """Files come in pieces and in any order while somebody looks, and some watchers are new."""
    for seed in range(12):
        draw = random.Random(seed)
        inbox, line = open_objects(str(tmp_path / str(seed))), f"line-{seed}"
        Line(store.objects, line).open(BASE, Recipe(Average()).spec())
        watch = Watch(inbox, line, store)
        writes = []
        for model in ("0", "1", "2"):
            for path in (models / model).iterdir():
                data = path.read_bytes()
                halves = [data[: len(data) // 2], data] if draw.random() < 0.5 else [data]
                writes.append([(f"{model}/{path.name}", half) for half in halves])
        draw.shuffle(writes)
        queued = []
        while writes:
            lot = writes.pop()
            inbox.put(*lot.pop(0))
            if lot:
                writes.insert(draw.randint(0, len(writes)), lot)
            if draw.random() < 0.3:
                queued += [one.task for one in watch.look().queued]
            if draw.random() < 0.1:
                watch = Watch(inbox, line, store)
        queued += looks(watch, 3)
        assert sorted(queued) == ["0", "1", "2"], seed
        for one in watch.queue.submissions():
            whole = open_objects(str(models / one.task))
            assert one.content == fingerprint(whole, offer_at(whole)), seed


def test_a_line_that_is_not_there_is_said(tmp_path: Path, store: ArtifactStore) -> None:
    with pytest.raises(Missing, match="no line 'other'"):
        Watch(open_objects(str(tmp_path)), "other", store).look()
