"""Merge: fold one update into a state, and write base plus state as a checkpoint. A few tensors at a time.

Every tensor is folded by a function of plain arguments (`_fold_tensor`); `parallel.in_order` maps it over the tensors
and one reduction writes the manifest. Refs depend neither on the number of workers nor on the memory they may take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from storage.artifacts import Artifact, ArtifactStore
from storage.errors import InvalidInput, Mismatch
from storage.manifest import Lineage, TensorRecord, canonical
from storage.refs import CheckpointRef, StateRef, UpdateRef, short
from tasks.extract import HEAD
from tasks.mergers import Facts, Joint, Parts, Sequential, Sums, Target
from tasks.parallel import Budget, Report, in_order
from tasks.recipe import Recipe, recipe_of
from tasks.tensors import check_base, check_finite, decode_record, dtype_name, read_tensor, wide

_TOTAL = "scaling.total"  # part of a state: the plain sum of the updates, if a scaling needs it
_SCALING = "scaling."  # prefix of a scaling's facts and sums among the merger's


@dataclass(frozen=True)
class _Update:
    """A stored update as a merger sees it: thinned, without the heads that only its own task has."""

    artifact: Artifact
    recipe: Recipe
    device: str

    @property
    def records(self) -> list[TensorRecord]:
        return [record for record in self.artifact.manifest.tensors if not record.role.startswith(HEAD)]

    def delta(self, record: TensorRecord) -> Tensor:
        found = decode_record(record, self.artifact.parts(record.name), self.device)
        check_finite(found, record.name, short(self.artifact.ref))
        thin = self.recipe.sparsify
        return found if thin is None else thin.thin(found, self.artifact.ref, record.name)


@dataclass(frozen=True)
class _State:
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
    newcomer = _Update(store.open(update, "update"), recipe, device)
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
        shares = in_order(records, lambda one: _share(recipe, newcomer.delta(one), None), _cost(4), allowed, report)
        draft.facts.update(_joint_facts(facts, update, weight), **_scaling_facts(recipe, facts, _added(shares)))
        return StateRef(draft.commit())

    merger = recipe.merger
    survey = {**merger.survey(*_streams(newcomer, before)), "weight": weight}

    def fold_one(record: TensorRecord) -> _Folded:
        return _fold_tensor(newcomer, before, record, facts, survey, store)

    sums: list[Sums] = []
    for folded in in_order(records, fold_one, _cost(merger.workspace()), allowed, report):
        draft.share(folded.record)
        sums.append(folded.sums)
    total = _added(sums)
    draft.facts.update(merger.close(facts, total, survey), **_scaling_facts(recipe, facts, total))
    return StateRef(draft.commit())


def materialize(
    base: CheckpointRef,
    state: StateRef,
    store: ArtifactStore,
    device: str = "cpu",
    *,
    budget: Budget | None = None,
    report: Report | None = None,
) -> CheckpointRef:
    """Base plus the merged delta, as a checkpoint in the base's dtypes. Untouched tensors share the base's blobs."""
    root, artifact = store.open(base, "checkpoint"), store.open(state, "state")
    check_base(artifact, base, role="state")
    merged = _Merged(root, _State(artifact, recipe_of(artifact), device), store)
    allowed = budget or Budget()
    draft = store.draft("checkpoint", Lineage("materialize", {"base": base, "state": state}))
    factors = merged.factors(allowed)

    def write_one(record: TensorRecord) -> TensorRecord:
        if record.name not in merged.names:
            return record
        delta = merged.delta(record.name)
        if factors is not None:
            delta = delta * factors[record.name]
        if not delta.any():
            return record
        dense = read_tensor(root, record.name, device)
        tensor = (dense.to(wide(dense, delta)) + delta).to(dense.dtype)
        check_finite(tensor, record.name, f"the model merged from {short(state)}")
        return store.write_tensor(
            record.name,
            {"tensor": tensor},
            role=record.role,
            dtype=dtype_name(tensor.dtype),
            shape=record.shape,
        )

    for written in in_order(root.manifest.tensors, write_one, _cost(merged.workspace), allowed, report):
        draft.share(written)
    draft.share_assets(root.manifest.assets)
    merger, count = merged.state.recipe.merger, int(artifact.manifest.facts["count"])
    draft.facts.update({**root.manifest.facts, "merger": merger.name, "merged": count})
    return CheckpointRef(draft.commit())


class _Merged:
    """The merged delta of a state, tensor by tensor, whichever kind of merger made it."""

    def __init__(self, root: Artifact, state: _State, store: ArtifactStore) -> None:
        self.state = state
        self._root = root
        self._updates: list[_Update] = []
        if isinstance(state.recipe.merger, Joint):
            refs = state.facts["updates"]
            self._updates = [_Update(store.open(ref, "update"), state.recipe, state.device) for ref in refs]
        source = self._updates[0].records if self._updates else state.artifact.manifest.tensors
        self._roles = {record.name: record.role for record in source}

    @property
    def names(self) -> Mapping[str, str]:
        return self._roles

    @property
    def workspace(self) -> float:
        merger = self.state.recipe.merger
        return merger.workspace(len(self._updates)) if isinstance(merger, Joint) else merger.workspace()

    def delta(self, name: str) -> Tensor:
        merger = self.state.recipe.merger
        if not isinstance(merger, Joint):
            return self.state.delta(name, self._roles[name])
        deltas = [update.delta(update.artifact.record(name)) for update in self._updates]
        if not any(bool(delta.any()) for delta in deltas):
            return deltas[0]
        base = read_tensor(self._root, name, self.state.device)
        base = base.to(wide(base, *deltas))
        deltas = [delta.to(base.dtype) for delta in deltas]
        return merger.combine(base, deltas, self.state.facts["weights"], Target(name, self._roles[name]))

    def factors(self, budget: Budget) -> Mapping[str, float] | None:
        """What the recipe's scaling makes of the whole merged delta: one factor for every tensor."""
        scaling = self.state.recipe.scaling
        if scaling is None:
            return None
        records = [record for record in self._root.manifest.tensors if record.name in self._roles]
        shares = in_order(records, lambda one: scaling.measure(self.delta(one.name)), _cost(self.workspace), budget)
        mine = {
            key.removeprefix(_SCALING): value for key, value in self.state.facts.items() if key.startswith(_SCALING)
        }
        names = [record.name for record in records]
        return scaling.factors(names, float(self.state.facts["count"]), mine, _added(shares))


