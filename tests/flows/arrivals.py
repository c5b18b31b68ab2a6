"""A line, fine-tunings of its base in folders, and what can be wrong with them: what the tests of the service share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from flows.workplace import here
from storage.lines import Line
from storage.queue import Queue
from storage.refs import CheckpointRef
from tasks.codecs import Ternary
from tasks.inbox import fingerprint, offer_at
from tasks.intake import Intake
from tasks.mergers import Opcm
from tasks.recipe import Recipe
from tests.builders import ingested, perturbed, tiny_model

LINE = "support"
MODEL = tiny_model("LlamaForCausalLM")
INTAKE = Intake(codec=Ternary(density=0.5))


def open_line(folder: Path, name: str = LINE) -> CheckpointRef:
    """A line of the tiny model's, in the store of this process; its merger depends on the order."""
    store = here().store
    base = ingested(MODEL, folder / "base", store)
    Line(store.objects, name).open(base, Recipe(Opcm()).spec())
    Queue(store.objects, name).set_policy(INTAKE.spec())
    return base


def tuned(folder: Path, seed: int) -> Path:
    """A fine-tuning of the base, as transformers saves it."""
    perturbed(MODEL, seed).save_pretrained(folder)
    return folder


def submit(folder: Path, base: CheckpointRef, line: str = LINE, weight: float = 1.0) -> str:
    """Submit a folder by its path, as a watcher does; its content."""
    from storage.directory import DirectoryObjects

    place = DirectoryObjects(folder)
    content = fingerprint(place, offer_at(place))
    Queue(here().store.objects, line).submit(content, str(folder), base, folder.name, weight)
    return content


def with_nan(folder: Path, seed: int) -> Path:
    file = tuned(folder, seed) / "model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    tensors[first][0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def unreadable(folder: Path, seed: int) -> Path:
    (tuned(folder, seed) / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"this is no header of one")
    return folder


def pickled(folder: Path, seed: int) -> Path:
    (tuned(folder, seed) / "model.safetensors").unlink()
    torch.save(perturbed(MODEL, seed).state_dict(), folder / "pytorch_model.bin")
    return folder


def of_another_base(folder: Path, seed: int) -> Path:
    perturbed(tiny_model("BertForMaskedLM"), seed).save_pretrained(folder)
    return folder


def with_a_strange_config(folder: Path, seed: int) -> Path:
    config = json.loads((tuned(folder, seed) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "many", "num_attention_heads": None}))
    return folder


BAD: Mapping[str, tuple[object, str, str]] = {
    "nan": (with_nan, "InvalidInput", "NaN"),
    "unreadable": (unreadable, "InvalidInput", "not a readable safetensors file"),
    "pickled": (pickled, "InvalidInput", "pickles"),
    "other-base": (of_another_base, "Mismatch", "no name in common"),
    "strange": (with_a_strange_config, "InvalidInput", "hidden_size"),
}
