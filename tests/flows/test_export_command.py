"""`deltaworks export` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from flows.cli import app
from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.refs import CheckpointRef, UpdateRef
from tasks.codecs import CODECS, Ternary
from tasks.compress import compress_update
from tasks.extract import Extract, extract_update
from tests.builders import ingested, perturbed, tiny_model


class Place:
    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.store = ArtifactStore(DirectoryObjects(folder / "store"))
        self.base = tiny_model("LlamaForCausalLM").bfloat16()
        self.tuned = perturbed(self.base)
        self.before: CheckpointRef = ingested(self.base, folder / "base", self.store)
        self.after: CheckpointRef = ingested(self.tuned, folder / "tuned", self.store)
        self.update: UpdateRef = extract_update(self.before, self.after, Extract(), self.store)

    def export(self, what: str, *options: str) -> Result:
        return CliRunner().invoke(app, ["export", what, str(self.out), *options])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("DELTAWORKS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DELTAWORKS_STORE", f"file://{tmp_path}/store")
    monkeypatch.setenv("DELTAWORKS_DEVICE", "cpu")
    monkeypatch.setenv("COLUMNS", "100")
    return Place(tmp_path)


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("form", [(), ("--as", "model"), ("--as", "checkpoint")])
def test_a_checkpoint(place: Place, form: tuple[str, ...]) -> None:
    found = place.export(place.after[:20], *form)
    assert found.exit_code == 0, found.output
    assert "AutoModel.from_pretrained" in found.stdout
    model = AutoModelForCausalLM.from_pretrained(place.out, dtype="auto")
    assert all(torch.equal(tensor, place.tuned.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("form", [(), ("--as", "model"), ("--as", "checkpoint")])
def test_an_update_as_a_model(place: Place, form: tuple[str, ...]) -> None:
    exact = compress_update(place.update, CODECS["exact"](), place.store)
    found = place.export(exact[:20], *form)
    assert found.exit_code == 0, found.output
    assert "bit for bit the tuned checkpoint" in found.stdout
    model = AutoModelForCausalLM.from_pretrained(place.out, dtype="auto")
    assert all(torch.equal(tensor, place.tuned.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_lossy_update_as_a_model_says_so(place: Place) -> None:
    small = compress_update(place.update, Ternary(density=0.2), place.store)
    found = place.export(small)
    assert found.exit_code == 0, found.output
    assert "base + update, cast to the base's dtypes" in found.stdout


def test_an_adapter(place: Place) -> None:
    found = place.export(place.update, "--as", "lora", "--rank", "3", "--skip", "--dtype", "bfloat16", "--workers", "1")
    assert found.exit_code == 0, found.output
    said = words(found.stdout)
    assert "7 linear weights of rank 3" in said and "left out: 4 changed parameters" in said
    about = json.loads((place.out / "deltaworks.json").read_bytes())
    assert f"relative error in all: {about['error']:.2%}" in said and about["update"] == place.update
    assert {tensor.dtype for tensor in load_file(place.out / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert PeftModel.from_pretrained(place.base, place.out).peft_config["default"].r == 3


def test_an_adapter_within_an_error(place: Place) -> None:
    found = place.export(place.update, "--as", "lora", "--error", "0.3")
    assert found.exit_code == 0, found.output
    about = json.loads((place.out / "deltaworks.json").read_bytes())
    assert 0.2 < max(one["error"] for one in about["tensors"].values()) <= 0.3


def test_a_patch_and_a_task_vector(place: Place) -> None:
    found = place.export(place.update, "--as", "patch")
    assert found.exit_code == 0, found.output
    assert "the tuned tensors bit for bit" in words(found.stdout)
    assert (place.out / "patch.json").exists()
    place.out = place.folder / "delta"
    found = place.export(place.update, "--as", "delta", "--dtype", "bfloat16", "--quiet")
    assert found.exit_code == 0, found.output
    assert {tensor.dtype for tensor in load_file(place.out / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--as", "patch", "--rank", "3"), "--rank does not go with --as patch. It belongs to --as lora"),
        (("--dtype", "float16"), "--dtype does not go with --as model. It belongs to --as lora or delta"),
        (("--as", "delta", "--skip", "--dtype", "float16"), "--skip does not go with --as delta"),
        (("--as", "lora", "--rank", "3", "--error", "0.1"), "Give one of them"),
        (("--as", "lora", "--rank", "0"), "rank must be positive"),
        (("--as", "lora", "--error", "1.5"), "error must be in [0, 1)"),
        (("--as", "delta", "--dtype", "int8"), "not one of float32, bfloat16, float16"),
    ],
)
def test_wrong_options_are_explained(place: Place, options: tuple[str, ...], message: str) -> None:
    found = place.export(place.update, *options)
    assert found.exit_code == 1, found.output
    assert message in words(found.stderr)
    assert not place.out.exists()


def test_forms_of_updates_are_refused_for_models(place: Place) -> None:
    found = place.export(place.after, "--as", "patch")
    assert found.exit_code == 1
    assert "only updates are exported as patch" in words(found.stderr)


def test_nothing_is_overwritten(place: Place) -> None:
    place.out.mkdir()
    (place.out / "mine").write_text("kept")
    for form in ("model", "lora", "patch", "delta"):
        found = place.export(place.update, "--as", form)
        assert found.exit_code == 1 and "not empty" in words(found.stderr)
    assert (place.out / "mine").read_text() == "kept"
