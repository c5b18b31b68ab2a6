"""Search: how much of the merged delta to write, chosen on examples that the tasks were trained on."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.manifest import Lineage
from storage.overlay import Overlay
from storage.refs import CheckpointRef, ScoresRef, StateRef
from storage.tables import write_rows
from tasks.checkpoints import load_model
from tasks.choice import Choice, require
from tasks.evaluate import TABLE, NamedSuite
from tasks.materialize import materialize
from tasks.parallel import Budget, Report


@dataclass(frozen=True)
class Search(Choice):
    """Try these `factors` on the merged delta after every merge, and keep the one with the best mean of the tasks'
    leading scores, the first of equals. Each task counts the same, by the first `samples` rows of its training split:
    no test example has a part in the choice.
    """

    name: Literal["search"] = "search"
    version: Literal[1] = 1
    factors: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    samples: int = 256

    def __post_init__(self) -> None:
        require(len(self.factors) > 0, "factors", "a list with at least one factor", self.factors)
        require(all(0 < factor < inf for factor in self.factors), "factors", "finite and positive", self.factors)
        require(self.samples > 0, "samples", "positive", self.samples)


def choose_factor(
    base: CheckpointRef,
    state: StateRef,
    tasks: Sequence[NamedSuite],
    spec: Search,
    store: ArtifactStore,
    device: str = "cpu",
    *,
    budget: Budget | None = None,
    report: Report = lambda done, total, note: None,
) -> ScoresRef:
    """Scores of every factor, with the best as the fact `factor`. The models that were tried are not kept."""
    source = store.open(base, "checkpoint")
    problems = {task.name: task.suite.open(source) for task in tasks}
    rows, means = [], {}
    for number, factor in enumerate(spec.factors, 1):
        with TemporaryDirectory() as folder:
            trial = ArtifactStore(Overlay(store.objects, DirectoryObjects(Path(folder))))
            model = materialize(base, state, trial, device, factor=factor, budget=budget)
            backbone = load_model(trial.open(model), device)
        found = {}
        for name, problem in problems.items():
            leads = problem.score(backbone, device, lambda done, total: None, "train", spec.samples)[0]
            found[name] = leads.value
            rows.append(
                {
                    "factor": factor,
                    "task": name,
                    "metric": leads.metric,
                    "value": leads.value,
                    "samples": leads.samples,
                }
            )
        means[factor] = statistics.fmean(found.values())
        report(number, len(spec.factors), f"factor {factor:g}")
    best = max(means, key=lambda factor: means[factor])
    suites = {task.name: {"suite": task.suite.spec(), "data": task.suite.fingerprint()} for task in tasks}
    draft = store.draft("scores", Lineage("search", {"base": base, "state": state}, {**spec.spec(), "tasks": suites}))
    draft.add_asset(TABLE, write_rows(rows))
    draft.facts.update({"factor": best, "means": {repr(factor): mean for factor, mean in means.items()}})
    return ScoresRef(draft.commit())
