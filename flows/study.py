"""The study of mergeability: what comes of each tuner's updates, alone, compressed, and in each merger's hands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from prefect import flow

from configs.study import StudyConfig
from flows import steps
from flows.policy import run_now, seconds
from flows.trial import merged_in_turn
from flows.workplace import here
from storage.refs import CheckpointRef, UpdateRef
from tasks.evaluate import Summary, leading, retention, summarise
from tasks.recipe import Recipe


@dataclass(frozen=True)
class Tuned:
    """What one tuner made of all tasks with one seed. Accuracies are means in [0, 1]."""

    tuner: str
    seed: int
    alone: float
    bytes: int  # of all updates, as the codec writes them
    seconds: float | None  # of all trainings; None if they were done before times were noted


@dataclass(frozen=True)
class Merged:
    """What one merger made of them. `retained`: the share of the base's abilities that is left."""

    tuner: str
    merger: str
    seed: int
    summary: Summary
    retained: float | None


@dataclass(frozen=True)
class Findings:
    """Everything that a study measured. `base`: the base on what it can do, the mean over abilities and seeds."""

    tuned: list[Tuned] = field(default_factory=list)
    merged: list[Merged] = field(default_factory=list)
    base: float | None = None

    @property
    def rows(self) -> list[Row]:
        """A row per tuner, the means over seeds, best first by the best merger's average."""
        names = list(dict.fromkeys(one.tuner for one in self.tuned))
        return sorted((self._row(name) for name in names), key=lambda row: -row.best.average)

    def _row(self, name: str) -> Row:
        tuned = [one for one in self.tuned if one.tuner == name]
        mergers = dict.fromkeys(one.merger for one in self.merged)
        cells = [Cell.of([one for one in self.merged if (one.tuner, one.merger) == (name, m)]) for m in mergers]
        times = [one.seconds for one in tuned if one.seconds is not None]
        return Row(
            tuner=name,
            alone=fmean(one.alone for one in tuned),
            bytes=fmean(one.bytes for one in tuned),
            seconds=fmean(times) if len(times) == len(tuned) else None,
            cells=dict(zip(mergers, cells, strict=True)),
        )


@dataclass(frozen=True)
class Cell:
    """One tuner and one merger: means over seeds, shares in [0, 1]. `spread`: standard deviation of the average."""

    average: float
    spread: float | None
    worst: float
    forgetting: float | None
    retained: float | None

    @classmethod
    def of(cls, runs: Sequence[Merged]) -> Cell:
        averages = [one.summary.average for one in runs]
        forgetting = [one.summary.forgetting for one in runs if one.summary.forgetting is not None]
        retained = [one.retained for one in runs if one.retained is not None]
        return cls(
            average=fmean(averages),
            spread=stdev(averages) if len(averages) > 1 else None,
            worst=fmean(one.summary.worst for one in runs),
            forgetting=fmean(forgetting) if forgetting else None,
            retained=fmean(retained) if retained else None,
        )


@dataclass(frozen=True)
class Row:
    """One tuner: means over seeds. `bytes` and `seconds` are of all tasks together."""

    tuner: str
    alone: float
    bytes: float
    seconds: float | None
    cells: dict[str, Cell]

    @property
    def best(self) -> Cell:
        return max(self.cells.values(), key=lambda cell: cell.average)


@flow(name="study", flow_run_name="{config.name}", validate_parameters=False)  # `load_study` has validated
def study(config: StudyConfig) -> Findings:
    """Base, then for each tuner and seed: tune, extract, compress, then merge one by one with each merger."""
    tuned: list[Tuned] = []
    merged: list[Merged] = []
    abilities: list[float] = []
    for seed in config.seeds:
        spec = config.base_of(seed)
        base = run_now(steps.base_step(spec), f"base, seed {seed}", spec)
        able = _abilities(config, base, base, f"base, seed {seed}")
        abilities += [fmean(able.values())] if able else []
        for name in config.tuners:
            one = _Tuning(config, name, seed, base)
            updates = one.run()
            tuned.append(one.found)
            for merger in config.mergers:
                merged.append(_merge(one, merger, updates, able))
    return Findings(tuned, merged, fmean(abilities) if abilities else None)


def count_steps(config: StudyConfig) -> int:
    """How many steps a first run has, for its progress bar."""
    tasks, able = len(config.tasks), bool(config.retained)
    each = 4 * tasks + len(config.mergers) * (3 * tasks + able)
    return len(config.seeds) * (1 + able + len(config.tuners) * each)


class _Tuning:
    """All tasks by one tuner with one seed."""

    def __init__(self, config: StudyConfig, tuner: str, seed: int, base: CheckpointRef) -> None:
        self.config, self.tuner, self.seed, self.base = config, tuner, seed, base
        self.label = f"{tuner}, seed {seed}"
        self.alone: dict[str, float] = {}
        self._bytes = 0
        self._seconds: list[float | None] = []

    def run(self) -> list[UpdateRef]:
        return [self._one(number) for number in range(len(self.config.tasks))]

    def _one(self, number: int) -> UpdateRef:
        task, store = self.config.tasks[number], here().store
        how = f"{task.name}, {self.label}"
        training = (self.base, task.name, task.suite, self.config.tuner_of(self.tuner, self.seed))
        model = run_now(steps.fine_tune, f"fine-tune {how}", *training)
        self._seconds.append(seconds(steps.fine_tune, *training))
        exact = run_now(steps.extract, f"extract {how}", self.base, model, self.config.extract)
        update = run_now(steps.compress, f"compress {how}", exact, self.config.codec, None)
        scores = run_now(steps.evaluate, f"evaluate {how}", model, [task], self.base)
        self.alone |= leading(store.open(scores))
        self._bytes += store.open(update).manifest.tensor_bytes
        return UpdateRef(update)

    @property
    def found(self) -> Tuned:
        known = [one for one in self._seconds if one is not None]
        took = sum(known) if len(known) == len(self._seconds) else None
        return Tuned(self.tuner, self.seed, fmean(self.alone.values()), self._bytes, took)


def _merge(one: _Tuning, merger: str, updates: Sequence[UpdateRef], able: dict[str, float]) -> Merged:
    config, label = one.config, f"{one.label}, {merger}"
    trial = merged_in_turn(one.base, config.tasks, updates, Recipe(config.mergers[merger]), label)
    left = _abilities(config, trial.model, one.base, label)
    summary = summarise(trial.matrix, one.alone)
    return Merged(one.tuner, merger, one.seed, summary, retention(left, able) if able else None)


def _abilities(config: StudyConfig, model: CheckpointRef, base: CheckpointRef, label: str) -> dict[str, float]:
    if not config.retained:
        return {}
    scores = run_now(steps.evaluate, f"evaluate abilities, {label}", model, list(config.retained), base)
    return leading(here().store.open(scores))


def plain_rows(findings: Findings) -> Iterator[dict[str, str | int | float | None]]:
    """One flat row per tuner, merger and seed, for a Parquet file."""
    by_run = {(one.tuner, one.seed): one for one in findings.tuned}
    for one in findings.merged:
        tuned = by_run[one.tuner, one.seed]
        yield {
            "tuner": one.tuner,
            "merger": one.merger,
            "seed": one.seed,
            "alone": tuned.alone,
            "average": one.summary.average,
            "worst": one.summary.worst,
            "forgetting": one.summary.forgetting,
            "retained": one.retained,
            "bytes": tuned.bytes,
            "seconds": tuned.seconds,
        }
