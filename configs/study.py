"""The configuration of a study: the same tasks trained by several tuners, each of them merged by several mergers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import TypeAdapter

from configs.chain import Ability, AnyBase, Task, owner_of
from configs.reading import named_in, read_yaml
from configs.validation import field_names, validated
from storage.errors import InvalidInput
from tasks.codecs import AnyCodec, Ternary
from tasks.digits_base import DigitsBase
from tasks.extract import Extract
from tasks.mergers import AnyMerger
from tasks.tuners import AnyTuner

STUDIES = Path(__file__).parent / "studies"


@dataclass(frozen=True)
class StudyConfig:
    """Tuners and mergers under the names that tables and pictures give them.

    Every tuner trains every task from the base, once for each of `seeds`; every merger merges what came of it, in the
    order of the tasks. `retained`: what the base can do, measured before and after.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
    base: AnyBase
    tasks: tuple[Task, ...]
    tuners: dict[str, AnyTuner]
    mergers: dict[str, AnyMerger]
    retained: tuple[Ability, ...] = ()
    extract: Extract = field(default_factory=Extract)
    codec: AnyCodec = field(default_factory=Ternary)
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for what in ("tasks", "tuners", "mergers", "seeds"):
            if not getattr(self, what):
                raise InvalidInput(f"{what} is empty: a study needs at least one")
        names = [*(one.name for one in self.tasks), *(one.name for one in self.retained)]
        for name in names:
            if names.count(name) > 1:
                raise InvalidInput(f"tasks and retained: the name {name!r} is used twice")
        for task in self.tasks:
            if task.tuner or task.checkpoint:
                raise InvalidInput(
                    f"tasks: {task.name!r} says how it is trained, which a study decides",
                    remedy="Leave out its tuner and its checkpoint",
                )

    def base_of(self, seed: int) -> AnyBase:
        """The base, which is drawn anew for every seed if it is trained on the spot."""
        return replace(self.base, seed=self.base.seed + seed) if isinstance(self.base, DigitsBase) else self.base

    def tuner_of(self, name: str, seed: int) -> AnyTuner:
        tuner = self.tuners[name]
        return replace(tuner, seed=tuner.seed + seed)


_ADAPTER: TypeAdapter[StudyConfig] = TypeAdapter(StudyConfig)


def load_study(source: str | Path) -> StudyConfig:
    """Read a study from a YAML file, or the one of that name that comes with the product (`mergeability`)."""
    path, values = read_yaml(source, STUDIES, "Studies")
    if not isinstance(values, dict):
        raise InvalidInput(f"{path} must be a mapping with the fields {', '.join(field_names(StudyConfig))}")
    return validated(_ADAPTER, values, f"{path} is not a valid study", partial(owner_of, top=StudyConfig))


def dump_study(config: StudyConfig) -> dict[str, Any]:
    """The study as plain values, every default filled in."""
    found: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return found


def chosen(config: StudyConfig, tuners: Sequence[str] | None = None, seeds: int | None = None) -> StudyConfig:
    """The study with some of its tuners, and with its first seeds. InvalidInput for a tuner that it does not have."""
    for name in tuners or ():
        if name not in config.tuners:
            known = ", ".join(repr(one) for one in config.tuners)
            raise InvalidInput(f"study {config.name!r} has no tuner {name!r}", remedy=f"Its tuners: {known}")
    kept = {name: config.tuners[name] for name in tuners or config.tuners}
    return replace(config, tuners=kept, seeds=config.seeds[:seeds])


def studies() -> list[str]:
    return named_in(STUDIES)
