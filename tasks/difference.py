"""Difference: what tells two versions apart. Recipe, updates, scores, and how far their weights are from each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from storage.artifacts import Artifact, ArtifactStore
from storage.errors import Mismatch
from storage.lines import Entry
from storage.refs import CheckpointRef, ScoresRef, UpdateRef, short
from tasks.evaluate import read_scores
from tasks.lineage.measures import layer_of
from tasks.parallel import Report
from tasks.tensors import read_tensor


@dataclass(frozen=True)
class Side:
    """One of the two: the merges that made it, its model, and its scores, if they are known."""

    title: str
    entries: Sequence[Entry]
    model: CheckpointRef
    scores: ScoresRef | None = None


@dataclass(frozen=True)
class Placed:
    """An update in one of them, or in both: merge number and weight there."""

    task: str
    update: UpdateRef
    before: tuple[int, float] | None
    after: tuple[int, float] | None


@dataclass(frozen=True)
class Scored:
    """A task's leading metric in both; `apart`: whether the intervals at 95 % have nothing in common."""

    task: str
    metric: str
    before: float | None
    after: float | None
    apart: bool


@dataclass(frozen=True)
class Difference:
    """`settings`: what differs in the recipes, before and after; `layers`: |B - A| / |A| by Frobenius norm."""

    settings: Mapping[str, tuple[Any, Any]]
    updates: Sequence[Placed]
    scores: Sequence[Scored]
    layers: Mapping[str, float]
    whole: float


def difference(
    before: Side, after: Side, store: ArtifactStore, report: Report = lambda done, total, note: None
) -> Difference:
    """Compare two versions. Weights are read tensor by tensor. Mismatch if they are not of one architecture."""
    distances, whole = _distances(before, after, store, report)
    return Difference(
        _settings(_recipe(before), _recipe(after)),
        _updates(before.entries, after.entries),
        _scores(before, after, store),
        distances,
        whole,
    )


def _recipe(side: Side) -> dict[str, Any]:
    last = side.entries[-1]
    return {**_flat(last.merger), "factor": last.factor, "base": last.base}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys([*before, *after])
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def _updates(before: Sequence[Entry], after: Sequence[Entry]) -> list[Placed]:
    """All updates of both, in the order of the second; those that only the first has come last."""
    sides: list[dict[tuple[str, UpdateRef], tuple[int, float]]] = [
        {(one.task, one.fold.update): (number, one.weight) for number, one in enumerate(entries, 1)}
        for entries in (before, after)
    ]
    keys = dict.fromkeys([*sides[1], *sides[0]])
    return [Placed(task, update, *(side.get((task, update)) for side in sides)) for task, update in keys]


def _scores(before: Side, after: Side, store: ArtifactStore) -> list[Scored]:
    sides = [_leading(one.scores, store) for one in (before, after)]
    found = []
    for task in dict.fromkeys([*sides[1], *sides[0]]):
        old, new = (side.get(task) for side in sides)
        apart = False
        if old and new and None not in (old.low, old.high, new.low, new.high):
            apart = bool(new.low > old.high or new.high < old.low)
        metric = (new or old).metric  # type: ignore[union-attr]
        found.append(Scored(task, metric, old.value if old else None, new.value if new else None, apart))
    return found


def _leading(scores: ScoresRef | None, store: ArtifactStore) -> dict[str, Any]:
    """Task -> the row of its first metric."""
    found: dict[str, Any] = {}
    if scores is not None and store.has(scores):
        for row in read_scores(store.open(scores, "scores")):
            found.setdefault(row.task, row)
    return found


def _distances(before: Side, after: Side, store: ArtifactStore, report: Report) -> tuple[dict[str, float], float]:
    old, new = store.open(before.model, "checkpoint"), store.open(after.model, "checkpoint")
    _check(old, new)
    moved: dict[str, float] = {}
    size: dict[str, float] = {}
    for number, name in enumerate(old.names, 1):
        layer = layer_of(name)
        was = read_tensor(old, name).to(torch.float64)
        size[layer] = size.get(layer, 0.0) + float(was.square().sum())
        if old.record(name) != new.record(name):  # equal records are equal tensors, and need not be read
            now = read_tensor(new, name).to(torch.float64)
            moved[layer] = moved.get(layer, 0.0) + float((now - was).square().sum())
        report(number, len(old.names), name)
    layers = {layer: _share(moved.get(layer, 0.0), size[layer]) for layer in size}
    return layers, _share(math.fsum(moved.values()), math.fsum(size.values()))


def _check(old: Artifact, new: Artifact) -> None:
    shapes = [{one.name: tuple(one.shape) for one in side.manifest.tensors} for side in (old, new)]
    different = sorted(name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    if different:
        name = different[0]
        raise Mismatch(
            f"tensor {name!r} of {short(new.ref)}",
            expected=f"{shapes[0].get(name, 'none')} as in {short(old.ref)}",
            found=shapes[1].get(name, "none"),
            remedy="Versions are compared that have one architecture",
        )


def _share(moved: float, size: float) -> float:
    return math.sqrt(moved / size) if size else (0.0 if moved == 0 else math.inf)
