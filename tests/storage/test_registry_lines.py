"""Versions of a line read back from a real MLflow: by number, by alias, with what each holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.errors import InvalidInput, Missing
from storage.registry import Registry, Stage
from storage.registry_lines import LineVersions, named_version

REFS = {kind: f"{kind}/{'0' * 63}{number}" for number, kind in enumerate(("checkpoint", "update", "state"))}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    found = Registry(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "artifacts")
    for number in (1, 2, 3):
        tags = {"step": str(number), "base": REFS["checkpoint"], "update": REFS["update"], "state": REFS["state"]}
        step = Stage("a-line", REFS["checkpoint"], {}, {"average": number / 10, "accuracy/sums": 0.5}, tags=tags)
        found.register("chain", f"k{number}", step, [], "s3://b/1", f"merge {number}", left_out=number == 3)
    with found.champions("a-line") as champions:
        champions.promote(1, "best")
    return found


def test_versions_are_found_by_number_by_alias_and_as_the_head(registry: Registry) -> None:
    versions = LineVersions(registry, "a-line")
    assert [(str(one), one.aliases, one.left_out, one.step) for one in versions.all()] == [
        ("a-line@1", ("champion",), False, 1),
        ("a-line@2", ("head",), False, 2),
        ("a-line@3", (), True, 3),
    ]
    assert versions.one("champion") == versions.one("1")
    assert versions.one().number == 2
    one = versions.one("1")
    assert (one.model, one.update, one.state, one.base) == (
        REFS["checkpoint"],
        REFS["update"],
        REFS["state"],
        REFS["checkpoint"],
    )
    assert versions.numbers(versions.one("2")) == {"average": 0.2, "accuracy/sums": 0.5}
    assert versions.page(one) is None  # a database has no pages


def test_what_is_not_there_is_said_with_what_is(registry: Registry) -> None:
    with pytest.raises(Missing, match=r"no version 'best'.*Versions: 1 to 3; aliases: champion, head"):
        LineVersions(registry, "a-line").one("best")
    with pytest.raises(Missing, match="there is no registered model 'other'"):
        LineVersions(registry, "other").all()


@pytest.mark.parametrize(
    ("text", "found"), [("a", ("a", None)), ("a@3", ("a", "3")), (" a@champion ", ("a", "champion"))]
)
def test_how_a_version_is_typed(text: str, found: tuple[str, str | None]) -> None:
    assert named_version(text) == found


@pytest.mark.parametrize("text", ["", "@3", "a@"])
def test_what_names_no_version(text: str) -> None:
    with pytest.raises(InvalidInput, match="names no version"):
        named_version(text)
