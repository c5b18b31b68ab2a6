"""`deltaworks similarity` as a person meets it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.commands import similarity as command
from flows.commands import similarity_picture
from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.lines import Line
from storage.manifest import Lineage
from storage.refs import CheckpointRef, UpdateRef
from tasks.codecs import Ternary
from tasks.compress import compress_update
from tasks.merge import fold_update
from tasks.mergers import Average
from tasks.recipe import Recipe
from tasks.similarity import Similarity, similarity
from tests.builders import checkpoint_of, random_tensors, update_of

RECIPE = Recipe(Average())
TASKS = ("rot90", "invert", "roll")


class Place:
    """A line of three ternary updates, one of which undoes another, and an update that is in no line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = ArtifactStore(DirectoryObjects(folder / "store"))
        self.base: CheckpointRef = checkpoint_of(random_tensors(0), self.store)
        first, third = (self.update(random_tensors(seed)) for seed in (1, 3))
        second = self.update({name: -tensor for name, tensor in random_tensors(1).items()})
        self.updates = [compress_update(one, Ternary(density=0.5), self.store) for one in (first, second, third)]
        self.other = self.update(random_tensors(1), task="rot180")
        self.line = Line(self.store.objects, "tiny-average")
        self.line.open(self.base, RECIPE.spec())
        for task, update in zip(TASKS, self.updates, strict=True):
            self.merge(task, update)

    def update(self, deltas: dict[str, torch.Tensor], task: str = "") -> UpdateRef:
        plain = self.store.open(update_of(deltas, self.base, self.store))
        draft = self.store.draft("update", Lineage("extract", {"base": self.base}))
        for record in plain.manifest.tensors:
            draft.share(record)
        draft.facts.update({"task": task} if task else {})
        return UpdateRef(draft.commit())

    def merge(self, task: str, update: UpdateRef) -> None:
        head = self.line.head()
        self.line.fold(head, task, update, fold_update(self.base, head.state, update, RECIPE, self.store))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("DELTAWORKS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DELTAWORKS_STORE", f"file://{tmp_path}/store")
    monkeypatch.setenv("DELTAWORKS_DEVICE", "cpu")
    monkeypatch.setenv("COLUMNS", "100")
    return Place(tmp_path)


def compare(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["similarity", *arguments])


def rows(text: str) -> dict[str, list[str]]:
    """The rows of a table, which begin with a number and a label: what follows the label."""
    lines = (re.match(r" *\d+ ([a-z]\S*) (.*)", line) for line in text.splitlines())
    return {line[1]: line[2].split() for line in lines if line}


def as_json(*arguments: str) -> dict[str, Any]:
    found = compare(*arguments, "--json")
    assert found.exit_code == 0, found.output
    parsed: dict[str, Any] = json.loads(found.stdout)
    return parsed


def test_the_updates_of_a_line_in_their_order(place: Place) -> None:
    found = compare("--line", "tiny-average", "--workers", "2")
    assert found.exit_code == 0, found.output
    wanted = similarity(place.updates, place.store)
    table = rows(found.stdout)
    assert list(table) == list(TASKS)
    for row, (task, cells) in enumerate(table.items()):
        numbers = [
            "·" if row == column else f"{value:.3f}" for column, value in enumerate(wanted.cosines[row].tolist())
        ]
        assert cells == [*numbers, f"{wanted.norms[row]:#.3g}", f"{wanted.changed[row]:.1%}"], task
    assert re.search(r"least alike +rot90 and invert, -1\.000", found.stdout)
    assert f"cosine, over {wanted.numbers} numbers in 5 tensors" in found.stdout
    assert "sign conflicts" not in found.stdout


def test_sign_conflicts_are_a_second_table(place: Place) -> None:
    found = compare("--line", "tiny-average", "--conflicts")
    assert found.exit_code == 0, found.output
    first, second = found.stdout.split("sign conflicts")
    assert rows(second)["rot90"][1] == "100%" and rows(first)["rot90"][1] == "-1.000"


def test_what_a_rollback_took_back_is_left_out(place: Place) -> None:
    entries = list(place.line.entries())
    place.line.rollback(entries[1], "a try")
    place.merge("roll", place.updates[2])
    assert [one["label"] for one in as_json("--line", "tiny-average")["updates"]] == ["rot90", "roll"]


