"""A recipe: how updates enter a line. A merger, what is done to every update before, and to the merged delta after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storage.artifacts import Artifact
from storage.errors import InvalidInput
from storage.refs import short
from tasks.mergers import MERGERS, AnyMerger, Joint
from tasks.scalings import SCALINGS, AnyScaling
from tasks.sparsifiers import SPARSIFIERS, AnySparsifier

_THINNING = 6  # tensors that a sparsifier takes: the numbers drawn, the ranks of DELLA, the mask, the result


@dataclass(frozen=True)
class Recipe:
    """`sparsify` thins each update before it is merged; `scaling` sets the size of what is written."""

    merger: AnyMerger
    sparsify: AnySparsifier | None = None
    scaling: AnyScaling | None = None

    def spec(self) -> dict[str, Any]:
        """The merger's settings as they are, and beside them those of the others if there are any."""
        found = self.merger.spec()
        for key, choice in (("sparsify", self.sparsify), ("scaling", self.scaling)):
            if choice is not None:
                found[key] = choice.spec()
        return found

    @property
    def entrywise(self) -> bool:
        """Whether an entry of the merged delta depends on that of the updates, and on facts and surveys alone."""
        thin = self.sparsify
        return self.merger.entrywise and (thin is None or thin.entrywise) and self.scaling is None

    def workspace(self, joint: float = 0) -> float:
        """Memory that one tensor takes, in multiples of its size in float32; `joint` is that of a joint merger."""
        merging = joint if isinstance(self.merger, Joint) else self.merger.workspace()
        return merging + (_THINNING if self.sparsify else 0)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], where: str) -> Recipe:
        """The inverse of `spec`. `where` names what it was read from."""
        merger = {key: value for key, value in spec.items() if key not in ("sparsify", "scaling")}
        return cls(
            _made(MERGERS, merger, "merger", where),
            _made(SPARSIFIERS, spec["sparsify"], "sparsifier", where) if "sparsify" in spec else None,
            _made(SCALINGS, spec["scaling"], "scaling", where) if "scaling" in spec else None,
        )


def recipe_of(state: Artifact) -> Recipe:
    """The recipe that made a state."""
    return Recipe.from_spec(state.manifest.lineage.spec, short(state.ref))


def _made(table: Mapping[str, Any], spec: Mapping[str, Any], what: str, where: str) -> Any:
    kind = table.get(str(spec.get("name")))
    if kind is None:
        raise InvalidInput(f"{where} was made by {what} {spec.get('name')!r}, which this version lacks")
    return kind(**spec)
