"""The graph: base, data, fine-tuned models, updates, states and merged models of one version of a line.

Everything is read from manifests and scores of the store; what only the registry knows, numbers, aliases and verdicts
of versions, is given. What was pruned is a node that says so, and what it was made from is not known any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from storage.artifacts import Artifact, ArtifactStore
from storage.errors import Damaged, Missing
from storage.lines import Entry
from storage.manifest import TensorRecord
from storage.refs import short
from tasks.lineage.nodes import KINDS, LEFT_OUT, REFUSED, Edge, Kind, Known, Lineage, Merge, Node
from tasks.lineage.scored import Accuracy, Scored, accuracy_of


def merges_of(entries: Sequence[Entry], versions: Sequence[Known]) -> list[Merge]:
    """The folds of a line in order, each with the versions that were registered of it."""
    found: list[Merge] = []
    before: str | None = None
    for entry in entries:
        same = (one for one in versions if one.state == entry.state and one.factor == entry.factor)
        found.append(Merge(entry, before, tuple(same)))
        before = entry.state
    return found


def lineage_of(
    line: str,
    merges: Sequence[Merge],
    store: ArtifactStore,
    scored: Scored,
    costs: Mapping[str, Mapping[str, Any]],
    version: Known | None = None,
    newest: int | None = None,
    able: Scored | None = None,
) -> Lineage:
    """The graph of `merges`, the last of the line itself being the version.

    `costs`: ref, cut short as people write it -> seconds and device. `newest`: draw no more than so many merges of the
    line; what its scores say is of all of them. `able`: scores on what the base can do."""
    inside = [one for one in merges if not one.aside]
    last = inside[-1].entry
    drawn = inside[-newest:] if newest else [*inside]
    earlier = len(inside) - len(drawn)
    states = {drawn[0].after, *(one.entry.state for one in drawn)}
    drawn += [one for one in merges if one.aside and one.after in states]
    models = [(one.entry, one.model or one.before) for one in inside]
    known = accuracy_of(models, last.base, _tuned_of(drawn, store), scored, len(inside) - earlier, able)
    drawing = _Drawing(store, known, scored, costs)
    drawing.base(last.base)
    for number, merge in enumerate(drawn, 1):
        drawing.merge(number, merge)
    return Lineage(
        line,
        version.number if version else None,
        last.number,
        dict(last.merger),
        store.url,
        tuple(sorted(drawing.nodes.values(), key=lambda node: (node.row, KINDS.index(node.kind)))),
        tuple(one for one in dict.fromkeys(drawing.edges) if one.source in drawing.nodes),
        known,
        version.aliases if version else (),
        version.verdict if version else "",
        version.reasons if version else "",
        version.pages.get("") if version else None,
        earlier,
    )


def _tuned_of(merges: Sequence[Merge], store: ArtifactStore) -> dict[str, str]:
    """Update -> the fine-tuned model behind it, as far as updates are still there."""
    found: dict[str, str] = {}
    for one in merges:
        update = _opened(store, one.entry.update)
        if update is not None and "tuned" in update.manifest.lineage.inputs:
            found[str(one.entry.update)] = update.manifest.lineage.inputs["tuned"]
    return found


def _opened(store: ArtifactStore, ref: str | None) -> Artifact | None:
    """None if its manifest is no longer there, or cannot be read."""
    try:
        return store.open(ref) if ref else None
    except (Missing, Damaged):
        return None


class _Drawing:
    """Nodes and edges as they are found. A node that is met again stays where it was met first."""

    def __init__(
        self, store: ArtifactStore, accuracy: Accuracy, scored: Scored, costs: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._store, self._accuracy, self._scored, self._costs = store, accuracy, scored, costs
        self.nodes: dict[str, Node] = {}
        self.edges: list[Edge] = []
        self._base = ""
        self._base_blobs: set[str] = set()

    def base(self, ref: str) -> None:
        self._base = ref
        artifact = _opened(self._store, ref)
        figures: dict[str, Any] = {"average": self._accuracy.base_average}
        title = short(ref, 8)
        if artifact is not None:
            manifest = artifact.manifest
            title = str(manifest.facts.get("architecture", title))
            figures |= {"parameters": manifest.parameters, "bytes": manifest.tensor_bytes}
            figures["made by"] = str(manifest.lineage.spec.get("name", manifest.lineage.step))
            self._base_blobs = {record.blob for record in manifest.tensors}
        self._add("base", title, 0, ref, figures, stored=artifact is not None)

    def merge(self, row: int, merge: Merge) -> None:
        entry = merge.entry
        pages = dict(merge.versions[-1].pages) if merge.versions else {}
        self._update(row, merge, pages)
        state = _opened(self._store, entry.state)
        figures: dict[str, Any] = {"updates": entry.step, "merger": entry.merger.get("name")}
        if state is not None:
            figures["bytes"] = state.manifest.tensor_bytes
            figures |= _numbers(state, "scale", "norm")
        figures |= {"weight": entry.weight} if entry.weight != 1 else {}
        ref, title = str(entry.state), f"state {entry.step}"
        self._add("state", title, row, ref, figures, links=pages, stage="fold", stored=state is not None, merge=merge)
        self._edge(merge.after, ref, "state")
        self._edge(entry.update, ref, "update")
        self._model(row, merge, pages)

    def _model(self, row: int, merge: Merge, pages: Mapping[str, str]) -> None:
        entry, model = merge.entry, merge.model
        artifact = _opened(self._store, model)
        figures: dict[str, Any] = {} if merge.aside or model is None else dict(self._accuracy.figures(merge.entry))
        if merge.aside and model:
            scores = self._scored.leading(model)
            figures = {"average": sum(scores.values()) / len(scores), "worst": min(scores.values())} if scores else {}
        if artifact is not None:
            figures["bytes"] = artifact.manifest.tensor_bytes
        figures |= {"factor": entry.factor} if entry.factor != 1 else {}
        title = _versions(merge.versions) or f"after {entry.step} updates"
        notes: list[str] = []
        for one in merge.versions:
            if one.verdict:
                notes.append(f"gate of version {one.number}: {one.verdict}{f', {one.reasons}' if one.reasons else ''}")
        if model is None:
            notes.append(
                "merged again with a later update, and not written" if merge.before else "its ref is not known"
            )
        if not merge.versions:
            notes.append("not registered")
        ref = model or f"model/{str(entry.state).partition('/')[2]}"
        found = None if model is None else artifact is not None
        self._add("model", title, row, ref, figures, notes, pages, stage="materialize", stored=found, merge=merge)
        self._edge(entry.state, ref, "state")

    def _update(self, row: int, merge: Merge, pages: Mapping[str, str]) -> None:
        """An update with what it was made from: base or start, data, fine-tuned model, update as extracted."""
        ref, task = str(merge.entry.update), merge.entry.task
        artifact = _opened(self._store, ref)
        if artifact is None:
            self._add("compressed", task, row, ref, {}, links=pages, stored=False, merge=merge)
            self._edge(self._base, ref, "base")
            return
        inputs = artifact.manifest.lineage.inputs
        compressed = "update" in inputs
        figures = {**_coded(artifact), **_numbers(artifact, "ratio", "norm")}
        kind: Kind = "compressed" if compressed else "update"
        self._add(
            kind, task, row, ref, figures, links=pages, stage="compress" if compressed else "extract", merge=merge
        )
        source = inputs.get("update")
        if source:
            extracted = _opened(self._store, source)
            figures = {**_coded(extracted), **_numbers(extracted, "norm")} if extracted else {}
            there = extracted is not None
            self._add("update", task, row, source, figures, links=pages, stage="extract", stored=there, merge=merge)
            self._edge(source, ref, "update")
        tuned = inputs.get("tuned")
        if tuned is None:
            self._edge(self._base, source or ref, "base")
            return
        self._tuned(row, merge, tuned, pages)
        self._edge(tuned, source or ref, "tuned")

    def _tuned(self, row: int, merge: Merge, ref: str, pages: Mapping[str, str]) -> None:
        task = merge.entry.task
        artifact = _opened(self._store, ref)
        figures: dict[str, Any] = {"score": self._scored.of(ref, task)}
        start: str | None = None
        stage = "ingest"
        notes: list[str] = []
        if artifact is not None:
            manifest = artifact.manifest
            spec, stage = manifest.lineage.spec, manifest.lineage.step
            own = {one.blob: one.bytes for one in manifest.tensors if one.blob not in self._base_blobs}
            figures["bytes"] = sum(own.values())
            start = manifest.lineage.inputs.get("start")
            if stage == "fine_tune":
                tuner = spec.get("tuner", {})
                figures |= {"tuner": tuner.get("name"), "steps": tuner.get("steps"), **_numbers(artifact, "loss")}
                self._data(row, ref, artifact, merge)
            else:
                notes.append("trained elsewhere")
        else:
            notes.append("what it was trained on is not known any more")
        there = artifact is not None
        self._add("tuned", task, row, ref, figures, notes, pages, stage=stage, stored=there, merge=merge)
        self._edge(start or self._base, ref, "start" if start else "base")

    def _data(self, row: int, tuned: str, artifact: Artifact, merge: Merge) -> None:
        spec = artifact.manifest.lineage.spec
        source = spec.get("suite", {}).get("data", {})
        told = {key: value for key, value in source.items() if key != "version" and value not in (None, 0, "", [])}
        figures: dict[str, Any] = {**_numbers(artifact, "examples"), "fingerprint": str(spec.get("data", ""))[:12]}
        # one set of examples may be seen in several ways: the settings are part of what was trained on
        name = f"data/{merge.entry.task}/{spec.get('data', '')}"
        figures |= {key: str(value) for key, value in told.items() if key != "name"}
        self._add("data", str(source.get("name", "data")), row, name, figures, merge=merge)
        self._edge(name, tuned, "data")

    def _edge(self, source: str | None, target: str | None, role: str) -> None:
        if source and target:
            self.edges.append(Edge(source, target, role))

    def _add(
        self,
        kind: Kind,
        title: str,
        row: int,
        name: str,
        figures: Mapping[str, Any],
        notes: Sequence[str] = (),
        links: Mapping[str, str] | None = None,
        *,
        stage: str = "",
        stored: bool | None = True,
        merge: Merge | None = None,
    ) -> None:
        """`stored`: None where there is nothing to be stored; `stage`: whose run to link to."""
        if name in self.nodes:
            return
        known = {key: value for key, value in figures.items() if value is not None}
        known |= self._costs.get(short(name), {})
        evaluated = [self._costs.get(short(ref), {}).get("seconds") for ref in self._scored.refs(name)]
        took = [seconds for seconds in evaluated if seconds is not None]
        known |= {"evaluation seconds": sum(took)} if took else {}
        real = kind != "data" and not name.startswith("model/")
        if stored is False:
            notes = [*notes, "no longer in the store: pruned"]
        words = {"version in MLflow": (links or {}).get(""), "run in MLflow": (links or {}).get(stage)}
        self.nodes[name] = Node(
            name,
            kind,
            title,
            row,
            name if real else None,
            f"{self._store.url.rstrip('/')}/{name}" if real else None,
            bool(stored) and real,
            known,
            tuple(notes),
            {word: page for word, page in words.items() if page},
            _badges(merge) if merge and kind == "model" else (),
            merge is not None and merge.aside,
        )


def _versions(versions: Sequence[Known]) -> str:
    numbers = [str(one.number) for one in versions]
    return f"version{'s' * (len(numbers) > 1)} {', '.join(numbers)}" if numbers else ""


def _badges(merge: Merge) -> tuple[str, ...]:
    aliases = [alias for one in merge.versions for alias in one.aliases]
    left_out = any(one.left_out for one in merge.versions)
    refused = any(one.verdict == "failed" for one in merge.versions)
    return (*aliases, *([LEFT_OUT] if left_out else [REFUSED] if refused else []))


def _numbers(artifact: Artifact, *names: str) -> dict[str, float]:
    facts = artifact.manifest.facts
    return {name: facts[name] for name in names if isinstance(facts.get(name), (int, float))}


def _coded(artifact: Artifact) -> dict[str, Any]:
    """How an update is written, and what it takes."""
    manifest = artifact.manifest
    spec = manifest.lineage.spec
    figures: dict[str, Any] = {"bytes": manifest.tensor_bytes}
    if "update" in manifest.lineage.inputs:
        figures |= {"codec": spec.get("name"), "density": spec.get("density"), "error": _error(manifest.tensors)}
    return figures


def _error(records: Sequence[TensorRecord]) -> float | None:
    """The largest relative error that a codec left in a tensor."""
    return max((record.error for record in records if record.error is not None), default=None)
