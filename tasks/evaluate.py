"""Evaluate: scores of a model on the tasks seen so far, and what a series of them says about forgetting.

Notation of the continual-learning literature: R[i, j] is the accuracy on task j after step i, both from 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from storage.artifacts import Artifact, ArtifactStore
from storage.manifest import Lineage
from storage.refs import CheckpointRef, ScoresRef
from storage.tables import read_rows, write_rows
from tasks.asking import Asking
from tasks.parallel import Report
from tasks.suites import AnySuite

TABLE = "scores.parquet"
OUTCOMES = "outcomes.parquet"


class NamedSuite(Protocol):
    """A task as far as evaluation is concerned."""

    @property
    def name(self) -> str: ...

    @property
    def suite(self) -> AnySuite: ...


@dataclass(frozen=True)
class ScoreRow:
    """One row of a scores table."""

    task: str
    metric: str
    value: float
    samples: int
    low: float | None = None  # the interval at 95 %; scores that are older have none
    high: float | None = None


def evaluate(
    model: CheckpointRef,
    tasks: Sequence[NamedSuite],
    store: ArtifactStore,
    device: str = "cpu",
    report: Report = lambda done, total, note: None,
    base: CheckpointRef | None = None,
) -> ScoresRef:
    """Score `model` on every task's test split. The rows are stored as Parquet, the first metric leads.

    `base` lends its tokenizer or image processor: models tuned elsewhere are often published without one. Each suite is
    asked once: see tasks/asking.py.
    """
    asking = Asking(model, base, store, device)
    rows: list[ScoreRow] = []
    outcomes: list[dict[str, Any]] = []
    asked: dict[str, Any] = {}
    for number, task in enumerate(tasks):
        asked[task.name] = {"suite": task.suite.spec(), "data": task.suite.fingerprint()}
        for score in asking.scores(task.suite, asked[task.name]):
            rows.append(ScoreRow(task.name, score.metric, score.value, score.samples, score.low, score.high))
            outcomes += [{"task": task.name, "metric": score.metric, "outcome": one} for one in score.outcomes]
        report(number + 1, len(tasks), task.name)
    inputs = {"model": model} if base is None else {"model": model, "base": base}
    draft = store.draft("scores", Lineage("evaluate", inputs, {"tasks": asked}))
    draft.add_asset(TABLE, write_rows([row.__dict__ for row in rows]))
    draft.add_asset(OUTCOMES, write_rows(outcomes))
    return ScoresRef(draft.commit())


def read_scores(scores: Artifact) -> list[ScoreRow]:
    return [ScoreRow(**row) for row in read_rows(scores.asset(TABLE))]


def leading(scores: Artifact) -> dict[str, float]:
    """Task -> its leading metric."""
    found: dict[str, float] = {}
    for row in read_scores(scores):
        found.setdefault(row.task, row.value)
    return found


def outcomes_of(scores: Artifact) -> dict[str, list[float]]:
    """Task -> what each of its test rows gave, by its leading metric. Empty for scores that are older."""
    found: dict[str, list[float]] = {}
    if OUTCOMES not in scores.manifest.assets:
        return found
    first = {task: row.metric for row in reversed(read_scores(scores)) for task in [row.task]}
    for row in read_rows(scores.asset(OUTCOMES)):
        if row["metric"] == first[row["task"]]:
            found.setdefault(row["task"], []).append(float(row["outcome"]))
    return found


@dataclass(frozen=True)
class Summary:
    """What the accuracy matrix of one line says after its last step. Shares in [0, 1]; None where undefined.

    `held_out` and `tradeoff` are A_ZS and the geometric mean of FoMo-in-Flux (Roth et al. 2024). Its A_KA is `average`,
    here over the tasks that were merged so far: after the last one that is all of them, as there.
    """

    average: float  # ACC = mean_j R[T, j]
    worst: float  # min_j R[T, j]
    backward_transfer: float | None  # mean_{j<T} R[T, j] - R[j, j] (Lopez-Paz & Ranzato 2017)
    forgetting: float | None  # mean_{j<T} max_{j<=l<T} R[l, j] - R[T, j] (Chaudhry et al. 2018)
    normalised: float | None  # mean_j R[T, j] / individual_j
    retained: float | None = None  # mean over the base's abilities of the merged model's score / the base's
    forward_transfer: float | None = None  # mean_{j>=2} R[j-1, j] - b_j (Lopez-Paz & Ranzato 2017), b the base's
    held_out: float | None = None  # A_ZS, the merged model's mean score on the base's abilities, which nobody merged
    tradeoff: float | None = None  # sqrt(average * held_out)


def summarise(
    matrix: Sequence[Mapping[str, float]],
    individual: Mapping[str, float],
    ahead: Mapping[str, float] | None = None,
    base: Mapping[str, float] | None = None,
) -> Summary:
    """Summarise R, a row per step (task -> accuracy on the tasks seen by then, in order), against single models.

    A task that is merged in several rounds has a row per round. `ahead`: task -> R[j-1, j], the accuracy of the merged
    model right before the task was merged for the first time; `base`: task -> that of the base.
    """
    last = matrix[-1]
    tasks = list(last)
    merged = {list(row)[-1]: step for step, row in enumerate(matrix)}  # of a task with several rounds, the last one
    earlier = [(merged[task], task) for task in tasks[:-1]]
    transfer = [last[task] - matrix[j][task] for j, task in earlier]
    forgot = [max(matrix[step][task] for step in range(j, len(matrix) - 1)) - last[task] for j, task in earlier]
    shares = [last[task] / individual[task] for task in tasks if individual.get(task)]
    met, unmet = ahead or {}, base or {}
    gained = [met[task] - unmet[task] for task in tasks[1:] if task in met and task in unmet]
    return Summary(
        average=_mean(list(last.values())),
        worst=min(last.values()),
        backward_transfer=_mean(transfer) if transfer else None,
        forgetting=_mean(forgot) if forgot else None,
        normalised=_mean(shares) if len(shares) == len(tasks) else None,
        forward_transfer=_mean(gained) if gained and len(gained) == len(tasks) - 1 else None,
    )


def with_abilities(summary: Summary, model: Mapping[str, float], base: Mapping[str, float]) -> Summary:
    """What a merged model and its base reach on the base's abilities, added to a summary; unchanged without any."""
    if not model:
        return summary
    held_out = _mean(list(model.values()))
    between = tradeoff(summary.average, held_out)
    return replace(summary, retained=retention(model, base), held_out=held_out, tradeoff=between)


def tradeoff(gained: float, held_out: float) -> float | None:
    """The geometric mean of what was gained and what is held; None for scores below 0, of which there is none."""
    return math.sqrt(gained * held_out) if gained >= 0 and held_out >= 0 else None


def retention(model: Mapping[str, float], base: Mapping[str, float]) -> float | None:
    """The mean share of the base's scores that is left; None without any that is above 0."""
    shares = [model[name] / score for name, score in base.items() if score]
    return _mean(shares) if shares else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
