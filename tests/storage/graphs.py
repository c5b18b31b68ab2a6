"""Random stores: artifacts that need each other, lines, pins and memos, and what a person would expect of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from storage.artifacts import ArtifactStore
from storage.lines import Line
from storage.manifest import Lineage
from storage.measured import Measured
from storage.objects import MemoryObjects
from storage.pins import pin
from storage.refs import CheckpointRef, Ref, StateRef, UpdateRef

MERGER = {"name": "sce", "version": 1}


@dataclass
class Graph:
    """A store and, in plain sets, what was put into it. `needs` and `sources` are what its makers meant."""

    store: ArtifactStore = field(default_factory=lambda: ArtifactStore(MemoryObjects()))
    needs: dict[Ref, set[Ref]] = field(default_factory=dict)
    sources: dict[Ref, set[Ref]] = field(default_factory=dict)
    blobs: dict[Ref, set[str]] = field(default_factory=dict)
    lines: dict[str, list[tuple[UpdateRef, StateRef]]] = field(default_factory=dict)
    bases: set[Ref] = field(default_factory=set)
    pinned: set[Ref] = field(default_factory=set)
    memos: dict[str, Ref] = field(default_factory=dict)
    measured: dict[str, Ref] = field(default_factory=dict)  # key -> the model that was measured

    def add(self, ref: Ref, needs: Iterable[Ref] = (), sources: Iterable[Ref] = ()) -> None:
        self.needs[ref], self.sources[ref] = set(needs), set(sources)
        self.blobs[ref] = self.store.open(ref).manifest.blobs()

    def reach(self, roots: Iterable[Ref], *, sources: bool = False) -> set[Ref]:
        found, waiting = set(), list(roots)
        while waiting:
            one = waiting.pop()
            if one not in found:
                found.add(one)
                waiting += self.needs[one] | (self.sources[one] if sources else set())
        return found


def of_kind(graph: Graph, kind: str) -> list[Ref]:
    return sorted(ref for ref in graph.needs if ref.startswith(kind))


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    graph = Graph()
    for number in range(draw(st.integers(1, 3))):
        _artifact(draw, graph, "checkpoint", number)
    for number in range(draw(st.integers(1, 6))):
        base = draw(st.sampled_from(of_kind(graph, "checkpoint")))
        tuned = _artifact(draw, graph, "checkpoint", 100 + number)
        dense = _artifact(draw, graph, "update", number, base=base, sources={"tuned": tuned})
        if draw(st.booleans()):
            _artifact(draw, graph, "update", 100 + number, base=base, sources={"tuned": tuned, "update": dense})
    for number in range(draw(st.integers(0, 3))):
        _artifact(draw, graph, "scores", number, sources={"model": draw(st.sampled_from(of_kind(graph, "check")))})
    for number in range(draw(st.integers(0, 2))):
        _line(draw, graph, f"line{number}")
    for ref in draw(st.lists(st.sampled_from(sorted(graph.needs)), max_size=2, unique=True)):
        pin(graph.store, ref, "a test")
        graph.pinned.add(ref)
    for number, ref in enumerate(draw(st.lists(st.sampled_from(sorted(graph.needs)), max_size=4))):
        graph.store.remember(f"key{number}", ref, {})
        graph.memos[f"memo/key{number}"] = ref
    for number, ref in enumerate(draw(st.lists(st.sampled_from(of_kind(graph, "checkpoint")), max_size=3))):
        Measured(graph.store.objects).write(CheckpointRef(ref), f"key{number}", [number])
        graph.measured[f"measured/{ref.partition('/')[2]}/key{number}"] = ref
    for number in range(draw(st.integers(0, 2))):
        graph.store.write_blob(b"loose" + bytes([number]))
    return graph


def _artifact(
    draw: st.DrawFn,
    graph: Graph,
    kind: str,
    number: int,
    base: Ref | None = None,
    sources: dict[str, Ref] | None = None,
) -> Ref:
    """One of `kind`, with tensors from a small pool, so that blobs are shared."""
    inputs = {**(sources or {}), **({"base": base} if base else {})}
    draft = graph.store.draft(kind, Lineage("test", inputs))  # type: ignore[arg-type]
    for index, value in enumerate(draw(st.lists(st.integers(0, 5), max_size=3))):
        draft.add(f"t{index}", {"tensor": torch.full((4,), value)}, role="bare", dtype="I64", shape=(4,))
    if base and draw(st.booleans()) and graph.blobs[base]:
        onto = sorted(graph.blobs[base])[0]
        draft.add("onto", {"tensor": torch.full((2,), 9)}, role="bare", dtype="I64", shape=(2,), onto=onto)
    if draw(st.booleans()):
        draft.add_asset("config.json", b"x" * draw(st.integers(0, 2)))
    draft.facts["number"] = number
    ref = draft.commit()
    graph.add(ref, [base] if base else [], [*(sources or {}).values()])
    return ref


def _line(draw: st.DrawFn, graph: Graph, name: str) -> None:
    line, store = Line(graph.store.objects, name), graph.store
    updates = of_kind(graph, "update")
    base = CheckpointRef(sorted(graph.needs[draw(st.sampled_from(updates))])[0])
    graph.bases.add(base)
    head = line.open(base, MERGER)
    merged: list[UpdateRef] = []
    folds = graph.lines.setdefault(name, [])
    fitting = [ref for ref in updates if base in graph.needs[ref]]
    for ref in draw(st.lists(st.sampled_from(fitting), max_size=4, unique=True)):
        merged.append(UpdateRef(ref))
        draft = store.draft("state", Lineage("fold", {"base": base, "update": ref}, MERGER))
        draft.facts.update({"line": name, "count": len(merged), "updates": list(merged)})
        state = StateRef(draft.commit())
        graph.add(state, [base, *merged])
        head = line.fold(head, f"t{len(merged)}", UpdateRef(ref), state)
        folds.append((UpdateRef(ref), state))
