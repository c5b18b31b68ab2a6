"""Compress: an update written smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from storage.artifacts import Artifact, ArtifactStore
from storage.errors import InvalidInput
from storage.manifest import Lineage, TensorRecord
from storage.refs import UpdateRef, short
from tasks.codecs import Codec, Coded, Dense, Facts, Leaf, Option, Parts, decode_parts
from tasks.extract import HEAD
from tasks.parallel import Budget, Report, in_order, one_thread
from tasks.tensors import (
    check_finite,
    decode_factors,
    dtype_name,
    foundation,
    ground_of,
    prefixed,
    read_delta,
    read_tensor,
    unprefixed,
    wide,
)
from tasks.turned import turned

_WORKSPACE = 6  # tensors' sizes in float32 that coding and measuring one of them takes
Inputs = Mapping[str, Callable[[], Tensor]]  # of linear weights, by name: X^T X / rows of what their module was given


def compress_update(
    update: UpdateRef,
    codec: Codec,
    store: ArtifactStore,
    device: str = "cpu",
    *,
    inputs: Inputs | None = None,
    calibration: Mapping[str, Any] | None = None,
    budget: Budget | None = None,
    report: Report | None = None,
) -> UpdateRef:
    """`update` coded anew by `codec`. Low-rank tensors stay factors: their factors are coded, as ComPEFT does.

    `calibration` says what data the inputs are from (tasks/calibrate.py has both); it becomes a fact of the result.
    The facts report the files' bytes, headers included, and their ratio to all tensors of the model in bfloat16. Every
    tensor is decoded again at once: its record has the error that was found, or the digest that was held.
    """
    source = store.open(update, "update")
    work = _Work(source, codec, device, inputs or {})
    records = [record for record in source.manifest.tensors if not record.role.startswith(HEAD)]
    facts = [work.survey(one, records) for one in codec.alternatives]
    lineage = Lineage("compress", {**source.manifest.lineage.inputs, "update": update}, codec.spec())
    draft = store.draft("update", lineage)
    for record in source.manifest.tensors:
        if record.role.startswith(HEAD):
            draft.share(record)
    for written in in_order(
        records,
        lambda record: work.write(record, facts),
        work.memory,
        budget or Budget(workers=1),
        report,
    ):
        draft.share(written)
    kept = {name: fact for name, fact in source.manifest.facts.items() if name != "norm"}  # that of the exact update
    found = facts[0] if len(facts) == 1 else {"alternatives": [dict(one) for one in facts]}
    seen = {"calibration": dict(calibration)} if calibration else {}
    draft.facts.update({**kept, **found, **seen, **sizes(draft.records)})
    return UpdateRef(draft.commit())


def sizes(records: list[TensorRecord]) -> dict[str, float]:
    """What an update costs: bytes of its distinct files, bytes of the model's tensors in bfloat16, and the ratio."""
    files = sum({record.blob: record.bytes for record in records}.values())
    bf16 = 2 * sum(record.elements for record in records)
    return {"file_bytes": files, "bf16_bytes": bf16, "ratio": bf16 / files if files else 0.0}


