"""`deltaworks mergers` and `tuners`: everything that can be chosen is listed, and described from its own words."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable
from typing import Literal

import pytest
from rich.console import Console
from rich.table import Table

from flows import catalogue
from storage.errors import InvalidInput
from tasks.mergers import MERGERS, Joint
from tasks.optimizers import OPTIMIZERS
from tasks.recipe import Recipe
from tasks.scalings import SCALINGS
from tasks.sparsifiers import SPARSIFIERS
from tasks.tuners import TUNERS, Training

FAMILIES = {**MERGERS, **SPARSIFIERS, **SCALINGS}


def printed(parts: Iterable[str | Table], width: int) -> str:
    output = io.StringIO()
    console = Console(file=output, width=width, highlight=False)
    for part in parts:
        console.print(part)
    return output.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_everything_is_listed_and_fits(width: int) -> None:
    text = printed(catalogue.overview(width), width)
    assert max(map(len, text.splitlines())) <= width
    words = {line.split()[0] for line in text.splitlines() if line.strip() and line.startswith(" ")}
    assert set(FAMILIES) <= words
    assert "…" not in text and "..." not in text


def test_a_row_says_what_a_merger_is() -> None:
    rows = {line.split()[0]: line for line in printed(catalogue.overview(200), 200).splitlines() if line.strip()}
    assert rows["tsv_m"].split()[1:4] == ["at", "most", "2"]
    assert rows["ties"].split()[:5] == ["ties", "4", "yes", "arXiv", "2306.01708"]
    assert "trim each update, elect a sign per entry" in rows["ties"]
    joint = {name for name, kind in MERGERS.items() if issubclass(kind, Joint)}
    assert {name for name in MERGERS if rows[name].split()[1] == "none"} == joint


@pytest.mark.parametrize("name", FAMILIES)
def test_one_is_described_with_all_its_settings(name: str) -> None:
    kind = FAMILIES[name]
    text = printed(catalogue.about(name, 100), 100)
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.split())
    for sentence in (kind.__doc__ or "").split(". ")[:1]:
        assert " ".join(sentence.split()) in words
    for field in dataclasses.fields(kind):
        assert field.name in text
    assert f"{{name: {name}" in text


@pytest.mark.parametrize("width", [80, 120])
def test_tuners_and_optimizers_are_listed_with_what_learns_and_their_settings(width: int) -> None:
    text = printed(catalogue.tuners(width), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text and "..." not in text
    words = {line.split()[0] for line in text.splitlines() if line.strip() and line.startswith(" ")}
    assert {*TUNERS, *OPTIMIZERS} <= words
    rows = {line.split()[0]: line for line in printed(catalogue.tuners(200), 200).splitlines() if line.strip()}
    for kind in TUNERS.values():
        assert " ".join(rows[kind.name].split()[1:]).startswith(kind.source)
        assert f" {kind.library} " in rows[kind.name] and kind.trains in rows[kind.name]
    assert rows["shira"].rstrip().endswith("targets, rank, mask")  # without what all tuners share
    assert rows["muon"].rstrip().endswith("momentum, adjust")


@pytest.mark.parametrize("name", [*TUNERS, *OPTIMIZERS])
def test_a_tuner_is_described_with_all_its_settings(name: str) -> None:
    kind = {**TUNERS, **OPTIMIZERS}[name]
    text = printed(catalogue.about(name, 100, catalogue.tuning()), 100)
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.split())
    for told in (
        kind.source,
        kind.library,
        *((kind.trains, kind.stored) if name in TUNERS else (kind.steps, kind.state)),
    ):
        assert told in words
    cells = {line.split()[0] for line in text.splitlines() if len(line.split()) > 2 and line.startswith(" ")}
    assert {one.name for one in dataclasses.fields(kind)} - {"name", "version"} <= cells
    assert ("settings that all tuners share" in text) == issubclass(kind, Training)
    assert f"{{name: {name}" in text


@pytest.mark.parametrize("name", MERGERS)
def test_what_goes_with_a_merger_is_what_a_recipe_takes(name: str) -> None:
    text = " ".join(printed(catalogue.about(name, 100), 100).split())
    for key, family in (("sparsify", SPARSIFIERS), ("scaling", SCALINGS)):
        for kind in family.values():
            Recipe(MERGERS[name](), **{key: kind()})  # type: ignore[arg-type]
        assert f"goes with {key}: {', '.join(family)}" in text


def test_a_name_that_is_none() -> None:
    with pytest.raises(InvalidInput, match=r"no 'opmc'\. Did you mean opcm"):
        list(catalogue.about("opmc", 80))


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (float, "float"),
        (float | None, "float | none"),
        (Literal["a", "b"], "a | b"),
        (tuple[float, ...], "list of float"),
        (tuple[str, ...] | None, "list of str | none"),
        (OPTIMIZERS["muon"] | OPTIMIZERS["adamw"], "{name: muon} | {name: adamw}"),
    ],
)
def test_types_are_written_as_in_a_config(hint: object, text: str) -> None:
    assert catalogue._type(hint) == text


def test_docstrings_are_set_for_the_width() -> None:
    text = (
        "scale: of the merged delta, which is a long text that has to be broken\n"
        "    somewhere and indented.\n"
        "rule\n"
        "    one    the first\n"
        "           of them\n"
        "    other  the second\n"
        "\n"
        "first: one setting\n"
        "second: another\n"
        "\n"
        "Formulas stay:\n"
        "    a = b"
    )
    assert catalogue._reflowed(text, 50).splitlines() == [
        "scale: of the merged delta, which is a long text",
        "    that has to be broken somewhere and indented.",
        "rule",
        "    one    the first of them",
        "    other  the second",
        "",
        "first: one setting",
        "second: another",
        "",
        "Formulas stay:",
        "    a = b",
    ]
