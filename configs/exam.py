"""The exam of a line: the suites that every merge of its queue is asked, and the gate that decides on the answers.

It is written as a file of its own, or read from the chain that grew the line, and kept with the queue's policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import TypeAdapter

from configs.chain import PRESETS, Ability, owner_of, parse_chain
from configs.reading import read_yaml
from configs.validation import field_names, validated
from storage.errors import Damaged, InvalidInput
from tasks.data.files import Files
from tasks.gate import Gate
from tasks.mergers import Joint
from tasks.retry import OtherRecipe
from tasks.suites import LmEval

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Exam:
    """suites: what every merged model of the line is asked, whatever was submitted; one is loaded at a time
    retained: what the base can do, of which a merged model keeps a share
    gate: what is asked of the answers; without one, merges are measured and nobody is the champion
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    suites: tuple[Ability, ...]
    retained: tuple[Ability, ...] = ()
    gate: Gate | None = None

    def __post_init__(self) -> None:
        if not self.suites:
            raise InvalidInput("suites is empty: an exam needs at least one")
        names = [one.name for one in (*self.suites, *self.retained)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InvalidInput(f"suites and retained: the name {twice[0]!r} is used twice")
        if self.gate is not None:
            self._check(self.gate)

    def _check(self, gate: Gate) -> None:
        if gate.of_alone is not None:
            raise InvalidInput(
                "gate.of_alone compares a task with its own model, and the suites of an exam belong to no submission",
                remedy="Leave it out, or set average_drop: what a merge may cost",
            )
        if gate.on_failure == "stop":
            raise InvalidInput(
                "gate.on_failure must be keep or leave_out, found 'stop': a queue goes on with the next submission",
                remedy="Set leave_out: what fails is put aside with the reason",
            )
        for one in gate.retry:
            if isinstance(one, OtherRecipe) and isinstance(one.merger, Joint) and one.merger.limit is not None:
                raise InvalidInput(
                    f"gate.retry: merger {one.merger.name!r} is for a few updates, and a queue has no end",
                    remedy="Leave it out: `deltaworks mergers` lists those for any number",
                )
        if gate.retained is not None and not self.retained:
            raise InvalidInput(
                "gate.retained asks how much of the base's abilities is left, but `retained` names none",
                remedy="List suites that the base is good at in retained, or leave out the gate's retained",
            )

    def spec(self) -> dict[str, Any]:
        """As plain values, for the queue's policy."""
        found: dict[str, Any] = _ADAPTER.dump_python(self, mode="json")
        return found


_ADAPTER: TypeAdapter[Exam] = TypeAdapter(Exam)


def load_exam(source: str | Path, line: str) -> Exam:
    """An exam from a YAML file: its own fields, or a chain, of which `line` gets the suites and its gate.

    Paths of data that are relative start from here, and are kept absolute: workers run in folders of their own.
    """
    path, values = read_yaml(source, PRESETS, "Presets")
    if not isinstance(values, dict):
        raise InvalidInput(f"{path} must be a mapping with the fields {', '.join(field_names(Exam))}")
    if "lines" in values:
        chain = parse_chain(values, source=str(path))
        asked = tuple(Ability(task.name, task.suite) for task in chain.tasks)
        gate = next((one.gate for one in chain.lines if one.name == line), None)
        found = Exam(asked, chain.retained, gate)
    else:
        found = validated(_ADAPTER, values, f"{path} is not a valid exam", _owner)
    return replace(found, suites=_anchored(found.suites), retained=_anchored(found.retained))


def exam_of(policy: Mapping[str, Any], line: str) -> Exam | None:
    """The exam that is kept in the policy of a queue, if there is one."""
    if "exam" not in policy:
        return None
    try:
        return validated(_ADAPTER, policy["exam"], "it is not valid", _owner)
    except InvalidInput as error:
        raise Damaged(
            f"the queue of line {line!r} has an exam that this version cannot read: {error}",
            remedy=f"Set it again: `deltaworks line policy {line} --exam FILE`",
        ) from error


def _owner(loc: tuple[Any, ...]) -> type:
    """The class of a wrong field: suites are listed like abilities."""
    found = owner_of(loc, top=Exam)
    return Ability if found is Exam and len(loc) > 2 else found


def _anchored(asked: tuple[Ability, ...]) -> tuple[Ability, ...]:
    return tuple(replace(one, suite=_with_whole_paths(one.suite)) for one in asked)


def _with_whole_paths(suite: Any) -> Any:
    if isinstance(suite, LmEval):
        return suite if suite.include is None else replace(suite, include=_whole(suite.include))
    if not isinstance(suite.data, Files):
        return suite
    paths: dict[str, Any] = {split: tuple(map(_whole, getattr(suite.data, split))) for split in _SPLITS}
    return replace(suite, data=replace(suite.data, **paths))


def _whole(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().absolute())
