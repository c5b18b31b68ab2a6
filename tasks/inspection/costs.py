"""What each codec would make of an update: real files, written aside and read back, and gone afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from storage.artifacts import Artifact
from storage.errors import InvalidInput
from storage.manifest import TensorRecord
from storage.refs import UpdateRef
from tasks.aside import aside
from tasks.codecs import Codec
from tasks.compress import compress_update
from tasks.parallel import Budget, Report

_LOSSY = "it was lossy before: what is lossless needs the update that it was made from"


@dataclass(frozen=True)
class CodecCost:
    """
    codec:    its name; at the default settings, unless others were asked for
    lossless: whether every bit of the tuned model comes back
    bytes:    of the update's files; none if the codec cannot write it
    ratio:    how many times smaller than all tensors in bfloat16
    bits:     bits for each number
    error:    Frobenius norm of what is lost over that of the update
    why:      why the codec cannot write it
    """

    codec: str
    lossless: bool
    bytes: int | None = None
    ratio: float | None = None
    bits: float | None = None
    error: float | None = None
    why: str = ""


def codec_cost(
    source: Artifact,
    codec: Codec,
    squares: Mapping[str, float],
    lossy: bool,
    device: str = "cpu",
    *,
    budget: Budget | None = None,
    report: Report | None = None,
) -> CodecCost:
    """Write the update `source` with `codec` and see what it takes.

    squares: the squared norm of every tensor that is compressed. lossy: whether `source` is not the exact update.
    """
    if codec.lossless and lossy:
        return CodecCost(codec.name, True, why=_LOSSY)
    with aside(source.store) as place:
        try:
            written = place.open(
                compress_update(UpdateRef(source.ref), codec, place, device, budget=budget, report=report)
            )
        except InvalidInput as refusal:
            return CodecCost(codec.name, codec.lossless, why=str(refusal).removesuffix(refusal.remedy).rstrip(". "))
        facts, records = written.manifest.facts, written.manifest.tensors
    total, elements = math.fsum(squares.values()), sum(one.elements for one in records)
    lost = math.fsum(_lost(one, source.record(one.name)) ** 2 * squares.get(one.name, 0.0) for one in records)
    return CodecCost(
        codec.name,
        codec.lossless,
        int(facts["file_bytes"]),
        float(facts["ratio"]),
        8 * facts["file_bytes"] / elements if elements else 0.0,
        math.sqrt(lost / total) if total else 0.0,
    )


def _lost(written: TensorRecord, before: TensorRecord) -> float:
    """Relative error of one tensor; factors that a codec leaves alone lose nothing, whatever was lost before."""
    return 0.0 if written == before else written.error or 0.0
