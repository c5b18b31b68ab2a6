"""The shape of the house: choices are what the README says, rooms are small, frameworks keep to their doors."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from configs.chain import AnyBase
from tasks.choice import Choice, choices
from tasks.codecs import AnyCodec
from tasks.data import AnyData
from tasks.mergers import AnyMerger, Joint
from tasks.optimizers import AnyOptimizer
from tasks.scalings import AnyScaling
from tasks.sparsifiers import AnySparsifier
from tasks.suites import AnySuite
from tasks.suites.heads import AnyHead
from tasks.tuners import AnyTuner

ROOT = Path(__file__).parents[1]
HOUSE = ("flows", "configs", "tasks", "storage")
FILES = sorted(path.relative_to(ROOT) for room in HOUSE for path in (ROOT / room).rglob("*.py"))
LIMIT = 300

FOLDERS = {
    "codecs": AnyCodec,
    "mergers": AnyMerger,
    "sparsifiers": AnySparsifier,
    "scalings": AnyScaling,
    "tuners": AnyTuner,
    "optimizers": AnyOptimizer,
    "suites": AnySuite,
    "data": AnyData,
}
FAMILIES = {**FOLDERS, "heads": AnyHead, "bases": AnyBase}
DOORS = {
    "prefect": ("flows/",),
    "mlflow": ("storage/registry",),
    "boto3": ("storage/s3",),
    "botocore": ("storage/s3",),
}


MEMBERS = {f"{family}.{name}": choice for family, union in FAMILIES.items() for name, choice in choices(union).items()}


@pytest.mark.parametrize("choice", MEMBERS.values(), ids=MEMBERS)
def test_a_choice_is_a_frozen_dataclass_with_a_name_and_a_version(choice: Any) -> None:
    assert issubclass(choice, Choice)
    assert choice.__dataclass_params__.frozen
    hints = get_type_hints(choice)
    defaults = {field.name: field.default for field in dataclasses.fields(choice)}
    for field in ("name", "version"):
        assert get_origin(hints[field]) is Literal
        assert get_args(hints[field]) == (defaults[field],)
    assert isinstance(defaults["version"], int)
    assert choice.__doc__


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_choice_has_a_file_of_its_own_in_the_folder_of_its_family(folder: str) -> None:
    files = [Path(inspect.getfile(choice)).relative_to(ROOT) for choice in choices(FOLDERS[folder]).values()]
    assert len(set(files)) == len(files)
    assert {str(file.parent) for file in files} == {f"tasks/{folder}"}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_rooms_are_small_and_say_what_they_are_for(file: Path) -> None:
    text = (ROOT / file).read_text()
    assert text.count("\n") <= LIMIT
    assert ast.get_docstring(ast.parse(text)), "the first line of a file says what it is for"


def imported(file: Path) -> set[str]:
    """The packages that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).partition(".")[0])
    return found


@pytest.mark.parametrize("package", DOORS)
def test_a_framework_comes_in_by_its_door(package: str) -> None:
    importers = [file.as_posix() for file in FILES if package in imported(file)]
    assert importers, f"nobody imports {package}: has its door moved?"
    assert [file for file in importers if not file.startswith(DOORS[package])] == []


def test_imports_go_one_way() -> None:
    """flows -> configs -> tasks -> storage."""
    for place, room in enumerate(HOUSE):
        inside = [file for file in FILES if file.parts[0] == room]
        assert inside
        for file in inside:
            assert imported(file).isdisjoint(HOUSE[:place]), file


def test_reading_a_chain_loads_no_framework_that_only_its_work_needs() -> None:
    """They take seconds to import: a typo in a chain is answered without them."""
    slow = ("transformers.modeling_utils", "torchmetrics", "datasets", "scipy.stats", "peft", "sklearn", "mlflow")
    code = f"import sys, configs.chain; print([name for name in {slow} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_the_readme_lists_every_merger_as_it_is() -> None:
    """Kind, state and source as the classes say."""
    rows = {}
    for line in (ROOT / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[1] in ("sequential", "joint"):
            rows[cells[0].split("`")[1]] = tuple(cells[1:])
    expected = {}
    for name, merger in choices(AnyMerger).items():
        kind = "joint" if issubclass(merger, Joint) else "sequential"
        expected[name] = (kind, merger.state_size, "yes" if merger.weighted else "no", merger.source)
    assert rows == expected


def test_the_readme_lists_every_tuner_and_optimizer_as_it_is() -> None:
    """What learns or is stepped, what is kept of it, library and source, as the classes say."""
    rows = {}
    for line in (ROOT / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[3] in ("peft", "torch", "transformers", "ours"):
            rows[cells[0].split("`")[1]] = tuple(cells[1:])
    tuners = {name: (one.trains, one.stored, one.library, one.source) for name, one in choices(AnyTuner).items()}
    steppers = {name: (one.steps, one.state, one.library, one.source) for name, one in choices(AnyOptimizer).items()}
    assert rows == {**tuners, **steppers}
