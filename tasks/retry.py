"""Retry: what a line may try where its gate refuses a merge: another recipe, for all of its updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal

from storage.errors import InvalidInput
from tasks.choice import BY_NAME, Choice
from tasks.mergers import AnyMerger, Joint
from tasks.recipe import Recipe
from tasks.scalings import AnyScaling
from tasks.sparsifiers import AnySparsifier


@dataclass(frozen=True)
class Nothing(Choice):
    """No sparsifier, or no scaling, where the line has one."""

    name: Literal["none"] = "none"
    version: Literal[1] = 1


@dataclass(frozen=True)
class OtherRecipe:
    """A recipe by what it has that the line's has not: what is absent stays as the line has it when it is tried."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    merger: AnyMerger | None = None
    sparsify: Annotated[AnySparsifier | Nothing, BY_NAME] | None = None
    scaling: Annotated[AnyScaling | Nothing, BY_NAME] | None = None

    def __post_init__(self) -> None:
        if not self._named():
            raise InvalidInput(
                "a recipe to retry by names nothing",
                remedy="Name a merger, a scaling or a sparsifier: `retry: [{scaling: {name: lines}}]`",
            )

    def instead_of(self, recipe: Recipe) -> Recipe:
        """`recipe` with what this one names."""
        named: dict[str, Any] = {kind: None if isinstance(one, Nothing) else one for kind, one in self._named().items()}
        return replace(recipe, **named)

    def _named(self) -> dict[str, Any]:
        return {one.name: value for one in fields(self) if (value := getattr(self, one.name)) is not None}


def unfit(recipe: Recipe, weights: Sequence[float]) -> str:
    """Why a recipe cannot merge updates of these weights; empty if it can, as far as that is known beforehand."""
    merger = recipe.merger
    if not merger.weighted and any(weight != 1 for weight in weights):
        return f"merger {merger.name!r} lets every update count the same"
    if isinstance(merger, Joint) and merger.limit is not None and len(weights) > merger.limit:
        return f"merger {merger.name!r} merges {merger.limit} updates"
    return ""


def reachable(recipe: Recipe, retry: Sequence[float | OtherRecipe]) -> list[Recipe]:
    """The recipes that a line may come to merge by if it begins with `recipe`, which is the first of them."""
    found = [recipe]
    others = [one for one in retry if isinstance(one, OtherRecipe)]
    for known in found:  # it grows meanwhile
        found += [one for one in dict.fromkeys(other.instead_of(known) for other in others) if one not in found]
    return found
