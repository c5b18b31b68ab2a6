"""Validation of what people write: every wrong field by its place, what is wrong, what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from storage.errors import InvalidInput

Config = TypeVar("Config")
Owner = Callable[[tuple[Any, ...]], type]  # the class whose field the last part of a place should have been


def validated(adapter: TypeAdapter[Config], values: Any, problem: str, owner: Owner) -> Config:
    """The config from plain values. Raises InvalidInput that begins with `problem` and lists every wrong field."""
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        problems = "\n  ".join(dict.fromkeys(_explain(one, owner) for one in error.errors()))
        raise InvalidInput(f"{problem}:\n  {problems}") from None


def field_names(cls: type) -> list[str]:
    return [one.name for one in fields(cls)]


def _explain(problem: Any, owner: Owner) -> str:
    """One line for one of pydantic's errors: the field as it stands in the file, what is wrong, what would be right."""
    where = ".".join(str(part) for part in problem["loc"]) or "it"
    found = problem.get("input")
    match problem["type"]:
        case "union_tag_invalid":
            tags = [tag.strip(" '") for tag in problem["ctx"]["expected_tags"].split(",")]
            tag = problem["ctx"]["tag"]
            return f"{where}: there is no {tag!r}{_close(tag, tags)}; choices: {', '.join(tags)}"
        case "union_tag_not_found":
            return f"{where}: has no `name`, which says what it is"
        case "unexpected_keyword_argument":
            known = field_names(owner(problem["loc"]))
            return (
                f"{where}: there is no such field{_close(str(problem['loc'][-1]), known)}; fields: {', '.join(known)}"
            )
        case "missing" | "missing_argument":
            return f"{where}: is missing"
        case "literal_error":
            return f"{where}: {found!r} is not one of {problem['ctx']['expected']}"
        case "value_error":
            return f"{where}: {problem['ctx']['error']}"
        case _:
            return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}, found {found!r}"


def _close(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
