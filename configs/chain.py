"""The configuration of a chain: which base, tasks and choices. Read from YAML, checked before anything runs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import TypeAdapter

from configs.reading import named_in, read_yaml
from configs.validation import field_names, validated
from storage.errors import InvalidInput
from tasks.choice import BY_NAME, choices, require
from tasks.codecs import AnyCodec, Ternary
from tasks.data import AnyData
from tasks.digits_base import DigitsBase
from tasks.extract import Extract
from tasks.gate import Gate
from tasks.ingest import Checkpoint
from tasks.mergers import AnyMerger
from tasks.optimizers import AnyOptimizer
from tasks.recipe import Recipe
from tasks.retry import OtherRecipe, reachable, unfit
from tasks.scalings import AnyScaling
from tasks.search import Search
from tasks.sparsifiers import AnySparsifier
from tasks.suites import AnySuite, LmEval
from tasks.suites.heads import AnyHead
from tasks.tuners import AnyTuner, Full

PRESETS = Path(__file__).parent / "presets"
_NAME = re.compile(r"[a-z0-9][a-z0-9_\-]*")

AnyBase = Annotated[DigitsBase | Checkpoint, BY_NAME]


@dataclass(frozen=True)
class Task:
    """One fine-tuning: what to learn, and how. With `checkpoint` it was trained elsewhere and is only read in.

    `weight`: how much its update counts in mergers that have weights. `rounds`: how often a training of its own, over
    the same data, is merged into the line; each starts from what the one before it made of the line, with a fresh
    adapter and optimiser, and is an update of its own (fold and reset).
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
    suite: AnySuite
    tuner: AnyTuner | None = None
    checkpoint: Checkpoint | None = None
    weight: float = 1.0
    rounds: int = 1

    def __post_init__(self) -> None:
        require(self.weight > 0, "weight", "positive", self.weight)
        require(self.rounds > 0, "rounds", "positive", self.rounds)
        if self.checkpoint:
            require(self.rounds == 1, "rounds", "1, because the task's checkpoint was trained elsewhere", self.rounds)
        elif isinstance(self.suite, LmEval):
            raise InvalidInput(
                f"task {self.name!r} would be trained on the lm_eval task {self.suite.task!r}, which only measures",
                remedy="Give the task a checkpoint that was trained elsewhere, or list the suite under retained",
            )

    @property
    def updates(self) -> tuple[str, ...]:
        """What its updates are called in a line: as the task, or `name.1`, `name.2` ... with several rounds."""
        if self.rounds == 1:
            return (self.name,)
        return tuple(f"{self.name}.{number}" for number in range(1, self.rounds + 1))


@dataclass(frozen=True)
class Ability:
    """Something that the base can do, and that a merged model should not lose."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
    suite: AnySuite


@dataclass(frozen=True)
class LineConfig:
    """One merged model: the name of its line and of its registered model, and how updates enter it.

    `sparsify` thins each update before it is merged, `scaling` sets the size of the merged delta. `search` chooses
    after every merge how much of that delta is written, on examples that the tasks were trained on. It is no part of
    the recipe: states do not depend on it, and a merge in the line's journal keeps its factor when the search changes.
    `deltaworks line rollback NAME 0` before the next run lets that search for all factors again, and merge nothing.

    `gate`: what a merged model must reach to be the registered model's `champion`, and what becomes of it if it does
    not. Without one, versions are registered and nobody is the champion. A line goes on by a recipe of its gate's
    `retry` once that let a merge in; to take it over, write it here: what the line holds stays as it came in.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
    merger: AnyMerger
    sparsify: AnySparsifier | None = None
    scaling: AnyScaling | None = None
    search: Search | None = None
    gate: Gate | None = None

    def __post_init__(self) -> None:
        _ = self.recipe  # choices that do not compose are refused here, before anything is trained

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.merger, self.sparsify, self.scaling)

    @property
    def recipes(self) -> list[Recipe]:
        """The recipe, and those that the line may come to go on by, because its gate lists them in `retry`."""
        return reachable(self.recipe, self.gate.retry if self.gate else ())


