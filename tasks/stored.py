"""Stored updates and states as mergers see them: decoded, thinned, with what their recipe makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from storage.artifacts import Artifact
from storage.manifest import TensorRecord
from storage.refs import short
from tasks.extract import HEAD
from tasks.mergers import Facts, Parts, Sequential, Sums, Target
from tasks.packed import Planes, is_packed, planes_of
from tasks.recipe import Recipe
from tasks.tensors import check_finite, read_delta

_SCALING = "scaling."  # prefix of a scaling's facts, sums and parts among the merger's


@dataclass(frozen=True)
class Update:
    """A stored update as a merger sees it: thinned, without the heads that only its own task has."""

    artifact: Artifact
    recipe: Recipe
    device: str

    @property
    def records(self) -> list[TensorRecord]:
        return [record for record in self.artifact.manifest.tensors if not record.role.startswith(HEAD)]

    def delta(self, record: TensorRecord) -> Tensor:
        found = read_delta(self.artifact, record.name, self.device)
        check_finite(found, record.name, short(self.artifact.ref))
        thin = self.recipe.sparsify
        return found if thin is None else thin.thin(found, self.artifact.ref, record.name)

    def planes(self, record: TensorRecord) -> Planes | None:
        """The delta as planes of bits, if it is stored as ternary, enters as it is, and is worked on by the CPU."""
        if self.recipe.sparsify is not None or self.device != "cpu" or not is_packed(record):
            return None
        return planes_of(self.artifact.parts(record.name), record.shape)


@dataclass(frozen=True)
class State:
    """A stored state, and what its recipe makes of it."""

    artifact: Artifact
    recipe: Recipe
    device: str

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.artifact.manifest.facts

    def parts(self, name: str) -> Parts:
        return {key: part.to(self.device) for key, part in self.artifact.parts(name).items()}

    def delta(self, name: str, role: str) -> Tensor:
        assert isinstance(self.recipe.merger, Sequential)
        return self.recipe.merger.delta(self.parts(name), self.facts, Target(name, role))


def scalings_own(facts: Mapping[str, Any]) -> dict[str, float]:
    """The scaling's share of a state's facts or of a fold's sums."""
    return {key.removeprefix(_SCALING): value for key, value in facts.items() if key.startswith(_SCALING)}


def among_the_mergers(facts: Facts) -> dict[str, float]:
    """The inverse of `scalings_own`."""
    return {f"{_SCALING}{key}": value for key, value in facts.items()}


def added(shares: Iterable[Sums]) -> dict[str, float]:
    """Sums over tensors, added in the order they come in: that of the tensors' names."""
    total: dict[str, float] = {}
    for share in shares:
        for key, value in share.items():
            total[key] = total.get(key, 0.0) + value
    return total


def cost(workspace: float) -> Callable[[TensorRecord], float]:
    """Bytes that a tensor takes while it is worked on, from multiples of its size in float32."""
    return lambda record: workspace * 4 * record.elements