@dataclass(frozen=True)
class _Work:
    """What is the same for every tensor of the update."""

    source: Artifact
    codec: Codec
    device: str
    inputs: Inputs

    def survey(self, codec: Codec, records: Sequence[TensorRecord]) -> Facts:
        """What `codec` wants to know of the whole update."""

        def deltas() -> Iterator[Tensor]:
            return (leaf.delta for record in records for leaf in self.leaves(record, codec.turns_factors))

        with one_thread():
            return codec.survey(deltas)

    def memory(self, record: TensorRecord) -> float:
        """Bytes that coding a tensor takes, the work on its calibration data included."""
        seen = record.shape[-1] ** 2 if record.name in self.inputs else 0
        return _WORKSPACE * 4 * (record.elements + seen)

    def leaves(self, record: TensorRecord, turn: bool) -> Iterator[Leaf]:
        """The tensor, or its factors A and B; with `turn`, turned (tasks/turned.py)."""
        for factor, delta in self._deltas(record, turn):
            check_finite(delta, record.name, short(self.source.ref))
            name = f"{record.name}.{factor}" if factor else record.name
            yield Leaf(
                name,
                record.role,
                delta,
                self.source.ref,
                lambda: self.sides(record.name),
                None if factor else self.inputs.get(record.name),
            )

    def _deltas(self, record: TensorRecord, turn: bool) -> Iterator[tuple[str, Tensor]]:
        if record.rank is None:
            yield "", read_delta(self.source, record.name, self.device)
        else:
            left, right = decode_factors(record, self.source.parts(record.name))
            for factor in (left, right):
                check_finite(factor, record.name, short(self.source.ref))
            if turn:
                left, right = turned(left, right)
            yield "A", right.to(self.device)
            yield "B", left.to(self.device)

    def sides(self, name: str) -> tuple[Tensor, Tensor]:
        """The base and the tuned tensor, as their checkpoints hold them."""
        return tuple(read_tensor(self.side(side), name) for side in ("base", "tuned"))  # type: ignore[return-value]

    def side(self, side: str) -> Artifact:
        ref = ground_of(self.source) if side == "base" else self.source.manifest.lineage.inputs.get(side)
        if ref is None or not self.source.store.has(ref):
            why = "not in its lineage" if ref is None else f"no longer stored ({short(ref)})"
            raise InvalidInput(
                f"{self.codec.name} needs both checkpoints; the {side} of {short(self.source.ref)} is {why}",
                remedy="Ingest both checkpoints again and extract the update from them, or choose a lossy codec",
            )
        return self.source.store.open(ref, "checkpoint")

    def write(self, record: TensorRecord, facts: Sequence[Facts]) -> TensorRecord:
        """The record of one tensor, coded and stored."""
        if record.rank is not None and self.codec.keeps_factors:
            return record
        turns = {one.turns_factors for one in self.codec.alternatives}
        leaves = {turn: list(self.leaves(record, turn)) for turn in turns}
        written = [
            _written(
                Dense() if codec.keeps_factors and record.rank is not None else codec, leaves[codec.turns_factors], its
            )
            for codec, its in zip(self.codec.alternatives, facts, strict=True)
        ]
        options = [Option(sum(part.nbytes for part in one.parts.values()), one.error or 0.0) for one in written]
        chosen = written[self.codec.pick(options)]
        onto, through = (None, ()) if chosen.digest is None else self._foundation(record, chosen.codec)
        dtype = chosen.dtype if chosen.digest is None else dtype_name(self.sides(record.name)[1].dtype)
        return self.source.store.write_tensor(
            record.name,
            chosen.parts,
            role=record.role,
            dtype=dtype,
            shape=record.shape,
            codec=chosen.codec,
            rank=record.rank if chosen.rank is None else chosen.rank,
            onto=onto,
            digest=chosen.digest,
            error=chosen.error,
            through=through,
        )

    def _foundation(self, record: TensorRecord, codec: str) -> tuple[str, tuple[str, ...]]:
        """The blobs of the base's tensor; of one that is a product of factors, its numbers, stored for this."""
        base = self.side("base")
        found = foundation(base.record(record.name), codec)
        if found is not None:
            return found
        tensor = read_tensor(base, record.name)
        stored = self.source.store.write_tensor(
            record.name, {"tensor": tensor}, role=record.role, dtype=dtype_name(tensor.dtype), shape=record.shape
        )
        return stored.blob, ()


class _Written(NamedTuple):
    parts: Parts
    codec: str
    dtype: str
    rank: int | None
    digest: str | None
    error: float | None


def _written(codec: Codec, leaves: list[Leaf], facts: Facts) -> _Written:
    """What a codec makes of a tensor, or of its two factors, decoded again to see what it lost."""
    coded = [codec.encode(leaf, facts) for leaf in leaves]
    parts = coded[0].parts if len(coded) == 1 else {}
    if len(coded) == 2:
        parts = prefixed(coded[0].parts, "A") | prefixed(coded[1].parts, "B")
    first = coded[0]
    if first.digest is not None:
        return _Written(parts, first.codec, "", None, first.digest, None)
    # parts lie where the codec left them; what they lost is counted on the CPU, as readers decode
    decoded = [_decoded(one, leaf.delta).cpu() for one, leaf in zip(coded, leaves, strict=True)]
    return _Written(parts, first.codec, dtype_name(decoded[0].dtype), first.rank, None, _error(leaves, decoded))


def _decoded(coded: Coded, delta: Tensor) -> Tensor:
    shape = tuple(delta.shape)
    if coded.rank is None:
        return decode_parts(coded.codec, coded.parts, shape)
    rows, columns = shape
    left = decode_parts(coded.codec, unprefixed(coded.parts, "B"), (rows, coded.rank))
    right = decode_parts(coded.codec, unprefixed(coded.parts, "A"), (coded.rank, columns))
    return left.to(wide(left)) @ right.to(wide(right))


def _error(leaves: list[Leaf], decoded: list[Tensor]) -> float:
    """Relative Frobenius error of what was coded; of factors, of their product."""
    if len(leaves) == 1:
        wanted, found = leaves[0].delta.cpu(), decoded[0]
    else:
        wanted, found = leaves[1].delta.cpu() @ leaves[0].delta.cpu(), decoded[1] @ decoded[0]
    norm, off = (
        float(torch.linalg.vector_norm(one, dtype=torch.float64)) for one in (wanted, found.to(wide(wanted)) - wanted)
    )
    return off / norm if norm else 0.0
