"""Inspect: what one stored update is like, and what each codec would make of it. One tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from storage.artifacts import Artifact, ArtifactStore
from storage.errors import InvalidInput
from storage.manifest import TensorRecord
from storage.refs import UpdateRef, short
from tasks.codecs import CODECS, Codec, Dense, decoder, is_lossless
from tasks.compress import sizes
from tasks.extract import HEAD
from tasks.inspection.costs import codec_cost
from tasks.inspection.findings import Inspection, Measured
from tasks.inspection.measure import (
    Ranks,
    can_compare,
    changed_bits,
    numbers_of,
    ranks_of,
    step_entropy,
    ternary_bound,
    values_of_product,
)
from tasks.kinds import fine_kind_of
from tasks.moments import power
from tasks.parallel import Budget, Report, in_order
from tasks.spectrum import singular_values
from tasks.tensors import check_finite, decode_factors, ground_of, read_delta, read_onto, read_tensor, wide

TOLERANCES = (1e-8, 1e-5)  # those of arXiv 2505.11711: of its table 6, and of its code and table 1
RANKS_UP_TO = 2048  # smaller side of a matrix; twice as many take eight times as long
_WORKSPACE = 6  # a tensor's sizes in float32 that measuring it takes
_DENSE = decoder(Dense)


class _Sides(NamedTuple):
    """A tensor of the two checkpoints, as far as they are there."""

    base: Tensor | None
    tuned: Tensor | None


def inspect_update(
    update: UpdateRef,
    store: ArtifactStore,
    device: str = "cpu",
    *,
    codecs: Sequence[Codec] | None = None,
    tolerances: Sequence[float] = TOLERANCES,
    ranks_up_to: int = RANKS_UP_TO,
    budget: Budget | None = None,
    report: Report | None = None,
) -> Inspection:
    """Measure `update`, and write it with each of `codecs` (all at their defaults) into a place that goes away.

    Bits are compared where both checkpoints are there and the update is still exactly what lies between them; else the
    numbers of the update that are not zero are counted. `ranks_up_to`: matrices with a smaller side above it have no
    ranks. Heads are left out. Raises InvalidInput for numbers that are not finite and for tolerances below 0.
    """
    if not all(one >= 0 for one in tolerances):
        raise InvalidInput(f"tolerances are 0 or more, found {', '.join(map(str, tolerances))}")
    chosen = [kind() for kind in CODECS.values()] if codecs is None else list(codecs)
    source = store.open(update, "update")
    work = _Work(
        source,
        _side(source, "base"),
        _side(source, "tuned"),
        device,
        tuple(sorted(set(tolerances))),
        ranks_up_to,
        _exact_names(source),
    )
    records = [record for record in source.manifest.tensors if not record.role.startswith(HEAD)]
    total = len(records) * (1 + len(chosen))
    tensors = []
    for measured in in_order(records, work.measure, work.memory, budget or Budget(workers=1)):
        tensors.append(measured)
        if report:
            report(len(tensors), total, "tensors")
    lossy = any(record.name not in work.exact for record in records)
    squares = {one.name: one.moments.squares for one in tensors}
    costs = []
    for number, codec in enumerate(chosen, 1):
        shown = _shifted(report, number * len(records), total, codec.name)
        costs.append(codec_cost(source, codec, squares, lossy, device, budget=budget, report=shown))
    stored = sizes(list(source.manifest.tensors))
    return Inspection(
        update,
        work.tolerances,
        tuple(tensors),
        int(stored["file_bytes"]),
        int(stored["bf16_bytes"]),
        tuple(costs),
        lossy,
        (*_notes(work, records, tensors), *_uncalibrated(chosen)),
    )


def _shifted(report: Report | None, before: int, total: int, note: str) -> Report | None:
    return None if report is None else lambda done, _, __: report(before + done, total, note)


def _side(source: Artifact, side: str) -> Artifact | None:
    """One of the checkpoints that an update was taken from, if it is still there."""
    ref = ground_of(source) if side == "base" else source.manifest.lineage.inputs.get(side)
    return source.store.open(ref, "checkpoint") if ref and source.store.has(ref) else None


def _exact_names(artifact: Artifact) -> frozenset[str]:
    """The tensors that are still what was extracted: lossless ones, and dense ones that no codec changed before."""
    records = artifact.manifest.tensors
    lossless = frozenset(record.name for record in records if is_lossless(record.codec))
    dense = frozenset(record.name for record in records if record.codec == _DENSE and not record.error)
    source = artifact.manifest.lineage.inputs.get("update")
    if source is None:
        return lossless | dense
    return lossless | (dense & _exact_names(artifact.store.open(source)) if artifact.store.has(source) else frozenset())


@dataclass(frozen=True)
class _Work:
    """What is the same for every tensor. exact: names of tensors that no codec has changed."""

    source: Artifact
    base: Artifact | None
    tuned: Artifact | None
    device: str
    tolerances: tuple[float, ...]
    ranks_up_to: int
    exact: frozenset[str]

    def memory(self, record: TensorRecord) -> float:
        """Bytes: the tensor and its sides, and for ranks a copy in float64 with its Gram matrix."""
        if not self.has_ranks(record) or record.rank is not None:
            return _WORKSPACE * 4 * record.elements
        return 4 * 4 * record.elements + 8 * (2 * record.elements + 3 * min(record.shape) ** 2)

    def has_ranks(self, record: TensorRecord) -> bool:
        """Factors tell their ranks whatever the size of their product."""
        if len(record.shape) != 2 or min(record.shape) < 2:
            return False
        return record.rank is not None or min(record.shape) <= self.ranks_up_to

    def measure(self, record: TensorRecord) -> Measured:
        sides = self._sides(record)
        delta = self._delta(record, sides)
        check_finite(delta, record.name, short(self.source.ref))
        moments, changed, beyond = numbers_of(delta, self.tolerances)
        base, tuned = sides
        by_bits, step_bits = False, None
        if base is not None and tuned is not None:
            by_bits = can_compare(base, tuned)
            if by_bits:
                changed, step_bits = changed_bits(base, tuned), step_entropy(base, tuned)
            elif not base.is_floating_point():  # integers are the same on both sides, or there would be no update
                by_bits, step_bits = True, 0.0
        return Measured(
            record.name,
            fine_kind_of(record.name, record.role),
            record.shape,
            changed,
            by_bits,
            beyond,
            moments,
            None if base is None else power(lambda: [base.to(wide(base))]).squares,
            self._ranks(record, delta),
            ternary_bound(changed, delta.numel()),
            step_bits,
            record.rank is not None,
        )

    def _sides(self, record: TensorRecord) -> _Sides:
        """What a lossless codec wrote is the tuned tensor itself, and names its base."""
        if is_lossless(record.codec):
            return _Sides(read_onto(self.source, record), read_tensor(self.source, record.name))
        tuned = self.tuned if record.name in self.exact else None
        return _Sides(*(None if side is None else read_tensor(side, record.name) for side in (self.base, tuned)))

    def _delta(self, record: TensorRecord, sides: _Sides) -> Tensor:
        if is_lossless(record.codec):
            assert sides.base is not None and sides.tuned is not None
            dtype = wide(sides.base, sides.tuned)
            return sides.tuned.to(dtype) - sides.base.to(dtype)
        return read_delta(self.source, record.name)

    def _ranks(self, record: TensorRecord, delta: Tensor) -> Ranks | None:
        if not self.has_ranks(record):
            return None
        if record.rank is not None:
            left, right = decode_factors(record, self.source.parts(record.name))
            return ranks_of(values_of_product(left, right), *record.shape)
        return ranks_of(singular_values(delta.to(self.device)).cpu(), *record.shape)


def _notes(work: _Work, records: Sequence[TensorRecord], tensors: Sequence[Measured]) -> Iterator[str]:
    """What could not be measured, and why."""
    inputs = work.source.manifest.lineage.inputs
    for side, artifact in (("base", work.base), ("tuned", work.tuned)):
        if artifact is None and not all(is_lossless(record.codec) for record in records):
            ref = ground_of(work.source) if side == "base" else inputs.get(side)
            why = f"{short(ref)} is no longer stored" if ref else "its lineage does not name it"
            yield f"no {side} checkpoint: {why}"
    coded = [record for record in records if record.name not in work.exact]
    if coded:
        origin = f"; {short(inputs['update'])} is what it was made from" if "update" in inputs else ""
        yield f"{len(coded)} of {len(records)} tensors were changed by a codec before{origin}"
    plain = [one.name for one in tensors if not one.by_bits and one.name in work.exact]
    if plain:
        yield (
            f"bits could not be compared in {len(plain)} of {len(tensors)} tensors: there, what is not zero in the "
            "update counts as changed"
        )
    large = [one for one in records if len(one.shape) == 2 and min(one.shape) >= 2 and not work.has_ranks(one)]
    if large:
        yield f"no ranks of {len(large)} matrices whose smaller side is above {work.ranks_up_to:,}"
    heads = sum(record.role.startswith(HEAD) for record in work.source.manifest.tensors)
    if heads:
        yield f"{heads} tensors of task heads are left out, and are kept by every codec as they are"


def _uncalibrated(codecs: Sequence[Codec]) -> Iterator[str]:
    names = ", ".join(codec.name for codec in codecs if codec.examples)
    if names:
        yield f"{names} without the examples of the task that a chain would give it: rounded to the nearest"
