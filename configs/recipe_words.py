"""A recipe from the words of a command line: names of choices, and settings as `field=value`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from storage.errors import InvalidInput
from tasks.mergers import MERGERS
from tasks.recipe import Recipe
from tasks.scalings import SCALINGS
from tasks.sparsifiers import SPARSIFIERS

_FAMILIES: Mapping[str, Mapping[str, Any]] = {"merger": MERGERS, "sparsify": SPARSIFIERS, "scaling": SCALINGS}


def recipe_from_words(merger: str, sparsify: str | None, scaling: str | None, settings: Sequence[str]) -> Recipe:
    """`settings`: `density=0.2` of the merger, `sparsify.density=0.5` and `scaling.factor=2` of the others.

    Raises InvalidInput that names the field and what it could be.
    """
    names = {"merger": merger, "sparsify": sparsify, "scaling": scaling}
    values: dict[str, dict[str, Any]] = {family: {} for family in names}
    for setting in settings:
        family, field, value = _parsed(setting)
        if names[family] is None:
            raise InvalidInput(f"--set {setting}: there is no --{family}", remedy=f"Name one: --{family} NAME")
        values[family][field] = value
    made: dict[str, Any] = {
        family: None if name is None else _choice(family, name, values[family]) for family, name in names.items()
    }
    return Recipe(made["merger"], made["sparsify"], made["scaling"])


def _parsed(setting: str) -> tuple[str, str, Any]:
    left, equals, right = setting.partition("=")
    family, _, field = left.strip().rpartition(".")
    family = family or "merger"
    if not equals or not field or family not in _FAMILIES:
        families = ", ".join(f"{one}.field=value" for one in _FAMILIES)
        raise InvalidInput(f"--set {setting!r} is no setting", remedy=f"Write field=value, or one of {families}")
    try:
        return family, field, json.loads(right)
    except ValueError:
        return family, field, right.strip()  # a word, such as `tensor`


def _choice(family: str, name: str, values: Mapping[str, Any]) -> Any:
    table = _FAMILIES[family]
    kind = table.get(name)
    if kind is None:
        raise InvalidInput(f"there is no {family} {name!r}{_close(name, table)}; choices: {', '.join(table)}")
    known = [one.name for one in fields(kind) if one.name not in ("name", "version")]
    for field in values:
        if field not in known:
            listed = ", ".join(known) or "none"
            raise InvalidInput(f"{family} {name!r} has no setting {field!r}{_close(field, known)}; settings: {listed}")
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    try:
        return adapter.validate_python({"name": name, **values})
    except ValidationError as error:
        problems = "; ".join(_explained(one) for one in error.errors())
        raise InvalidInput(f"{family} {name!r}: {problems}") from None


def _explained(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    what = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else problem["msg"]
    return f"{where}: {what}, found {problem.get('input')!r}" if where else what


def _close(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
