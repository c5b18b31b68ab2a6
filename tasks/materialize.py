"""Materialize: base plus the merged delta, as a checkpoint. A few tensors at a time."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from storage.artifacts import Artifact, ArtifactStore
from storage.manifest import Lineage, TensorRecord
from storage.refs import CheckpointRef, StateRef, short
from tasks.mergers import Joint, Sums, Target
from tasks.packed import is_packed
from tasks.parallel import Budget, Report, in_order
from tasks.recipe import recipe_of
from tasks.scalings import AnyScaling
from tasks.stored import State, Update, added, cost, scalings_own
from tasks.tensors import check_base, check_finite, dtype_name, read_tensor, wide


def materialize(
    base: CheckpointRef,
    state: StateRef,
    store: ArtifactStore,
    device: str = "cpu",
    *,
    factor: float = 1.0,
    onto: CheckpointRef | None = None,
    budget: Budget | None = None,
    report: Report | None = None,
) -> CheckpointRef:
    """Base plus `factor` times the merged delta, as a checkpoint in the base's dtypes.

    Untouched tensors share the base's blobs. `onto`: a checkpoint to add the delta to instead.
    """
    root, artifact = store.open(onto or base, "checkpoint"), store.open(state, "state")
    check_base(artifact, base, role="state")
    merged = _Merged(root, State(artifact, recipe_of(artifact), device), store)
    allowed = budget or Budget()
    spec = {} if factor == 1 else {"factor": factor}
    inputs = {"base": base, "state": state, **({"onto": onto} if onto else {})}
    draft = store.draft("checkpoint", Lineage("materialize", inputs, spec))
    factors = merged.factors(allowed)

    def write_one(record: TensorRecord) -> TensorRecord:
        if record.name not in merged.names:
            return record
        delta = merged.delta(record.name)
        if factors is not None:
            delta = delta * factors[record.name]
        if factor != 1:
            delta = delta * factor
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

    for written in in_order(root.manifest.tensors, write_one, cost(merged.workspace), allowed, report):
        draft.share(written)
    draft.share_assets(root.manifest.assets)
    merger, count = merged.state.recipe.merger, int(artifact.manifest.facts["count"])
    draft.facts.update({**root.manifest.facts, "merger": merger.name, "merged": count})
    return CheckpointRef(draft.commit())


class _Merged:
    """The merged delta of a state, tensor by tensor, whichever kind of merger made it."""

    def __init__(self, root: Artifact, state: State, store: ArtifactStore) -> None:
        self.state = state
        self._root = root
        self._updates: list[Update] = []
        if isinstance(state.recipe.merger, Joint):
            refs = state.facts["updates"]
            self._updates = [Update(store.open(ref, "update"), state.recipe, state.device) for ref in refs]
        source = self._updates[0].records if self._updates else state.artifact.manifest.tensors
        self._roles = {record.name: record.role for record in source}

    @property
    def names(self) -> Mapping[str, str]:
        return self._roles

    @property
    def workspace(self) -> float:
        merger = self.state.recipe.merger
        return self.state.recipe.workspace(merger.workspace(len(self._updates)) if isinstance(merger, Joint) else 0)

    def delta(self, name: str) -> Tensor:
        merger = self.state.recipe.merger
        if not isinstance(merger, Joint):
            return self.state.delta(name, self._roles[name])
        target, weights = Target(name, self._roles[name]), self.state.facts["weights"]
        merged = self._on_planes(name, merger, target)
        if merged is not None:
            return merged
        deltas = [update.delta(update.artifact.record(name)) for update in self._updates]
        if not any(bool(delta.any()) for delta in deltas):
            return deltas[0]
        base = read_tensor(self._root, name, self.state.device)
        base = base.to(wide(base, *deltas))
        deltas = [delta.to(base.dtype) for delta in deltas]
        return merger.combine(base, deltas, weights, target)

    def _on_planes(self, name: str, merger: Joint, target: Target) -> Tensor | None:
        """The merged delta where all updates are ternary and the merger can do without their numbers spread out."""
        records = [update.artifact.record(name) for update in self._updates]
        if not all(is_packed(record) for record in records) or self._root.record(name).dtype == "F64":
            return None
        planes = [update.planes(record) for update, record in zip(self._updates, records, strict=True)]
        packed = [one for one in planes if one is not None]
        if len(packed) < len(planes):
            return None
        found = merger.combine_planes(packed, self.state.facts["weights"], target)
        return None if found is None else found.reshape(records[0].shape)

    def factors(self, budget: Budget) -> Mapping[str, float] | None:
        """What the recipe's scaling makes of the whole merged delta: one factor for every tensor."""
        scaling = self.state.recipe.scaling
        if scaling is None:
            return None
        records = [record for record in self._root.manifest.tensors if record.name in self._roles]

        def measured(record: TensorRecord) -> tuple[Sums, Sums]:
            return scaling.measure(self.delta(record.name)), self._share(scaling, record.name)

        found = list(in_order(records, measured, cost(self.workspace), budget))
        facts = {**scalings_own(self.state.facts), **added(share for _, share in found)}
        names, count = [record.name for record in records], float(self.state.facts["count"])
        return scaling.factors(names, count, facts, added(one for one, _ in found))

    def _share(self, scaling: AnyScaling, name: str) -> Sums:
        """What the scaling finds in the sum of the updates, of which a joint merger's state keeps none."""
        if not self._updates or not scaling.needs_total:
            return {}
        total: Tensor | None = None
        for update, weight in zip(self._updates, self.state.facts["weights"], strict=True):
            delta = update.delta(update.artifact.record(name))
            total = delta * weight if total is None else total + delta * weight
        return scaling.share(delta, total)
