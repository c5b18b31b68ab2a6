"""Compress: an update written smaller."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from storage.artifacts import Artifact, ArtifactStore
from storage.manifest import Lineage, TensorRecord
from storage.refs import UpdateRef
from tasks.codecs import AnyCodec, decoder
from tasks.extract import HEAD
from tasks.tensors import decode_factors, decode_record, prefixed


def compress_update(update: UpdateRef, codec: AnyCodec, store: ArtifactStore, device: str = "cpu") -> UpdateRef:
    """`update` coded anew by `codec`. Low-rank tensors stay factors: their factors are coded, as ComPEFT does.

    The facts report the files' bytes, headers included, and their ratio to all tensors of the model in bfloat16.
    """
    source = store.open(update, "update")
    records = [record for record in source.manifest.tensors if not record.role.startswith(HEAD)]

    def leaves() -> Iterator[Tensor]:
        for record in records:
            for _, leaf in _leaves(source, record, device):
                yield leaf

    facts = codec.survey(leaves)
    lineage = Lineage("compress", {**source.manifest.lineage.inputs, "update": update}, codec.spec())
    draft = store.draft("update", lineage)
    for record in source.manifest.tensors:
        if record.role.startswith(HEAD):
            draft.share(record)
            continue
        parts = {}
        for factor, leaf in _leaves(source, record, device):
            coded = codec.encode(leaf, facts)
            parts.update(prefixed(coded, factor) if factor else coded)
        draft.add(
            record.name,
            parts,
            role=record.role,
            dtype="F32",
            shape=record.shape,
            codec=decoder(codec),
            rank=record.rank,
        )
    kept = {name: fact for name, fact in source.manifest.facts.items() if name != "norm"}  # that of the exact update
    draft.facts.update({**kept, **facts, **sizes(draft.records)})
    return UpdateRef(draft.commit())


def sizes(records: list[TensorRecord]) -> dict[str, float]:
    """What an update costs: bytes of its distinct files, bytes of the model's tensors in bfloat16, and the ratio."""
    files = sum({record.blob: record.bytes for record in records}.values())
    bf16 = 2 * sum(record.elements for record in records)
    return {"file_bytes": files, "bf16_bytes": bf16, "ratio": bf16 / files if files else 0.0}


def _leaves(source: Artifact, record: TensorRecord, device: str) -> Iterator[tuple[str, Tensor]]:
    parts = source.parts(record.name)
    if record.rank is None:
        yield "", decode_record(record, parts, device)
    else:
        left, right = decode_factors(record, parts)
        yield "A", right.to(device)
        yield "B", left.to(device)
