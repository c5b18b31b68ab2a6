"""Inboxes: which checkpoints are complete, and that the same bytes are the same content wherever they lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from storage.address import open_objects
from storage.directory import DirectoryObjects
from storage.errors import InvalidInput, Mismatch
from storage.objects import ObjectStore
from storage.refs import CheckpointRef
from tasks.inbox import Offer, fingerprint, lacking, offer_at, offers
from tasks.ingest import Checkpoint, ingest
from tasks.receive import receive
from tests.builders import memory_store, tiny_model

BASE = CheckpointRef(f"checkpoint/{'0' * 64}")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in two layouts: a single file, and shards with an index."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model("LlamaForCausalLM")
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "sharded", max_shard_size="20KB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 2
    return folder


def only(inbox: ObjectStore) -> Offer:
    (found,) = offers(inbox)
    return found


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_it_is_complete_when_the_last_file_is_there(layout: str, models: Path, tmp_path: Path) -> None:
    """Files come one by one, in every order that begins with another one; nothing is complete before the last."""
    files = sorted(path.name for path in (models / layout).iterdir() if path.name != "generation_config.json")
    for turn in range(len(files)):
        folder = tmp_path / str(turn) / "run"
        folder.mkdir(parents=True)
        inbox = DirectoryObjects(folder.parent)
        for name in files[turn:] + files[:turn]:
            assert all(lacking(inbox, one) for one in offers(inbox)), name
            shutil.copy(models / layout / name, folder)
        assert lacking(inbox, only(inbox)) == ""


def test_a_file_that_still_grows_is_not_complete(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "single", tmp_path / "run")
    whole = (models / "single" / "model.safetensors").read_bytes()
    inbox = DirectoryObjects(tmp_path)
    for size in (0, 4, 8, 100, len(whole) - 1):
        (tmp_path / "run" / "model.safetensors").write_bytes(whole[:size])
        assert lacking(inbox, only(inbox)) == "the end of model.safetensors"
    before = only(inbox).signature
    (tmp_path / "run" / "model.safetensors").write_bytes(whole)
    assert lacking(inbox, only(inbox)) == ""
    assert only(inbox).signature != before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_settings_that_are_still_written_are_not_complete(name: str, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "sharded", tmp_path / "run")
    file = tmp_path / "run" / name
    file.write_bytes(file.read_bytes()[:-20])
    inbox = DirectoryObjects(tmp_path)
    assert lacking(inbox, only(inbox)) == f"the end of {name}"


def test_shards_say_by_their_names_how_many_there_are(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "sharded", tmp_path / "run")
    (tmp_path / "run" / "model.safetensors.index.json").write_text("{")
    last = max(path.name for path in (tmp_path / "run").glob("*.safetensors"))
    (tmp_path / "run" / last).unlink()
    inbox = DirectoryObjects(tmp_path)
    assert lacking(inbox, only(inbox)) == last


def test_a_marker_speaks_for_all_until_something_newer_comes(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "single", tmp_path / "run", copy_function=shutil.copy)
    (tmp_path / "run" / "config.json").unlink()
    inbox = DirectoryObjects(tmp_path)
    assert lacking(inbox, only(inbox)) == "config.json"
    (tmp_path / "run" / "_SUCCESS").touch()
    assert lacking(inbox, only(inbox)) == ""
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    assert lacking(inbox, only(inbox)) == "config.json"


def test_what_can_never_be_read_lacks_nothing(models: Path, tmp_path: Path) -> None:
    for name, file in (("bad", "model.safetensors"), ("pickled", "pytorch_model.bin")):
        (tmp_path / name).mkdir()
        shutil.copy(models / "single" / "config.json", tmp_path / name)
        (tmp_path / name / file).write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00no header at all, but long enough")
    inbox = DirectoryObjects(tmp_path)
    assert [(one.folder, lacking(inbox, one)) for one in offers(inbox)] == [("bad", ""), ("pickled", "")]


def test_offers_are_folders_with_weights_at_any_depth(models: Path, tmp_path: Path) -> None:
    for place in ("a", "team/b", "team/b/checkpoint-100"):
        shutil.copytree(models / "single", tmp_path / place, dirs_exist_ok=True)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "train.txt").write_text("loss 1.0")
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "optimizer.pt").write_bytes(b"state")
    found = offers(DirectoryObjects(tmp_path))
    assert [(one.folder, one.name) for one in found] == [
        ("a", "a"),
        ("team/b", "b"),
        ("team/b/checkpoint-100", "checkpoint-100"),
    ]


def test_the_content_is_its_weights(models: Path, tmp_path: Path) -> None:
    inbox = DirectoryObjects(tmp_path)
    for place in ("a", "b"):
        shutil.copytree(models / "single", tmp_path / place)
    (tmp_path / "b" / "optimizer.pt").write_bytes(b"state")
    (tmp_path / "b" / "trainer_state.json").write_text("{}")
    (tmp_path / "b" / "_SUCCESS").touch()
    first, second = offers(inbox)
    assert fingerprint(inbox, first) == fingerprint(inbox, second)
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    assert fingerprint(inbox, first) == fingerprint(inbox, offers(inbox)[1])
    file = tmp_path / "b" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    assert fingerprint(inbox, first) != fingerprint(inbox, offers(inbox)[1])


def test_receive_holds_the_files_against_what_was_submitted(models: Path, tmp_path: Path, s3_url: str) -> None:
    store = memory_store()
    wanted = ingest(Checkpoint(source=str(models / "sharded")), store)
    shutil.copytree(models / "sharded", tmp_path / "run")
    bucket = open_objects(f"{s3_url}/inbox/run")
    for path in (tmp_path / "run").iterdir():
        bucket.put(path.name, path.read_bytes())
    content = fingerprint(bucket, offer_at(bucket))
    for place in (str(tmp_path / "run"), f"{s3_url}/inbox/run"):
        assert receive(content, place, BASE, store) == wanted
    assert receive(content, wanted, BASE, store) == wanted
    shard = next(path.name for path in (tmp_path / "run").glob("*.safetensors"))
    bucket.put(shard, b"something else")
    (tmp_path / "run" / shard).write_bytes(b"something else")
    for place in (str(tmp_path / "run"), f"{s3_url}/inbox/run"):
        with pytest.raises(Mismatch, match="those that were submitted"):
            receive(content, place, BASE, store)
    with pytest.raises(InvalidInput, match="no weights"):
        receive(content, f"{s3_url}/elsewhere", BASE, store)


def test_what_is_wrong_is_said_of_the_address_not_of_a_copy(models: Path, s3_url: str) -> None:
    bucket = open_objects(f"{s3_url}/inbox/run")
    bucket.put("model.safetensors", (models / "single" / "model.safetensors").read_bytes())
    with pytest.raises(InvalidInput, match=f"{s3_url}/inbox/run has no config.json"):
        receive(fingerprint(bucket, offer_at(bucket)), f"{s3_url}/inbox/run", BASE, memory_store())


def test_an_index_does_not_lead_out_of_its_folder(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "sharded", tmp_path / "run")
    index = tmp_path / "run" / "model.safetensors.index.json"
    named = json.loads(index.read_text())
    shutil.copy(models / "single" / "model.safetensors", tmp_path)
    named["weight_map"] = dict.fromkeys(named["weight_map"], "../model.safetensors")
    index.write_text(json.dumps(named))
    with pytest.raises(InvalidInput, match="not a file of this folder"):
        ingest(Checkpoint(source=str(tmp_path / "run")), memory_store())