@dataclass(frozen=True)
class ChainConfig:
    """A whole chain: a base, tasks in the order of merging, and one or more lines that merge the same updates.

    `tuner` is for tasks that name none. `start`: what a task is trained from: the `base`, or the `head` of the chain's
    line, the merged model of the tasks before it. The base stays what updates are merged onto; what an update of such
    a training is the difference to says `extract` (tasks/extract.py).

    `retained`: what the base can do. Every merged model is measured on it too, as shares of what the base reaches.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
    base: AnyBase
    tasks: tuple[Task, ...]
    lines: tuple[LineConfig, ...]
    tuner: AnyTuner = field(default_factory=Full)
    extract: Extract = field(default_factory=Extract)
    codec: AnyCodec = field(default_factory=Ternary)
    start: Literal["base", "head"] = "base"
    retained: tuple[Ability, ...] = ()

    def __post_init__(self) -> None:
        for what, names in (("tasks", [t.name for t in self.tasks]), ("lines", [one.name for one in self.lines])):
            if not names:
                raise InvalidInput(f"{what} is empty: a chain needs at least one")
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise InvalidInput(f"{what}: the name {twice[0]!r} is used twice")
            bad = [name for name in names if not _NAME.fullmatch(name)]
            if bad:
                raise InvalidInput(f"{what}: {bad[0]!r} is no name: use lower-case letters, digits, - and _")
        self._check_start()
        self._check_retained()
        self._check_search()
        self._check_mergers()

    def _check_retained(self) -> None:
        """Scores are kept by name: no ability may have another's, or a task's."""
        names = [*(one.name for one in self.tasks), *(one.name for one in self.retained)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InvalidInput(f"tasks and retained: the name {twice[0]!r} is used twice")
        for line in self.lines:
            if line.gate and line.gate.retained is not None and not self.retained:
                raise InvalidInput(
                    f"the gate of line {line.name!r} asks how much of the base's abilities is left, but `retained` "
                    "names none",
                    remedy="List suites that the base is good at in retained, or leave out the gate's retained",
                )

    def _check_search(self) -> None:
        """Factors are searched on examples that the tasks were trained on."""
        measured = next((task for task in self.tasks if isinstance(task.suite, LmEval)), None)
        searching = next((line.name for line in self.lines if line.search), None)
        if measured and searching:
            raise InvalidInput(
                f"search of line {searching!r} needs examples to choose by, and task {measured.name!r} has none: "
                "lm_eval tasks are for the last word",
                remedy="Leave out search, or give the task a suite with data of its own",
            )

    def _check_mergers(self) -> None:
        """Every recipe that a line may come to merge by must take all updates, with their weights."""
        weights = [task.weight for task in self.tasks for _ in task.updates]
        for line in self.lines:
            for recipe in line.recipes:
                if why := unfit(recipe, weights):
                    listed = "" if recipe.merger == line.merger else ", whose gate lists it in retry,"
                    heavy = [f"{task.name!r} weighs {task.weight:g}" for task in self.tasks if task.weight != 1]
                    raise InvalidInput(
                        f"line {line.name!r}{listed} has {len(weights)} updates{''.join(f', {one}' for one in heavy)}, "
                        f"but {why}",
                        remedy="`deltaworks mergers` lists those for any number, and those that have weights",
                    )

    def _check_start(self) -> None:
        """Refuse what cannot be trained, or would not be the difference that was meant."""
        if self.start == "head" and len(self.lines) > 1:
            raise InvalidInput(
                f"start: head trains from the merged model of one line, found {len(self.lines)} lines",
                remedy="Write a chain for each line: what they have in common is found done",
            )
        if self.start == "base" and self.extract.against == "start":
            raise InvalidInput(
                "extract.against: start needs start: head, found start: base",
                remedy="Remove it: trainings that start at the base give updates against the base",
            )
        several = next((task for task in self.tasks if task.rounds > 1), None)
        if several and (self.start != "head" or self.extract.against != "start"):
            raise InvalidInput(
                f"rounds: {several.rounds} of task {several.name!r} needs start: head and extract.against: start, "
                f"found start: {self.start} and extract.against: {self.extract.against}",
                remedy="Set start: head and extract: {name: extract, against: start}",
            )

    def tuner_of(self, task: Task, number: int = 1) -> AnyTuner:
        """How a task is tuned in its round `number`. Every round has its own seed: other batches, other new weights."""
        tuner = task.tuner or self.tuner
        return tuner if number == 1 else replace(tuner, seed=tuner.seed + number - 1)


_ADAPTER: TypeAdapter[ChainConfig] = TypeAdapter(ChainConfig)


def load_chain(source: str | Path) -> ChainConfig:
    """Read a chain from a YAML file, or from the preset of that name (`demo`)."""
    path, values = read_yaml(source, PRESETS, "Presets")
    return parse_chain(values, source=str(path))


def parse_chain(values: Any, *, source: str = "the chain") -> ChainConfig:
    """A chain from plain values. Errors name every wrong field and what it could be."""
    if not isinstance(values, dict):
        raise InvalidInput(f"{source} must be a mapping with the fields {', '.join(field_names(ChainConfig))}")
    return validated(_ADAPTER, values, f"{source} is not a valid chain", partial(owner_of, top=ChainConfig))


def dump_chain(config: ChainConfig) -> dict[str, Any]:
    """The chain as plain values, every default filled in: what MLflow shows."""
    found: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return found


def presets() -> list[str]:
    return named_in(PRESETS)


def owner_of(loc: tuple[Any, ...], top: type) -> type:
    """The class whose field the last part of `loc` should have been: the last choice named on the way there."""
    families = (
        AnyBase,
        AnyCodec,
        AnyData,
        AnyHead,
        AnyMerger,
        AnyOptimizer,
        AnyScaling,
        AnySparsifier,
        AnySuite,
        AnyTuner,
    )
    known: dict[str, type] = {"tasks": Task, "lines": LineConfig, "extract": Extract, "checkpoint": Checkpoint}
    known |= {"search": Search, "gate": Gate, "retained": Ability, "retry": OtherRecipe}
    for family in families:
        known |= choices(family)
    return next((known[part] for part in reversed(loc[:-1]) if part in known), top)
