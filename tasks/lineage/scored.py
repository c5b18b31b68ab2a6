"""Scores of a lineage: what each model reached, the accuracy matrix of the line, and what it forgot.

Notation as in tasks/evaluate.py: R[i, j] is the score on task j after step i.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from storage.artifacts import ArtifactStore
from storage.errors import Damaged, Missing
from storage.lines import Entry
from storage.refs import parse_ref
from tasks.evaluate import ScoreRow, Summary, read_scores, summarise, tradeoff, with_abilities

_ROUND = "."


class Scored:
    """Leading scores of models, from scores that are named, or from all that are in the store."""

    def __init__(self, store: ArtifactStore, scores: Iterable[str], of: Mapping[str, str] | None = None) -> None:
        """`scores`: refs whose manifests say what they are of; `of`: model -> its scores, where that is known."""
        self._store = store
        self._named = dict(of or {})
        self._found: dict[str, list[str]] = {model: [ref] for model, ref in (of or {}).items()}
        for ref in scores:
            model = self._model(ref)
            if model is not None and ref not in self._found.setdefault(model, []):
                self._found[model].append(ref)
        self._rows = cache(self._read)

    @classmethod
    def everything(cls, store: ArtifactStore) -> Scored:
        """All scores of a store: one read for each."""
        return cls(store, store.refs("scores"))

    def rows(self, model: str) -> dict[str, ScoreRow]:
        """Task -> its leading score; of several evaluations of one model, the one with the most tasks goes first."""
        found: dict[str, ScoreRow] = {}
        for rows in sorted((self._rows(ref) for ref in self._found.get(model, [])), key=lambda rows: -len(rows)):
            for task, row in rows.items():
                found.setdefault(task, row)
        return found

    def asked(self, model: str) -> dict[str, ScoreRow]:
        """What the evaluation gave that the version of a model names."""
        return self._rows(self._named[model]) if model in self._named else {}

    def leading(self, model: str) -> dict[str, float]:
        return {task: row.value for task, row in self.rows(model).items()}

    def of(self, model: str, task: str) -> float | None:
        """The score of a model on a task, or on the task of which this is a round."""
        found = self.leading(model)
        return found.get(task, found.get(task_of(task)))

    def refs(self, model: str) -> list[str]:
        return list(self._found.get(model, []))

    def _model(self, ref: str) -> str | None:
        try:
            lineage = self._store.open(parse_ref(ref, "scores")).manifest.lineage
        except (Missing, Damaged):
            return None
        return lineage.inputs.get("model") if lineage.step == "evaluate" else None

    def _read(self, ref: str) -> dict[str, ScoreRow]:
        found: dict[str, ScoreRow] = {}
        try:
            for row in read_scores(self._store.open(ref, "scores")):
                found.setdefault(row.task, row)
        except (Missing, Damaged):
            return {}
        return found


def task_of(name: str) -> str:
    """The task of an update: `billing` of `billing.2`, its second round."""
    stem, dot, number = name.rpartition(_ROUND)
    return stem if dot and number.isdecimal() else name


@dataclass(frozen=True)
class Row:
    """A row of the matrix: R[step, task] after one more merge, and what that means for the line.

    `able`: what the model reaches on what the base can do; nothing if that was not measured."""

    step: int
    merged: str
    scores: Mapping[str, ScoreRow]
    summary: Summary | None = None
    able: Mapping[str, float] = field(default_factory=dict)

    @property
    def average(self) -> float | None:
        return sum(one.value for one in self.scores.values()) / len(self.scores) if self.scores else None

    @property
    def held_out(self) -> float | None:
        return sum(self.able.values()) / len(self.able) if self.able else None

    @property
    def tradeoff(self) -> float | None:
        """Of the tasks that were measured and of the base's abilities: see tasks/evaluate.py."""
        gained, held = self.average, self.held_out
        return None if gained is None or held is None else tradeoff(gained, held)


