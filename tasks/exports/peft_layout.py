"""Which modules of a model an adapter of peft replaces, and which get low-rank factors.

peft can say three things of a module: factors are added to its weight (`target_modules`), with a change of its bias if
all such modules have one (`lora_bias`); or it is kept whole (`modules_to_save`: norms, embeddings, convolutions). It
finds modules by the ends of their names, and wants every tensor of every module that it found. So the closure is taken
here: what an entry of `modules_to_save` would also match is saved too. Weights that are tied are two modules to peft,
and both are saved. What it cannot name that way is put in place in the base. (peft 0.21: utils/other.py,
utils/save_and_load.py, tuners/tuners_utils.py.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from tasks.naming import Skeleton

LINEAR = "linear.weight"


@dataclass(frozen=True)
class Linear:
    """A module with a linear weight: its path in the model, and the canonical names of its parameters."""

    path: str
    weight: str
    bias: str | None


class Kept(NamedTuple):
    """Paths of modules that are saved whole, and canonical names of parameters that are put in place in the base.

    The latter is what peft does with every tensor of an adapter that has the name of one of the model: so it keeps
    biases and embeddings. It works for all, but stays when the adapter is switched off.
    """

    saved: list[str]
    in_place: list[str]


class Modules:
    """The modules of a skeleton and what they hold."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        self.entries = {memory: self._source(memory) for memory in skeleton.model.state_dict()}  # -> canonical name
        self._memories: dict[str, list[str]] = {}
        for memory, name in self.entries.items():
            self._memories.setdefault(name, []).append(memory)
        self._paths = [path for path, _ in skeleton.model.named_modules(remove_duplicate=False)]

    def _source(self, memory: str) -> str:
        name = self._skeleton.canonical(memory)
        while name in self._skeleton.tied:
            name = self._skeleton.tied[name]
        return name

    def linears(self) -> list[Linear]:
        """The modules that factors can be added to: those with a weight of their own."""
        found = []
        for name, slot in self._skeleton.slots.items():
            if slot.role == LINEAR and len(self._memories[name]) == 1:
                path = _owner(slot.memory)
                bias = self.entries.get(f"{path}.bias")
                found.append(Linear(path, name, bias if bias is not None and self._single(bias) else None))
        return sorted(found, key=lambda one: one.weight)

    def _single(self, name: str) -> bool:
        return len(self._memories[name]) == 1

    def kept(self, names: Iterable[str]) -> Kept:
        """How these parameters, which get no factors, are kept."""
        owners = {name: {_owner(memory) for memory in self._memories[name]} for name in names}
        in_place = sorted(name for name, paths in owners.items() if any(self._ambiguous(path) for path in paths))
        wanted = {path for name, paths in owners.items() if name not in in_place for path in paths}
        found = {path for path in self._paths if any(path.endswith(one) for one in wanted) and self.inside(path)}
        return Kept(sorted(path for path in found if not any(path.startswith(f"{one}.") for one in found)), in_place)

    def _ambiguous(self, path: str) -> bool:
        """Whether peft cannot save a module: it is the model itself, or its name is the end of one within it."""
        return not path or any(one.startswith(f"{path}.") and one.endswith(path) for one in self._paths)

    def places(self, name: str) -> list[str]:
        """All names in memory of a parameter: more than one if it is tied."""
        return self._memories[name]

    def inside(self, path: str) -> dict[str, str]:
        """The entries of the state dict in a module: name in memory -> canonical name."""
        return {memory: name for memory, name in self.entries.items() if memory.startswith(f"{path}.")}

    def ties(self, paths: Iterable[str]) -> bool:
        """Whether some of these modules share a weight that peft can tie again."""
        held = [name for path in paths for memory, name in self.inside(path).items() if _owner(memory) == path]
        return len(held) != len(set(held))


def is_saved(path: str, saved: Iterable[str]) -> bool:
    """Whether peft takes a module for (a part of) one that is saved whole, and adds no factors to it."""
    return any(re.match(rf"(^|.*\.){re.escape(one)}($|\..*)", path) for one in saved)


def _owner(memory: str) -> str:
    return memory.rpartition(".")[0]
