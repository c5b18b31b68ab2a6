"""A line with everything that a lineage shows, made in a moment: base, data, tuned models, updates, states, scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from storage.artifacts import ArtifactStore
from storage.lines import Entry, Line
from storage.manifest import Lineage
from storage.refs import CheckpointRef, ScoresRef, UpdateRef
from storage.registry import ModelVersion, Registry
from storage.tables import write_rows
from tasks.codecs import Ternary
from tasks.compress import compress_update
from tasks.evaluate import TABLE, Summary, leading, summarise, with_abilities
from tasks.extract import Extract, extract_update
from tasks.gate import Verdict
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.mergers import Average
from tasks.recipe import Recipe
from tasks.register import register
from tests.builders import role_of

RECIPE = Recipe(Average())
SHAPES = {"embed.weight": (12, 8), "layers.0.fc.weight": (16, 8), "layers.1.fc.weight": (16, 8), "norm.bias": (8,)}


def tensors(seed: int, size: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * size for name, shape in SHAPES.items()}


def checkpoint(weights: Mapping[str, Tensor], store: ArtifactStore, lineage: Lineage) -> CheckpointRef:
    draft = store.draft("checkpoint", lineage)
    for name, tensor in weights.items():
        draft.add(name, {"tensor": tensor}, role=role_of(name, tensor), dtype="F32", shape=tensor.shape)
    draft.facts.update({"architecture": "TinyModel", "examples": 40, "loss": 0.25})
    return CheckpointRef(draft.commit())


def scores(model: CheckpointRef, base: CheckpointRef, values: Mapping[str, float], store: ArtifactStore) -> ScoresRef:
    """What an evaluation of `model` writes."""
    draft = store.draft("scores", Lineage("evaluate", {"model": model, "base": base}))
    rows = [
        {"task": task, "metric": "accuracy", "value": value, "samples": 100, "low": value - 0.05, "high": value + 0.05}
        for task, value in values.items()
    ]
    draft.add_asset(TABLE, write_rows(rows))
    return ScoresRef(draft.commit())


@dataclass
class Grown:
    """A line of three tasks by `average`; R is the accuracy matrix that its scores tell.

    `ahead`: what the merged model reaches on each task before it is merged, none of the first. `able`: what the base
    and then the merged models reach on what the base can do."""

    store: ArtifactStore
    name: str = "tiny"
    tasks: Sequence[str] = ("sums", "dates", "names")
    matrix: Sequence[Sequence[float]] = ((0.9,), (0.8, 0.7), (0.6, 0.75, 0.5))
    alone: Sequence[float] = (0.95, 0.9, 0.85)
    ahead: Sequence[float] = (0.3, 0.2)
    able: Sequence[float] = (0.96, 0.8, 0.72, 0.6)
    entries: list[Entry] = field(default_factory=list)
    models: list[CheckpointRef] = field(default_factory=list)
    scored: list[ScoresRef] = field(default_factory=list)
    measured: list[list[ScoresRef]] = field(default_factory=list)
    held: list[ScoresRef] = field(default_factory=list)

    def __post_init__(self) -> None:
        store, weights = self.store, tensors(0)
        self.base = checkpoint(weights, store, Lineage("digits_base", {}, {"name": "digits_base"}))
        at_base = scores(self.base, self.base, dict.fromkeys(self.tasks, 0.1), store)
        self.held = [scores(self.base, self.base, {"upright": self.able[0]}, store)]
        self.line = Line(store.objects, self.name)
        self.line.open(self.base, RECIPE.spec())
        for number, (task, row) in enumerate(zip(self.tasks, self.matrix, strict=True)):
            tuned = self.tuned(task, number + 1)
            update = self.update(tuned)
            head = self.line.head()
            state = fold_update(self.base, head.state, update, RECIPE, store)
            self.entries.append(self.line.fold(head, task, update, state))
            self.models.append(materialize(self.base, state, store))
            found = dict(zip(self.tasks, row, strict=False))
            self.scored.append(scores(self.models[-1], self.base, found, store))
            self.measured.append([at_base, scores(tuned, self.base, {task: self.alone[number]}, store)])
            if number:
                before = {task: self.ahead[number - 1]}
                self.measured[-1].append(scores(self.models[-2], self.base, before, store))
            self.held.append(scores(self.models[-1], self.base, {"upright": self.able[number + 1]}, store))

    def tuned(self, task: str, seed: int) -> CheckpointRef:
        base, moved = tensors(0), tensors(seed, 0.1)
        spec = {
            "task": task,
            "data": f"{seed}" * 64,
            "suite": {"name": "image_classification", "data": {"name": "digits", "view": task, "seed": 0}},
            "tuner": {"name": "full", "steps": 7},
        }
        weights = {name: base[name] + moved[name] for name in base}
        return checkpoint(weights, self.store, Lineage("fine_tune", {"base": self.base}, spec))

    def update(self, tuned: CheckpointRef) -> UpdateRef:
        return compress_update(
            extract_update(self.base, tuned, Extract(), self.store), Ternary(density=0.5), self.store
        )

    def summary(self, step: int) -> Summary:
        rows = [leading(self.store.open(one)) for one in self.scored[: step + 1]]
        ahead, base = dict(zip(self.tasks[1:], self.ahead, strict=True)), dict.fromkeys(self.tasks, 0.1)
        found = summarise(rows, dict(zip(self.tasks, self.alone, strict=True)), ahead, base)
        return with_abilities(found, {"upright": self.able[step + 1]}, {"upright": self.able[0]})

    def register(
        self, step: int, registry: Registry, verdict: Verdict | None = None, left_out: bool = False
    ) -> ModelVersion:
        """The version of a step, counted from 0, as a chain registers it."""
        entries, made = self.entries[: step + 1], (self.models[step], self.scored[step], self.summary(step))
        costs = {str(entries[-1].state): {"seconds": 1.5, "device": "cpu"}, self.models[step]: {"seconds": 0.5}}
        costs[self.scored[step]] = {"seconds": 2.0, "device": "cpu"}
        beside, able = self.measured[step], (self.held[0], self.held[step + 1])
        return register("tiny", self.name, entries, *made, self.store, registry, verdict, left_out, beside, costs, able)