@dataclass(frozen=True)
class Accuracy:
    """The accuracy matrix: `rows` by step, `tasks` in the order of merging, then `suites`, which the exam of the line
    asks of every merge. `base` and `alone`: what the base and each task's own model reach. `able`: what the base
    reaches on what it can do."""

    tasks: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    base: Mapping[str, float] = field(default_factory=dict)
    alone: Mapping[str, float] = field(default_factory=dict)
    able: Mapping[str, float] = field(default_factory=dict)
    suites: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """All that was asked."""
        return (*self.tasks, *self.suites)

    @property
    def base_average(self) -> float | None:
        found = [self.base[task] for task in self.columns if task in self.base]
        return sum(found) / len(found) if found and len(found) == len(self.columns) else None

    def figures(self, entry: Entry) -> dict[str, float | None]:
        """Key figures of the model after an entry."""
        row = next((row for row in self.rows if row.step == entry.step), None)
        if row is None or not row.scores:
            return {}
        said = row.summary
        return {
            "average": row.average,
            "worst": min(one.value for one in row.scores.values()),
            "forgetting": said.forgetting if said else None,
            "forward transfer": said.forward_transfer if said else None,
            "held out": row.held_out,
            "trade-off": row.tradeoff,
        }


def accuracy_of(
    steps: Sequence[tuple[Entry, str | None]],
    base: str,
    tuned: Mapping[str, str],
    scored: Scored,
    newest: int,
    able: Scored | None = None,
) -> Accuracy:
    """The matrix of a line's merges, each given with the model that it made; what is not known is left out of it.

    `tuned`: update -> the model that was tuned for it. `newest`: so many rows, and the tasks merged in them. `able`:
    scores on what the base can do.
    """
    tasks = list(dict.fromkeys(task_of(entry.task) for entry, _ in steps))
    alone: dict[str, float] = {}
    for entry, _ in steps:
        value = scored.of(tuned.get(str(entry.update), ""), entry.task)
        if value is not None:
            alone[task_of(entry.task)] = value  # of several rounds, the newest
    rows: list[Row] = []
    abilities = able.leading(base) if able else {}
    for number, (entry, model) in enumerate(steps, 1):
        seen = list(dict.fromkeys(task_of(one.task) for one, _ in steps[:number]))
        found = scored.rows(model) if model else {}
        scores = {task: found[task] for task in seen if task in found}
        asked = scored.asked(model) if model else {}
        exam = {name: row for name, row in asked.items() if name not in tasks}
        left = able.leading(model) if able and model else {}
        kept_of_them = {name: left[name] for name in abilities} if abilities.keys() <= left.keys() else {}
        rows.append(Row(entry.step, entry.task, {**scores, **exam}, able=kept_of_them))
    measured = {task for row in rows for task in row.scores}
    suites = dict.fromkeys(name for row in rows[-newest:] for name in row.scores if name not in tasks)
    unmet = scored.leading(base)
    kept = {task_of(entry.task) for entry, _ in steps[-newest:]}
    return Accuracy(
        tuple(task for task in tasks if task in kept and (task in measured or task in alone)),
        tuple(_summarised(rows, alone, _ahead(steps, scored), Accuracy(base=unmet, able=abilities), newest)),
        {task: unmet[task] for task in (*tasks, *suites) if task in unmet},
        alone,
        abilities,
        tuple(suites),
    )


def _ahead(steps: Sequence[tuple[Entry, str | None]], scored: Scored) -> dict[str, float]:
    """Task -> what the model right before its first merge reached on it, as far as that was measured."""
    found: dict[str, float] = {}
    met, before = set[str](), None
    for entry, model in steps:
        task = task_of(entry.task)
        value = scored.leading(before).get(task) if before and task not in met else None
        found |= {} if value is None else {task: value}
        met, before = met | {task}, model
    return found


def _summarised(
    rows: Sequence[Row], alone: Mapping[str, float], ahead: Mapping[str, float], base: Accuracy, newest: int
) -> list[Row]:
    """The newest rows with what they say, as far as every task that was merged by then was measured, at every step."""
    found: list[Row] = []
    matrix: list[dict[str, float]] = []
    whole, merged = True, set[str]()
    for number, row in enumerate(rows, 1):
        merged.add(task_of(row.merged))
        whole = whole and merged <= set(row.scores)
        matrix.append({task: one.value for task, one in row.scores.items() if task in merged})
        if number > len(rows) - newest:
            said = with_abilities(summarise(matrix, alone, ahead, base.base), row.able, base.able) if whole else None
            found.append(replace(row, summary=said))
    return found
