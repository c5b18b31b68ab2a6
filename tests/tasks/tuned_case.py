"""A tiny base, a model tuned from it and its update: what the tests of exports begin with."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from storage.artifacts import ArtifactStore
from storage.objects import MemoryObjects
from tasks.exports import (
    Applied,
    open_applied,
)
from tasks.extract import Extract, extract_update
from tests.builders import ingested, memory_store, perturbed, tiny_model


class Case:
    """A base, a model tuned from it, the update, and a store without the tuned checkpoint if it is not `kept`."""

    def __init__(self, base: PreTrainedModel, tuned: PreTrainedModel, folder: Path, *, kept: bool = True) -> None:
        self.base, self.tuned, self.folder = base, tuned, folder
        self.store = memory_store()
        self.before = ingested(base, folder / "base", self.store)
        self.after = ingested(tuned, folder / "tuned", self.store)
        self.update = extract_update(self.before, self.after, Extract(), self.store)
        self.out = folder / "out"
        if not kept:
            self.forget()

    def forget(self) -> None:
        forget(self.store, self.after)

    @property
    def applied(self) -> Applied:
        return open_applied(self.update, self.store)

    def files(self, side: str) -> dict[str, Tensor]:
        return load_file(self.folder / side / "model.safetensors")


def forget(store: ArtifactStore, ref: str) -> None:
    assert isinstance(store.objects, MemoryObjects)
    del store.objects._objects[ref]


def case(architecture: str, folder: Path, *, kept: bool = True, dtype: torch.dtype = torch.float32) -> Case:
    base = tiny_model(architecture).to(dtype)
    return Case(base, perturbed(base), folder, kept=kept)


def edited(model: PreTrainedModel, change: Callable[[str, Tensor], None]) -> PreTrainedModel:
    found = deepcopy(model)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            change(name, parameter)
    return found


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])