def test_json_holds_everything(place: Place) -> None:
    found = as_json(*(update[:20] for update in place.updates))
    wanted = similarity(place.updates, place.store)
    assert found["cosines"] == wanted.cosines.tolist() and found["sign_conflicts"] == wanted.conflicts.tolist()
    assert [one["ref"] for one in found["updates"]] == place.updates
    assert [one["norm"] for one in found["updates"]] == wanted.norms.tolist()
    assert [one["changed"] for one in found["updates"]] == wanted.changed.tolist()
    assert (found["numbers"], found["tensors"]) == (wanted.numbers, wanted.tensors)


def test_updates_beside_those_of_a_line(place: Place) -> None:
    found = as_json("--line", "tiny-average", place.other)
    assert [one["label"] for one in found["updates"]] == [*TASKS, "rot180"]
    assert found["cosines"][3][0] == pytest.approx(-found["cosines"][3][1], rel=1e-9) and found["cosines"][3][0] > 0.7


def test_labels_tell_updates_apart(place: Place) -> None:
    place.merge("roll", place.other)
    labels = [one["label"] for one in as_json("--line", "tiny-average", place.updates[0])["updates"]]
    short = [ref[:15] for ref in (place.updates[2], place.other, place.updates[0])]
    assert labels == ["rot90", "invert", f"roll {short[0]}", f"roll {short[1]}", short[2]]


def test_no_number_is_cut_on_a_narrow_terminal(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.console, "width", 30)
    found = compare(*place.updates, "--conflicts")
    assert found.exit_code == 0, found.output
    assert "…" not in found.stdout and "-1.000" in found.stdout and "changes" in found.stdout
    assert command.console.width == 30


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture(place: Place, suffix: str) -> None:
    target = place.folder / "new" / f"alike{suffix}"
    found = compare("--line", "tiny-average", "--plot", str(target))
    assert found.exit_code == 0, found.output
    assert f"picture in {target}" in found.stdout
    if suffix == ".png":
        with Image.open(target) as picture:
            assert picture.width > 800 and len(set(picture.convert("RGB").get_flattened_data())) > 50
    else:
        assert target.read_text().startswith("<?xml")


def test_a_picture_beside_json_does_not_disturb_it(place: Place) -> None:
    target = place.folder / "alike.png"
    assert as_json("--line", "tiny-average", "--plot", str(target))["tensors"] == 5
    assert target.exists()


def test_the_picture_shows_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together is red in both heat maps: a high cosine, and few conflicts."""
    cosines, conflicts = np.array([[1, 0.4, -0.2], [0.4, 1, 0], [-0.2, 0, 1]]), np.full((3, 3), 0.3)
    figures = []
    figure = similarity_picture.Figure
    monkeypatch.setattr(similarity_picture, "Figure", lambda **kwargs: figures.append(figure(**kwargs)) or figures[0])
    found = Similarity(cosines, conflicts, np.ones(3), np.ones(3), 10, 1, 1.0)
    similarity_picture.draw(found, ["a", "b", "c"], tmp_path / "x.png")
    for axes, square in zip(figures[0].axes[:2], (cosines, conflicts), strict=True):
        image = axes.images[0]
        shown = np.ma.filled(image.get_array(), np.nan)
        assert np.isnan(shown.diagonal()).all()
        assert np.array_equal(shown[0, 1:], square[0, 1:])
        red, _, blue, _ = image.cmap(image.norm(square[0, 1]))
        assert red > 2 * blue
        assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert "0.400" in {text.get_text() for text in figures[0].axes[0].texts}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name two updates or more, or a line"),
        (("--line", "other"), "there is no line 'other'"),
        (("update/0000",), "no update in"),
        (("--line", "tiny-average", "--plot", "x.bmp"), "ends in one of .png, .pdf, .svg"),
    ],
)
def test_what_cannot_work_is_explained(place: Place, arguments: tuple[str, ...], message: str) -> None:
    found = compare(*arguments)
    assert found.exit_code == 1
    assert message in " ".join(found.stderr.split())


def test_one_update_or_another_kind_or_base(place: Place) -> None:
    stranger = update_of(random_tensors(1), checkpoint_of(random_tensors(8), place.store), place.store)
    single = Line(place.store.objects, "single")
    single.open(place.base, RECIPE.spec())
    for arguments, message in (
        ((place.other,), "two updates or more, found 1"),
        (("--line", "single"), "line 'single' has 0 updates: there is nothing to compare"),
        ((place.other, place.base), "expected a update, found a checkpoint"),
        ((place.other, stranger), f"the base of update (beside {place.other[:19]}) {stranger[:19]}"),
    ):
        found = compare(*arguments)
        assert found.exit_code == 1, found.output
        assert message in " ".join(found.stderr.split())
