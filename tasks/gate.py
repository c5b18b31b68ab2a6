"""The gate: whether a merged model is good enough to be the version that is served, the champion of its line.

A challenger is compared with the champion on the same rows of the same tasks, its newest included: a champion that
does not know a task yet is measured on it too. So a merge may cost old tasks a little, if it is worth it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from statistics import fmean
from typing import Annotated, Literal

import numpy as np

from tasks.choice import MAPPING, NUMBER, Choice, number_or_mapping, require
from tasks.retry import OtherRecipe

OnFailure = Literal["keep", "leave_out", "stop"]
Tried = Annotated[
    Annotated[float, NUMBER] | Annotated[OtherRecipe, MAPPING],
    number_or_mapping("a factor such as 0.5, or a recipe such as {merger: {name: tsv_m}}"),
]


@dataclass(frozen=True)
class Gate(Choice):
    """What is asked of a challenger. Shares are in [0, 1]; a rule that is null is not asked.

    average_drop: how far below the champion's its average may be
    of_alone: the least that every task keeps of the score of its own model
    retained: the least that is kept of what the base could do (the chain's `retained`)
    significance: refused if it is worse than the champion at this level of a one-sided paired test over all rows
    retry: what is tried if it fails as it is, one after the other until one passes. Each is one more look at the test
        rows: keep the list short
        0.5                        the merged delta is written by this factor
        {merger: {name: tsv_m}}    all updates of the line are merged again by this recipe, and the newest with them;
                                   if that passes, the line goes on by it. A recipe names a merger, a scaling or a
                                   sparsifier (`{name: none}`: without); what it does not name stays as the line has it
    on_failure: what becomes of a merge that fails, whatever was tried
        keep       it stays in the line, and the next update is merged onto it; the champion stays who it was
        leave_out  it does not enter the line, which goes on without that update
        stop       it does not enter the line, and the chain ends there
    """

    name: Literal["gate"] = "gate"
    version: Literal[1] = 1
    average_drop: float | None = 0.005
    of_alone: float | None = None
    retained: float | None = None
    significance: float | None = 0.05
    retry: tuple[Tried, ...] = ()
    on_failure: OnFailure = "keep"

    def __post_init__(self) -> None:
        for rule in ("average_drop", "of_alone", "retained"):
            share = getattr(self, rule)
            require(share is None or 0 <= share <= 1, rule, "null or in [0, 1]", share)
        level = self.significance
        require(level is None or 0 < level < 1, "significance", "null or in (0, 1)", level)
        factors = [one for one in self.retry if not isinstance(one, OtherRecipe)]
        require(all(0 < factor < inf for factor in factors), "retry", "factors, finite and positive", self.retry)


@dataclass(frozen=True)
class Standing:
    """What a model reached: the leading score of each task, what each test row gave, and what it kept of the base.

    `abilities`: its scores on what the base can do, of which `retained` is the share that is left."""

    scores: Mapping[str, float]
    outcomes: Mapping[str, Sequence[float]]
    retained: float | None = None
    abilities: Mapping[str, float] = field(default_factory=dict)

    def joined(self, other: Standing) -> Standing:
        """With the tasks of another evaluation of the same model."""
        return replace(self, scores={**self.scores, **other.scores}, outcomes={**self.outcomes, **other.outcomes})


@dataclass(frozen=True)
class Verdict:
    """Passed, or the reasons why not. `facts`: the numbers that were compared."""

    reasons: tuple[str, ...] = ()
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.reasons


def judge(gate: Gate, challenger: Standing, champion: Standing | None, alone: Mapping[str, float]) -> Verdict:
    """Hold a challenger against the rules. Without a champion the rules that compare with it are met.

    `champion` was measured on all tasks of the challenger; `alone`: task -> score of its own model.
    """
    facts: dict[str, float] = {"average": fmean(challenger.scores.values())}
    reasons: list[str] = []
    if champion is not None:
        reasons += _against(gate, challenger, champion, facts)
    if gate.of_alone is not None:
        reasons += _of_alone(gate.of_alone, challenger, alone)
    if challenger.retained is not None:
        facts["retained"] = challenger.retained
        if gate.retained is not None and challenger.retained < gate.retained:
            reasons.append(f"{_p(challenger.retained)} of the base's ability is left, asked is {_p(gate.retained)}")
    return Verdict(tuple(reasons), facts)


def paired_test(new: Sequence[float], old: Sequence[float]) -> float:
    """The p-value of a one-sided test of whether `new` is worse than `old`, row by row.

    Rows that are right or wrong: the exact sign test of McNemar on the rows that differ. Other outcomes: the paired
    t-test. 1 if no row differs.
    """
    from scipy.stats import binomtest, ttest_rel

    found, known = np.asarray(new, dtype=np.float64), np.asarray(old, dtype=np.float64)
    differs = found != known
    if not differs.any():
        return 1.0
    if np.isin(np.concatenate([found, known]), (0.0, 1.0)).all():
        lost = int((found < known).sum())
        return float(binomtest(lost, int(differs.sum()), 0.5, alternative="greater").pvalue)
    if len(found) < 2 or np.ptp(found - known) == 0:  # no spread to compare with
        return 1.0 if (found - known).mean() > 0 else 0.0
    return float(ttest_rel(found, known, alternative="less").pvalue)


def _against(gate: Gate, challenger: Standing, champion: Standing, facts: dict[str, float]) -> Iterator[str]:
    tasks = list(challenger.scores)
    before = facts["champion_average"] = fmean(champion.scores[task] for task in tasks)
    drop = before - facts["average"]
    if gate.average_drop is not None and drop > gate.average_drop:
        yield (
            f"its average over {_tasks(len(tasks))} is {_p(facts['average'])}, {100 * drop:.1f} points below the "
            f"champion's {_p(before)}; allowed are {100 * gate.average_drop:.1f}"
        )
    rows = [(new, old) for task in tasks for new, old in _paired(task, challenger, champion)]
    if gate.significance is None or not rows:
        return
    chance = facts["p_worse"] = paired_test([new for new, _ in rows], [old for _, old in rows])
    if chance < gate.significance:
        yield (
            f"on {len(rows):,} rows it is worse than the champion: p = {chance:.2g}, below {gate.significance:g}, of a "
            "paired test"
        )


def _paired(task: str, challenger: Standing, champion: Standing) -> Iterator[tuple[float, float]]:
    """Row by row; none for scores of a time when rows were not kept."""
    new, old = challenger.outcomes.get(task, ()), champion.outcomes.get(task, ())
    if new and old:
        yield from zip(new, old, strict=True)


def _of_alone(least: float, challenger: Standing, alone: Mapping[str, float]) -> Iterator[str]:
    for task, score in challenger.scores.items():
        own = alone[task]
        if score < least * own:
            yield (
                f"{task!r} reaches {_p(score)}, {_p(score / own)} of its own model's {_p(own)}; asked are {_p(least)}"
            )


def _tasks(count: int) -> str:
    return f"{count} tasks" if count > 1 else "one task"


def _p(share: float) -> str:
    return f"{100 * share:.1f} %"
