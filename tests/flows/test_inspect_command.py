"""`deltaworks inspect` as a person meets it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.commands import inspect_picture
from flows.commands import inspect_update as command
from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from tasks.codecs import CODECS, Ternary
from tasks.compress import compress_update
from tasks.inspect_update import inspect_update
from tasks.inspection.findings import Inspection
from tests.tasks.inspected import rl_case


class Place:
    """A sparse update of bfloat16 weights in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = ArtifactStore(DirectoryObjects(folder / "store"))
        self.case, self.changed = rl_case(self.store, 0.05)
        self.update = self.case.update

    def inspected(self) -> Inspection:
        return inspect_update(self.update, self.store)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("DELTAWORKS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DELTAWORKS_STORE", f"file://{tmp_path}/store")
    monkeypatch.setenv("DELTAWORKS_DEVICE", "cpu")
    monkeypatch.setattr(command.console, "width", 80)
    return Place(tmp_path)


def inspect(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["inspect", *arguments])


def shown(*arguments: str) -> str:
    found = inspect(*arguments)
    assert found.exit_code == 0, found.output
    return found.stdout


def rows(text: str, title: str) -> dict[str, list[str]]:
    """The rows of a table, up to the empty line after it or to text."""
    lines = text.split(title)[1].splitlines()[2:]
    found = {}
    for line in lines:
        if not re.match(r"\S+( it is)? +[\d-]", line):
            break
        label, *cells = re.split(r" {2,}", line.strip())
        found[label] = cells
    return found


def test_tables_and_the_verdict_fit_into_80_columns(place: Place) -> None:
    text, wanted = shown(place.update[:15], "--workers", "2"), place.inspected()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert f"{place.update[:19]}, as it was extracted: {wanted.total.elements:,} numbers in 10 tensors" in text
    kinds = rows(text, "by kind")
    assert list(kinds) == ["embedding", "attention", "mlp", "norm", "all"]
    assert kinds["all"][:2] == ["42.2k", f"{place.changed / wanted.total.elements:.1%}"] and kinds["norm"][1] == "0.0%"
    assert kinds["mlp"][4] == f"{wanted.kinds[2].norm:.3g}"
    layers = rows(text, "by layer")
    assert list(layers) == ["0", "1", "2", "outside"]
    codecs = rows(text, "by codec")
    assert set(codecs) == {*CODECS, "as it is"}
    sizes = {one.codec: one.bytes for one in wanted.costs}
    for name, size in sizes.items():
        assert codecs[name][0] == f"{size:,}"
    assert [*codecs][:-1] == sorted(sizes, key=lambda name: sizes[name] or 0)
    assert codecs["exact"][3] == "none"
    words = " ".join(text.split())
    assert "fits: exact" in words and "looks like an update of reinforcement learning" in words
    assert "note: skillpack without the examples of the task" in words
    assert "steps between floats, given the exponents of the base" in words


def test_a_quick_look_tries_no_codec(place: Place) -> None:
    text = shown(place.update, "--no-codecs", "--tolerance", "1e-6", "--tolerance", "1e-4")
    assert "by codec" not in text and "fits: exact" in text
    assert ">1e-06" in text and ">0.0001" in text and ">1e-05" not in text


def test_chosen_codecs(place: Place) -> None:
    assert set(rows(shown(place.update, "--codecs", "ternary, exact"), "by codec")) == {"ternary", "exact", "as it is"}


def test_what_could_not_be_done_is_said(place: Place) -> None:
    small = compress_update(place.update, Ternary(), place.store)
    text = " ".join(shown(small, "--codecs", "exact,rtn", "--ranks-up-to", "8").split())
    assert "as ternary wrote it" in text and "exact cannot write it: it was lossy before" in text
    assert (
        f"note: 10 of 10 tensors were changed by a codec before; {place.update[:19]} is what it was made from" in text
    )
    assert "note: no ranks of 7 matrices whose smaller side is above 8" in text