def _fold_tensor(
    newcomer: _Update,
    before: _State | None,
    record: TensorRecord,
    facts: Facts,
    survey: Facts,
    store: ArtifactStore,
) -> _Folded:
    """One tensor's way into the state: read, merge, write."""
    recipe, delta = newcomer.recipe, newcomer.delta(record)
    merger = recipe.merger
    assert isinstance(merger, Sequential)
    held = before.parts(record.name) if before else None
    total = None
    if held is not None and _TOTAL in held:
        total = held.pop(_TOTAL)
    parts, sums = merger.fold(held, delta, Target(record.name, record.role), facts, survey)
    kept = dtype_name(next(iter(parts.values())).dtype) if parts else record.dtype
    scaling = recipe.scaling
    if scaling is not None and scaling.needs_total:
        total = delta if total is None else total + delta
        parts = {**parts, _TOTAL: total}
    stored = store.write_tensor(
        record.name,
        parts,
        role=record.role,
        dtype=kept,
        shape=record.shape,
        codec=f"{merger.name}@{merger.version}",
    )
    return _Folded(stored, {**sums, **_share(recipe, delta, total)})


def _share(recipe: Recipe, delta: Tensor, total: Tensor | None) -> Sums:
    if recipe.scaling is None:
        return {}
    return {f"{_SCALING}{key}": value for key, value in recipe.scaling.share(delta, total).items()}


def _scaling_facts(recipe: Recipe, facts: Facts, sums: Sums) -> dict[str, float]:
    if recipe.scaling is None:
        return {}
    mine = [
        {key.removeprefix(_SCALING): value for key, value in one.items() if key.startswith(_SCALING)}
        for one in (facts, sums)
    ]
    return {f"{_SCALING}{key}": value for key, value in recipe.scaling.close(*mine).items()}


def _joint_facts(facts: Mapping[str, Any], update: UpdateRef, weight: float) -> dict[str, Any]:
    updates, weights = [*facts.get("updates", []), update], [*facts.get("weights", []), weight]
    return {"count": len(updates), "updates": updates, "weights": weights}


def _streams(newcomer: _Update, before: _State | None) -> tuple[Any, Any]:
    """The update's deltas and the state's, tensor by tensor, as mergers survey them."""

    def deltas() -> Iterator[Tensor]:
        return (newcomer.delta(record) for record in newcomer.records)

    def merged() -> Iterator[Tensor]:
        assert before is not None
        return (before.delta(record.name, record.role) for record in newcomer.records)

    return deltas, merged if before is not None else None


def _added(shares: Any) -> dict[str, float]:
    """Sums over tensors, added in the order of their names."""
    total: dict[str, float] = {}
    for share in shares:
        for key, value in share.items():
            total[key] = total.get(key, 0.0) + value
    return total


def _cost(workspace: float) -> Any:
    """Bytes that a tensor takes while it is worked on."""
    return lambda record: workspace * 4 * record.elements


def _check_weight(recipe: Recipe, weight: float) -> None:
    if weight <= 0:
        raise InvalidInput(f"weight must be positive, found {weight}")
    if weight != 1 and not recipe.merger.weighted:
        raise InvalidInput(
            f"merger {recipe.merger.name!r} lets every update count the same, found weight {weight}",
            remedy="Remove the weight, or take a merger that has weights: `deltaworks mergers` lists them",
        )


def _check_tensors(newcomer: _Update, before: _State, store: ArtifactStore) -> None:
    """Every update of a line covers the same tensors, in the same shapes."""
    known: Sequence[TensorRecord] = before.artifact.manifest.tensors
    if isinstance(before.recipe.merger, Joint):
        first = store.open(before.facts["updates"][0], "update")
        known = _Update(first, before.recipe, before.device).records
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
) -> _State | None:
    if state is None:
        return None
    before = store.open(state, "state")
    check_base(before, base, role="state")
    if canonical(dict(before.manifest.lineage.spec)) != canonical(recipe.spec()):
        raise Mismatch(f"merger of {short(state)}", expected=recipe.spec(), found=dict(before.manifest.lineage.spec))
    return _State(before, recipe, device)
