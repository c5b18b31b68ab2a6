"""Choices: the frozen dataclasses whose fields are the settings of a codec, merger, tuner, suite, head or data source.

Every choice has `name: Literal[...]`, which picks it in a config, and `version: Literal[...]`, which rises when its
numbers change and so ends the reuse of earlier results. A family is a union of choices told apart by their names:

    AnyCodec = Annotated[Dense | Ternary, BY_NAME]

The union is the only list: mypy, the validation of configs, the lookup table (`choices`) and the contract tests all
read it. `BY_NAME` and `number_or_mapping` are of pydantic, which `configs` cannot add from outside, and stand here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints

from pydantic import Discriminator, Tag

from storage.errors import InvalidInput

BY_NAME = Discriminator("name")
NUMBER, MAPPING = Tag("number"), Tag("mapping")  # the members of a union that `number_or_mapping` tells apart


def number_or_mapping(expected: str) -> Discriminator:
    """Tells the members of a union apart by their form, so that what is wrong with one is not held against the other.

    `expected`: what both are, in words, for the error over something else."""

    def tag(value: Any) -> str | None:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return NUMBER.tag
        return MAPPING.tag if isinstance(value, dict) or is_dataclass(value) else None

    return Discriminator(tag, custom_error_type="form", custom_error_message=f"must be {expected}")


@dataclass(frozen=True)
class Choice:
    """The common root. The class variable makes the validation of configs refuse unknown fields."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def spec(self) -> dict[str, Any]:
        """The settings as plain values, for lineages, content keys and MLflow parameters."""
        found = plain(asdict(self))
        assert isinstance(found, dict)
        return found


def choices(family: Any) -> dict[str, Any]:
    """Name -> class of a family, `Annotated[A | B, BY_NAME]`."""
    union = get_args(family)[0]
    members = get_args(union) or (union,)
    return {member.name: member for member in members}


def plain(value: Any) -> Any:
    """`value` with tuples as lists: what canonical JSON gives back when it is read."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def restored(kind: Any, value: Any) -> Any:
    """What `plain(asdict(...))` of a choice came from, in its type `kind`: the way of a choice to another process.

    The values are those of a choice that was valid; they are not checked as those of a config are.
    """
    if get_origin(kind) is Annotated:
        return restored(choices(kind)[value["name"]], value)
    if get_origin(kind) in (Union, UnionType):
        options = [one for one in get_args(kind) if one is not NoneType]
        fitting = options if isinstance(value, (dict, list)) else []
        return next((restored(one, value) for one in fitting if _holds(one, value)), value)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        return kind(**{name: restored(hints[name], one) for name, one in value.items()})
    if get_origin(kind) is tuple:
        return tuple(restored(get_args(kind)[0], one) for one in value)
    return value


def _holds(kind: Any, value: Any) -> bool:
    """Whether a mapping or a list is a value of `kind`."""
    return (get_origin(kind) is tuple) == isinstance(value, list)


def require(condition: bool, field: str, expected: str, found: object) -> None:
    """Refuse a setting: `require(0 < self.density <= 1, "density", "in (0, 1]", self.density)`."""
    if not condition:
        raise InvalidInput(f"{field} must be {expected}, found {found!r}")