def test_json_holds_everything(place: Place) -> None:
    found: dict[str, Any] = json.loads(shown(place.update, "--json"))
    wanted = place.inspected()
    assert found["update"] == place.update and found["fits"] == "exact" and found["compared"] == "bits"
    assert found["total"]["changed"] == place.changed / found["total"]["numbers"]
    assert found["total"]["norm"] == wanted.total.norm and found["total"]["step_bits"] == wanted.total.step_bits
    assert found["total"]["beyond"] == [wanted.total.beyond(0), wanted.total.beyond(1)]
    assert [one["label"] for one in found["layers"][0]["kinds"]] == ["attention", "mlp", "norm"]
    assert found["layers"][0]["kinds"][2]["changed"] == 0
    assert [one["bytes"] for one in found["codecs"]] == [one.bytes for one in wanted.costs]
    assert {one["name"]: one["changed"] for one in found["tensors"]} == {
        one.name: one.changed for one in wanted.tensors
    }


def test_nothing_is_kept(place: Place) -> None:
    before = set(place.store.objects.list(""))
    shown(place.update)
    assert set(place.store.objects.list("")) == before


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_picture(place: Place, suffix: str) -> None:
    target = place.folder / "new" / f"update{suffix}"
    text = shown(place.update, "--codecs", "exact,ternary", "--plot", str(target))
    assert f"picture in {target}" in text
    if suffix == ".png":
        with Image.open(target) as picture:
            assert picture.width > 800 and len(set(picture.convert("RGB").get_flattened_data())) > 50
    else:
        assert target.read_bytes()[:5] == {".svg": b"<?xml", ".pdf": b"%PDF-"}[suffix]


def test_a_picture_beside_json_does_not_disturb_it(place: Place) -> None:
    target = place.folder / "update.png"
    assert json.loads(shown(place.update, "--no-codecs", "--json", "--plot", str(target)))["codecs"] == []
    assert target.exists()


def test_the_picture_shows_what_was_found(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    figure = inspect_picture.Figure
    monkeypatch.setattr(inspect_picture, "Figure", lambda **kwargs: figures.append(figure(**kwargs)) or figures[0])
    wanted = place.inspected()
    inspect_picture.draw(wanted, place.folder / "x.png")
    shares, norms, bars = figures[0].get_axes()
    lines = {line.get_label(): line.get_ydata().tolist() for line in shares.lines}
    layers = wanted.layers[:3]
    for kind in ("attention", "mlp", "norm"):
        assert lines[kind] == [one.only(kind).changed for one in layers]
    assert lines["embedding"] == [wanted.layers[3].changed]
    assert norms.lines[1].get_ydata().tolist() == [one.only("mlp").relative for one in layers]
    names = [label.get_text() for label in bars.get_yticklabels()]
    sizes = {one.codec: one.bytes for one in wanted.costs}
    widths = {name: bar.get_width() for name, bar in zip(names, bars.patches, strict=True)}
    assert widths == {name: pytest.approx((size or 0) / 1e6) for name, size in sizes.items()}
    assert "every bit" in " ".join(text.get_text() for text in bars.texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("update/0000",), "no update in"),
        (("{base}",), "expected a update, found a checkpoint"),
        (("{update}", "--plot", "x.bmp"), "ends in one of .png, .pdf, .svg"),
        (("{update}", "--codecs", "zip"), "there is no 'zip'; choices: dense, exact"),
        (("{update}", "--codecs", ","), "--codecs names none"),
        (("{update}", "--codecs", "exact", "--no-codecs"), "exclude each other"),
        (("{update}", "--tolerance", "-1"), "tolerances are 0 or more, found -1.0"),
    ],
)
def test_what_cannot_work_is_explained(place: Place, arguments: tuple[str, ...], message: str) -> None:
    found = inspect(*(one.format(base=place.case.base, update=place.update) for one in arguments))
    assert found.exit_code == 1
    assert message in " ".join(found.stderr.split())


def test_help_has_examples() -> None:
    found = inspect("--help")
    assert found.exit_code == 0 and "deltaworks inspect update/1b2c --no-codecs" in found.stdout
