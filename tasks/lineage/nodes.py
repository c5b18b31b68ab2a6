"""What a lineage is made of: nodes and edges, and the merges and versions that they are found by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from storage.lines import Entry
from tasks.lineage.scored import Accuracy

Kind = Literal["base", "data", "tuned", "update", "compressed", "state", "model"]  # in the order of making
KINDS: tuple[Kind, ...] = get_args(Kind)
FORMAT = "deltaworks/lineage@1"
LEFT_OUT, REFUSED = "left out", "refused"  # badges


@dataclass(frozen=True)
class Known:
    """What the registry says of a version. `pages`: where a browser finds it, `""`, and the runs of its stages.

    `left_out`: the gate kept it out of the line. `verdict`: what the gate said, and why.
    """

    number: int
    state: str
    factor: float = 1.0
    model: str | None = None
    aliases: tuple[str, ...] = ()
    verdict: str = ""
    reasons: str = ""
    left_out: bool = False
    pages: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Merge:
    """One merge on the way to the version: its entry, the versions that it was registered as, and the model if known.

    `after`: the state that it was folded into. `aside`: no part of the line, because the gate left it out.
    """

    entry: Entry
    after: str | None
    versions: tuple[Known, ...] = ()
    aside: bool = False
    written: str | None = None  # the model, where no version names it
    before: str | None = None  # what the line was after it, where another recipe merged it again: what scores are of

    @property
    def model(self) -> str | None:
        return next((one.model for one in self.versions if one.model), self.written)


@dataclass(frozen=True)
class Node:
    """
    id:      the ref; of data, `data/<fingerprint>`; of a merged model without a known ref, `model/<state>`
    row:     the merge that it belongs to, from 1; 0 for the base
    ref:     None for data, which is not in the store
    stored:  whether its manifest is in the store
    figures: key figures: `score`, `average`, `worst`, `forgetting`, `forward transfer`, `held out`,
             `trade-off` as shares; `bytes`; `norm`; `seconds` ...
    notes:   sentences
    links:   word -> address of a page in MLflow
    badges:  aliases that point to it, and what its gate refused
    aside:   no part of the line
    """

    id: str
    kind: Kind
    title: str
    row: int
    ref: str | None = None
    address: str | None = None
    stored: bool = True
    figures: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    links: Mapping[str, str] = field(default_factory=dict)
    badges: tuple[str, ...] = ()
    aside: bool = False


@dataclass(frozen=True)
class Edge:
    """`role`: what the first is to the second, as lineages name it: base, start, data, tuned, update, state."""

    source: str
    target: str
    role: str


@dataclass(frozen=True)
class Lineage:
    """Of one version, `line@version`, or of a journal entry that no registry knows. `page`: its page in MLflow."""

    line: str
    version: int | None
    entry: int
    merger: Mapping[str, Any]
    store: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    accuracy: Accuracy
    aliases: tuple[str, ...] = ()
    verdict: str = ""
    reasons: str = ""
    page: str | None = None
    earlier: int = 0  # merges that are not drawn

    @property
    def title(self) -> str:
        return f"{self.line}@{self.version}" if self.version is not None else f"{self.line}, entry {self.entry}"

    def of_kind(self, kind: Kind) -> list[Node]:
        return [node for node in self.nodes if node.kind == kind]

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "title": self.title, **asdict(self)}
