"""Merge: fold one update into a state, a few tensors at a time.

Every tensor is folded by a function of plain arguments (`_fold_tensor`); `parallel.in_order` maps it over the tensors
and one reduction writes the manifest. Refs depend neither on the number of workers nor on the memory they may take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput, Mismatch
from storage.manifest import Lineage, TensorRecord, canonical
from storage.refs import CheckpointRef, StateRef, UpdateRef, short
from tasks.mergers import Facts, Joint, Parts, Sequential, Sums, Target
from tasks.mergers.base import weight_of
from tasks.parallel import Budget, Report, in_order
from tasks.recipe import Recipe
from tasks.stored import State, Update, added, among_the_mergers, cost, scalings_own
from tasks.tensors import check_base, dtype_name

_TOTAL = "scaling.total"  # part of a state: the weighted sum of the updates, if a scaling needs it


class _Folded(NamedTuple):
    record: TensorRecord
    sums: Sums


def fold_update(
    base: CheckpointRef,
    state: StateRef | None,
    update: UpdateRef,
    recipe: Recipe,
    store: ArtifactStore,
    device: str = "cpu",
    *,
    weight: float = 1.0,
    budget: Budget | None = None,
    report: Report | None = None,
) -> StateRef:
    """The state after merging `update` into `state` (None: the first update of a line from `base`).

    Raises Mismatch if the update was taken from another base, has other tensors, or the state another recipe.
    """
    newcomer = Update(store.open(update, "update"), recipe, device)
    check_base(newcomer.artifact, base, role="update")
    before = _open_state(store, base, state, recipe, device)
    _check_weight(recipe, weight)
    if before is not None:
        _check_tensors(newcomer, before, store)
    inputs = {"base": base, "update": update, **({"state": state} if state else {})}
    draft = store.draft("state", Lineage("fold", inputs, recipe.spec()))
    facts: Mapping[str, Any] = before.facts if before else {}
    records, allowed = newcomer.records, budget or Budget()
    if isinstance(recipe.merger, Joint):
        _check_limit(recipe.merger, facts)
        shares = in_order(
            records,
            lambda one: _share(recipe, newcomer.delta(one), None),
            cost(recipe.workspace(joint=4)),
            allowed,
            report,
        )
        draft.facts.update(_joint_facts(facts, update, weight), **_scaling_facts(recipe, facts, added(shares), weight))
        return StateRef(draft.commit())

    merger = recipe.merger
    survey = {**merger.survey(*_streams(newcomer, before)), "weight": weight}

    def fold_one(record: TensorRecord) -> _Folded:
        return _fold_tensor(newcomer, before, record, facts, survey, store)

    sums: list[Sums] = []
    for folded in in_order(records, fold_one, cost(recipe.workspace()), allowed, report):
        draft.share(folded.record)
        sums.append(folded.sums)
    total = added(sums)
    draft.facts.update(merger.close(facts, total, survey), **_scaling_facts(recipe, facts, total, weight))
    return StateRef(draft.commit())


def _fold_tensor(
    newcomer: Update,
    before: State | None,
    record: TensorRecord,
    facts: Facts,
    survey: Facts,
    store: ArtifactStore,
) -> _Folded:
    """One tensor's way into the state: read, merge, write."""
    recipe, merger = newcomer.recipe, newcomer.recipe.merger
    assert isinstance(merger, Sequential)
    held = before.parts(record.name) if before else None
    target = Target(record.name, record.role)
    packed = newcomer.planes(record) if recipe.scaling is None else None
    found = None if packed is None else merger.fold_planes(held, packed, target, facts, survey)
    if found is not None:
        parts, sums = {key: part.reshape(record.shape) for key, part in found[0].items()}, found[1]
        return _Folded(_written(merger, record, parts, store), sums)
    delta = newcomer.delta(record)
    total = None
    if held is not None and _TOTAL in held:
        total = held.pop(_TOTAL)
    parts, sums = merger.fold(held, delta, target, facts, survey)
    scaling = recipe.scaling
    if scaling is not None and scaling.needs_total:
        share = delta * weight_of(survey)
        total = share if total is None else total + share
        parts = {**parts, _TOTAL: total}
    return _Folded(_written(merger, record, parts, store), {**sums, **_share(recipe, delta, total)})


