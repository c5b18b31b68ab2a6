"""Intake: how what is submitted to a line becomes an update of it. Recorded with the line's queue, kept for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from storage.artifacts import ArtifactStore
from storage.errors import Damaged, InvalidInput
from storage.lines import Line
from storage.queue import Queue
from tasks.codecs import CODECS, Codec, Ternary
from tasks.extract import Extract


@dataclass(frozen=True)
class Intake:
    """How updates are extracted from submitted checkpoints, and the codec that writes them."""

    extract: Extract = field(default_factory=Extract)
    codec: Codec = field(default_factory=Ternary)

    def __post_init__(self) -> None:
        if self.codec.examples or self.codec.trials():
            raise InvalidInput(
                f"codec {self.codec.name!r} with these settings looks at examples of a task, and what is submitted "
                "comes without any",
                remedy="Choose another codec for the line's queue: `deltaworks line policy NAME --codec ternary`",
            )

    def spec(self) -> dict[str, Any]:
        return {"extract": self.extract.spec(), "codec": self.codec.spec()}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], where: str) -> Intake:
        """The inverse of `spec`. `where` names what it was read from."""
        try:
            codec = spec["codec"]
            return cls(Extract(**spec["extract"]), CODECS[codec["name"]](**codec))
        except (KeyError, TypeError) as error:
            raise Damaged(f"{where} has a policy that this version cannot read: {error!r}") from error


def intake_of(queue: Queue, line: Line, store: ArtifactStore) -> Intake:
    """The intake of a line. The first time it is recorded: the way its newest update was made, or the defaults."""
    found = queue.policy() or queue.keep_policy(_as_before(line, store).spec())
    return Intake.from_spec(found, f"the queue of line {queue.line!r}")


def _as_before(line: Line, store: ArtifactStore) -> Intake:
    """How the line's newest update was made, as far as its lineage tells."""
    ref = line.head().update
    if ref is None or not store.has(ref):
        return Intake()
    specs: dict[str, Mapping[str, Any]] = {}
    while ref is not None and store.has(ref):
        lineage = store.open(ref, "update").manifest.lineage
        specs.setdefault(lineage.step, lineage.spec)
        ref = lineage.inputs.get("update")  # type: ignore[assignment]
    extract = Extract(**specs["extract"]) if "extract" in specs else Extract()
    if "compress" not in specs:
        return Intake(extract, CODECS["dense"]())
    codec = specs["compress"]
    return Intake(extract, CODECS[codec["name"]](**codec))
