"""What is measured for a lineage: how alike its updates are, and where in the model they and their merge lie.

Reads every number of every update once or twice; the graph itself reads none. Within `limit` it takes a fraction of a
second, so that it can be done for every version; people who ask for a page get it whatever it takes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from storage.artifacts import Artifact, ArtifactStore
from storage.errors import DeltaworksError
from storage.refs import UpdateRef, parse_ref
from tasks.extract import HEAD
from tasks.lineage.nodes import Lineage
from tasks.parallel import Budget, Report
from tasks.similarity import similarity
from tasks.tensors import read_delta, read_tensor

LIGHT = 8_000_000  # numbers in all updates: what is measured for every version as it is registered
_PAIRS = 3_000  # of tensors, likewise
_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")  # `layers.3` of `layers.3.mlp.fc1.weight`


@dataclass(frozen=True)
class Alike:
    """cosines[i][j] between updates, and sign conflicts likewise, in an order that puts those alike beside each other
    (average linkage of 1 - cosine)."""

    updates: tuple[str, ...]
    cosines: tuple[tuple[float, ...], ...]
    conflicts: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Layers:
    """L2 norms per layer: of each update, and of the merged model minus the base.

    norms[i][j]: of layer i, in column j; `base`: of the base's own weights in layer i.
    """

    layers: tuple[str, ...]
    columns: tuple[str, ...]
    norms: tuple[tuple[float, ...], ...]
    base: tuple[float, ...]


@dataclass(frozen=True)
class Measures:
    """`missing`: what could not be measured, and why."""

    alike: Alike | None = None
    layers: Layers | None = None
    missing: Mapping[str, str] = field(default_factory=dict)


def measure(
    lineage: Lineage,
    store: ArtifactStore,
    limit: int | None = None,
    budget: Budget | None = None,
    report: Report | None = None,
) -> Measures:
    """Measure the updates of a lineage's own line, without those that were left out of it.

    `limit`: numbers in all updates together, above which nothing is measured. What cannot be read, because it was
    pruned or is damaged, is said and does not stop the rest.
    """
    merged = _merged(lineage)
    missing = {} if limit is None else _too_much([ref for _, ref in merged], store, limit)
    alike = layers = None
    try:
        wanted = len(merged) > 1 and "similarity" not in missing
        alike = _alike(merged, store, budget, report) if wanted else None
    except DeltaworksError as error:
        missing["similarity"] = str(error)
    try:
        layers = _layers(lineage, merged, store) if "layers" not in missing else None
    except DeltaworksError as error:
        missing["layers"] = str(error)
    return Measures(alike, layers, missing)


def _too_much(updates: Sequence[UpdateRef], store: ArtifactStore, limit: int) -> dict[str, str]:
    """What would take too long to do for every version."""
    numbers = tensors = 0
    for ref in updates:
        try:
            manifest = store.open(ref).manifest
        except DeltaworksError:
            continue
        numbers += manifest.parameters
        tensors += len(manifest.tensors)
    asked = "for every version; `deltaworks lineage` does it when asked"
    found: dict[str, str] = {}
    if tensors * (len(updates) - 1) / 2 > _PAIRS:
        found["similarity"] = f"{len(updates)} updates of {tensors:,} tensors are too many to compare {asked}"
    if numbers > limit:
        found = dict.fromkeys(("similarity", "layers"), f"{numbers:,} numbers are too many to read {asked}")
    return found


def _merged(lineage: Lineage) -> list[tuple[str, UpdateRef]]:
    """Task and ref of what was merged, in order."""
    states = {node.id for node in lineage.of_kind("state") if not node.aside}
    titles = {node.id: node.title for node in lineage.nodes}
    found = [edge.source for edge in lineage.edges if edge.role == "update" and edge.target in states]
    return [(titles[ref], UpdateRef(parse_ref(ref))) for ref in found]


def _alike(
    merged: Sequence[tuple[str, UpdateRef]], store: ArtifactStore, budget: Budget | None, report: Report | None
) -> Alike:
    found = similarity([ref for _, ref in merged], store, budget, report)
    order = clustered(found.cosines)
    squares = (tuple(tuple(map(float, row)) for row in one[np.ix_(order, order)]) for one in _both(found))
    cosines, conflicts = squares
    return Alike(tuple(merged[place][0] for place in order), cosines, conflicts)


def _both(found: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return found.cosines, found.conflicts


def clustered(cosines: NDArray[np.float64]) -> list[int]:
    """An order of updates in which those that are alike are neighbours; of fewer than three, as they come."""
    if len(cosines) < 3:
        return list(range(len(cosines)))
    distances = 1 - (cosines + cosines.T) / 2
    np.fill_diagonal(distances, 0)
    tree = linkage(squareform(distances.clip(0), checks=False), "average", optimal_ordering=True)
    return [int(place) for place in leaves_list(tree)]


def layer_of(name: str) -> str:
    """The layer of a parameter: up to the first number in its name, or else the first word."""
    found = _LAYER.match(name)
    return found[1] if found else name.partition(".")[0]


def _layers(lineage: Lineage, merged: Sequence[tuple[str, UpdateRef]], store: ArtifactStore) -> Layers:
    base = store.open(lineage.of_kind("base")[0].id, "checkpoint")
    columns = [(title, _squares(store.open(ref))) for title, ref in merged]
    models = [node for node in lineage.of_kind("model") if node.ref and not node.aside]
    if models and models[-1].stored:
        columns.append(("merged", _moved(store.open(models[-1].id, "checkpoint"), base)))
    own: dict[str, float] = {}
    order: dict[str, None] = {}
    for record in base.manifest.tensors:
        if not record.role.startswith(HEAD):
            layer = layer_of(record.name)
            order[layer] = None
            own[layer] = own.get(layer, 0.0) + _square(read_tensor(base, record.name))
    names = sorted(order, key=_natural)
    norms = tuple(tuple(squares.get(layer, 0.0) ** 0.5 for _, squares in columns) for layer in names)
    return Layers(tuple(names), tuple(title for title, _ in columns), norms, tuple(own[one] ** 0.5 for one in names))


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10; what has no number first."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _squares(update: Artifact) -> dict[str, float]:
    """Layer -> squared norm of an update in it."""
    found: dict[str, float] = {}
    for record in update.manifest.tensors:
        if not record.role.startswith(HEAD):
            layer = layer_of(record.name)
            found[layer] = found.get(layer, 0.0) + _square(read_delta(update, record.name))
    return found


def _moved(model: Artifact, base: Artifact) -> dict[str, float]:
    """Layer -> squared norm of model minus base in it."""
    found: dict[str, float] = {}
    for record in base.manifest.tensors:
        if record.role.startswith(HEAD) or record.name not in model:
            continue
        same = model.record(record.name).blob == record.blob
        if not same:
            moved = read_tensor(model, record.name).double() - read_tensor(base, record.name).double()
            layer = layer_of(record.name)
            found[layer] = found.get(layer, 0.0) + _square(moved)
    return found


def _square(tensor: Any) -> float:
    return float(tensor.detach().double().square().sum())