def _written(merger: Sequential, record: TensorRecord, parts: Parts, store: ArtifactStore) -> TensorRecord:
    kept = [part.dtype for key, part in parts.items() if key != _TOTAL]
    return store.write_tensor(
        record.name,
        parts,
        role=record.role,
        dtype=dtype_name(kept[0]) if kept else record.dtype,
        shape=record.shape,
        codec=f"{merger.name}@{merger.version}",
    )


def _share(recipe: Recipe, delta: Tensor, total: Tensor | None) -> Sums:
    if recipe.scaling is None:
        return {}
    return among_the_mergers(recipe.scaling.share(delta, total))


def _scaling_facts(recipe: Recipe, facts: Facts, sums: Sums, weight: float) -> dict[str, float]:
    if recipe.scaling is None:
        return {}
    return among_the_mergers(recipe.scaling.close(scalings_own(facts), scalings_own(sums), weight))


def _joint_facts(facts: Mapping[str, Any], update: UpdateRef, weight: float) -> dict[str, Any]:
    updates, weights = [*facts.get("updates", []), update], [*facts.get("weights", []), weight]
    return {"count": len(updates), "updates": updates, "weights": weights}


def _streams(newcomer: Update, before: State | None) -> tuple[Any, Any]:
    """The update's deltas and the state's, tensor by tensor, as mergers survey them."""

    def deltas() -> Iterator[Tensor]:
        return (newcomer.delta(record) for record in newcomer.records)

    def merged() -> Iterator[Tensor]:
        assert before is not None
        return (before.delta(record.name, record.role) for record in newcomer.records)

    return deltas, merged if before is not None else None


def _check_weight(recipe: Recipe, weight: float) -> None:
    if not 0 < weight < math.inf:
        raise InvalidInput(f"weight must be positive, found {weight}")
    if weight != 1 and not recipe.merger.weighted:
        raise InvalidInput(
            f"merger {recipe.merger.name!r} lets every update count the same, found weight {weight}",
            remedy="Remove the weight, or take a merger that has weights: `deltaworks mergers` lists them",
        )


def _check_limit(merger: Joint, facts: Facts) -> None:
    if merger.limit is not None and facts.get("count", 0) >= merger.limit:
        raise InvalidInput(
            f"merger {merger.name!r} merges {merger.limit} updates, found one more",
            remedy="End the line here, or rebuild it with a merger for any number: `deltaworks mergers` lists them",
        )


def _check_tensors(newcomer: Update, before: State, store: ArtifactStore) -> None:
    """Every update of a line covers the same tensors, in the same shapes."""
    known: Sequence[TensorRecord] = before.artifact.manifest.tensors
    if isinstance(before.recipe.merger, Joint):
        first = store.open(before.facts["updates"][0], "update")
        known = Update(first, before.recipe, before.device).records
    old, new = ({record.name: list(record.shape) for record in some} for some in (known, newcomer.records))
    different = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    if different:
        name = different[0]
        raise Mismatch(
            f"tensors of {short(newcomer.artifact.ref)}",
            expected=f"those of {short(before.artifact.ref)}, {name!r} {old.get(name, 'not among them')}",
            found=f"differing: {different[:5]}, {name!r} {new.get(name, 'missing')}",
            remedy="All updates of a line must cover the same tensors: tune the same architecture for every task",
        )


def _open_state(
    store: ArtifactStore, base: CheckpointRef, state: StateRef | None, recipe: Recipe, device: str
) -> State | None:
    if state is None:
        return None
    before = store.open(state, "state")
    check_base(before, base, role="state")
    if canonical(dict(before.manifest.lineage.spec)) != canonical(recipe.spec()):
        raise Mismatch(f"merger of {short(state)}", expected=recipe.spec(), found=dict(before.manifest.lineage.spec))
    return State(before, recipe, device)
