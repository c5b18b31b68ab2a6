"""Recipes in the words of a command line: names of choices, and settings as `key=value`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import TypeAdapter

from configs.validation import validated
from storage.errors import InvalidInput
from tasks.choice import choices
from tasks.mergers import AnyMerger
from tasks.recipe import Recipe
from tasks.scalings import AnyScaling
from tasks.sparsifiers import AnySparsifier

_KINDS = ("merger", "sparsify", "scaling")
_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Recipe)
NONE = "none"  # `--sparsify none`: leave it out


def recipe_from_words(
    merger: str, sparsify: str | None = None, scaling: str | None = None, settings: Sequence[str] = ()
) -> Recipe:
    """A recipe of these choices. Raises InvalidInput for whatever does not exist, is out of range, or does not compose.

    `settings` are `key=value` for the merger, `sparsify.key=value` and `scaling.key=value` for the others; values are
    written as in a config.
    """
    return _recipe({}, "the recipe", merger, sparsify, scaling, settings)


def changed_recipe(
    spec: Mapping[str, Any],
    line: str,
    *,
    merger: str | None = None,
    sparsify: str | None = None,
    scaling: str | None = None,
    settings: Sequence[str] = (),
) -> Recipe:
    """The recipe `spec` of `line` with other choices and settings; raises as `recipe_from_words`.

    A choice that is named starts from its defaults; one that is not keeps its settings, in its newest version.
    """
    held = {
        "merger": {key: value for key, value in spec.items() if key not in _KINDS},
        **{kind: dict(spec[kind]) for kind in _KINDS[1:] if kind in spec},
    }
    return _recipe(held, f"line {line!r} as it would be rebuilt", merger, sparsify, scaling, settings)


def _recipe(
    held: dict[str, dict[str, Any]],
    source: str,
    merger: str | None,
    sparsify: str | None,
    scaling: str | None,
    settings: Sequence[str],
) -> Recipe:
    values = dict(held)
    for kind, name in (("merger", merger), ("sparsify", sparsify), ("scaling", scaling)):
        if name == NONE and kind != "merger":
            values.pop(kind, None)
        elif name is not None:
            values[kind] = {"name": name}
    for setting in settings:
        kind, key, value = _setting(setting)
        if kind not in values:
            raise InvalidInput(f"--set {setting}: there is no {kind}", remedy=f"Name one: --{kind} NAME")
        values[kind][key] = value
    for choice in values.values():
        choice.pop("version", None)
    return validated(_RECIPE, values, f"{source} is not valid", _owner)


def _owner(loc: tuple[Any, ...]) -> type:
    known = {name: kind for family in (AnyMerger, AnySparsifier, AnyScaling) for name, kind in choices(family).items()}
    return next((known[part] for part in reversed(loc[:-1]) if part in known), Recipe)


def _setting(text: str) -> tuple[str, str, Any]:
    """`scaling.factor=0.5` as (scaling, factor, 0.5)."""
    path, equals, written = text.partition("=")
    kind, dot, key = path.strip().rpartition(".")
    kind = kind if dot else "merger"
    if not equals or not key or kind not in _KINDS:
        raise InvalidInput(
            f"--set {text}: is not of the form key=value",
            remedy="Write density=0.2 for the merger, sparsify.density=0.1 or scaling.factor=1.0 for the others",
        )
    if key in ("name", "version"):
        raise InvalidInput(f"--set {text}: {key} is no setting", remedy=f"Choose with --{kind} NAME")
    try:
        return kind, key, yaml.safe_load(written)
    except yaml.YAMLError as error:
        raise InvalidInput(f"--set {text}: the value cannot be read: {error}") from None
