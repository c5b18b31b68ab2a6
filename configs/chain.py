"""The configuration of a chain: which base, tasks and choices. Read from YAML, checked before anything runs."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import TypeAdapter

from configs.validation import field_names, validated
from storage.errors import InvalidInput
from tasks.choice import BY_NAME, choices, require
from tasks.codecs import AnyCodec, Ternary
from tasks.data import AnyData
from tasks.digits_base import DigitsBase
from tasks.extract import Extract
from tasks.ingest import Checkpoint
from tasks.mergers import AnyMerger
from tasks.optimizers import AnyOptimizer
from tasks.recipe import Recipe
from tasks.scalings import AnyScaling
from tasks.search import Search
from tasks.sparsifiers import AnySparsifier
from tasks.suites import AnySuite
from tasks.suites.heads import AnyHead
from tasks.tuners import AnyTuner, Full

PRESETS = Path(__file__).parent / "presets"
_NAME = re.compile(r"[a-z0-9][a-z0-9_\-]*")

AnyBase = Annotated[DigitsBase | Checkpoint, BY_NAME]


@dataclass(frozen=True)
class Task:
    """One fine-tuning: what to learn, and how. With `checkpoint` it was trained elsewhere and is only read in.

    `weight`: how much its update counts in mergers that have weights.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
    suite: AnySuite
    tuner: AnyTuner | None = None
    checkpoint: Checkpoint | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(self.weight > 0, "weight", "positive", self.weight)


@dataclass(frozen=True)
class LineConfig:
    """One merged model: the name of its line and of its registered model, and how updates enter it.

    `sparsify` thins each update before it is merged, `scaling` sets the size of the merged delta. `search` chooses
    after every merge how much of that delta is written, on examples that the tasks were trained on. It is no part of
    the recipe: states do not depend on it, and a merge in the line's journal keeps its factor when the search changes.
    `deltaworks line rollback NAME 0` before the next run lets that search for all factors again, and merge nothing.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
    merger: AnyMerger
    sparsify: AnySparsifier | None = None
    scaling: AnyScaling | None = None
    search: Search | None = None

    def __post_init__(self) -> None:
        _ = self.recipe  # choices that do not compose are refused here, before anything is trained

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.merger, self.sparsify, self.scaling)


@dataclass(frozen=True)
class ChainConfig:
    """A whole chain: a base, tasks in the order of merging, and one or more lines that merge the same updates.

    `tuner` is for tasks that name none.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
    base: AnyBase
    tasks: tuple[Task, ...]
    lines: tuple[LineConfig, ...]
    tuner: AnyTuner = field(default_factory=Full)
    extract: Extract = field(default_factory=Extract)
    codec: AnyCodec = field(default_factory=Ternary)

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

    def tuner_of(self, task: Task) -> AnyTuner:
        return task.tuner or self.tuner


_ADAPTER: TypeAdapter[ChainConfig] = TypeAdapter(ChainConfig)


def load_chain(source: str | Path) -> ChainConfig:
    """Read a chain from a YAML file, or from the preset of that name (`demo`)."""
    path = _find(source)
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InvalidInput(f"{path} is not YAML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}") from error
    return parse_chain(values, source=str(path))


def parse_chain(values: Any, *, source: str = "the chain") -> ChainConfig:
    """A chain from plain values. Errors name every wrong field and what it could be."""
    if not isinstance(values, dict):
        raise InvalidInput(f"{source} must be a mapping with the fields {', '.join(field_names(ChainConfig))}")
    return validated(_ADAPTER, values, f"{source} is not a valid chain", _owner)


def dump_chain(config: ChainConfig) -> dict[str, Any]:
    """The chain as plain values, every default filled in: what MLflow shows."""
    found: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return found


def presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _find(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    preset = PRESETS / f"{source}.yaml"
    if preset.is_file():
        return preset
    close = difflib.get_close_matches(str(source), presets(), n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    raise InvalidInput(f"there is no file {str(source)!r}", remedy=f"{hint}Presets: {', '.join(presets())}")


def _owner(loc: tuple[Any, ...]) -> type:
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
    known["search"] = Search
    for family in families:
        known |= choices(family)
    return next((known[part] for part in reversed(loc[:-1]) if part in known), ChainConfig)
