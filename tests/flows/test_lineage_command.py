"""`deltaworks lineage` as a person meets it, and the files that every version keeps in a real MLflow."""

from __future__ import annotations

import json
import logging
import shutil
import webbrowser
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.workplace import here
from storage.registry import ModelVersion
from storage.registry_lines import LineVersions, RunFiles
from storage.registry_pyfunc import FOLDER
from tasks.gate import Verdict
from tasks.lineage import kept
from tasks.lineage.kept import PACKAGES, PAGE, PICTURE
from tasks.lineage.versions import version_lineage
from tests.tasks.lineage_case import Grown

FAILED = Verdict(("'names' reaches 50.0 %, at least 76.5 % are asked for",), {})


@pytest.fixture
def grown(tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch) -> Grown:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("DELTAWORKS_HOME", str(home))
    monkeypatch.setenv("DELTAWORKS_DEVICE", "cpu")
    shutil.copy(tables, home / "mlflow.db")
    return Grown(here().store)


def registered(grown: Grown) -> list[ModelVersion]:
    """Three versions; the gate let the first in, and left the third out of what is served."""
    registry = here().registry
    verdicts = [Verdict((), {}), None, FAILED]
    return [grown.register(step, registry, verdict) for step, verdict in enumerate(verdicts)]


def ask(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["lineage", *arguments])


def said(*arguments: str) -> str:
    found = ask(*arguments)
    assert found.exit_code == 0, found.output
    return found.stdout


def test_every_version_keeps_its_page_and_its_picture(grown: Grown) -> None:
    versions = registered(grown)
    registry = here().registry
    for made in versions:
        assert sorted(RunFiles(registry, made.run_id).names()) == [PAGE, PICTURE, FOLDER, PACKAGES]
        (page,) = here().settings.home.glob(f"mlflow-artifacts/*/{made.run_id}/artifacts/{PAGE}")
        text = page.read_text()
        assert f"tiny@{made.version}" in text and f"version {made.version}" in text
        assert f"version {made.version + 1}" not in text
        page.write_text("kept")
        assert grown.register(made.version - 1, registry) == ModelVersion("tiny", made.version, made.run_id, False)
        assert page.read_text() == "kept", "what is there is not written again"


def test_what_versions_say_is_in_the_graph(grown: Grown) -> None:
    registered(grown)
    versions = LineVersions(here().registry, "tiny")
    found = version_lineage(versions.one("head"), versions.all(), grown.entries, grown.store)
    assert found.title == "tiny@3" and found.verdict == "failed" and "76.5 %" in found.reasons
    badges = {node.title: node.badges for node in found.of_kind("model")}
    assert badges["version 1"] == ("champion",)
    assert badges["version 3"] == ("challenger", "head", "refused")
    state = found.of_kind("state")[1]
    assert (state.figures["seconds"], state.figures["device"]) == (1.5, "cpu")
    model = found.of_kind("model")[1].figures
    assert (model["seconds"], model["evaluation seconds"]) == (0.5, 2.0) and "device" not in model
    # the scores beside the line are those that the versions name, without a look at the whole store
    assert [node.figures["score"] for node in found.of_kind("tuned")] == [0.95, 0.9, 0.85]
    assert found.accuracy.base_average == pytest.approx(0.1)
    earlier = version_lineage(versions.one("2"), versions.all(), grown.entries, grown.store)
    assert [node.title for node in earlier.of_kind("model")] == ["version 1", "version 2"]
    assert version_lineage(versions.one("2"), versions.all(), [], grown.store) == earlier, "without the journal too"


def test_a_merge_that_was_left_out_stands_aside(grown: Grown) -> None:
    registry = here().registry
    grown.register(0, registry, Verdict((), {}))
    grown.register(1, registry, FAILED, left_out=True)
    versions = LineVersions(registry, "tiny")
    found = version_lineage(versions.one("head"), versions.all(), grown.entries[:1], grown.store)
    aside = [node for node in found.nodes if node.aside]
    assert {node.kind for node in aside} == {"data", "tuned", "update", "compressed", "state", "model"}
    assert aside[-1].badges == ("challenger", "left out")
    assert aside[-1].figures["average"] == pytest.approx(0.75)
    assert [row.merged for row in found.accuracy.rows] == ["sums"], "it is no row of the line's matrix"
    own = version_lineage(versions.one("2"), versions.all(), grown.entries[:1], grown.store)
    assert [node.title for node in own.of_kind("model")] == ["version 1", "version 2"]
    assert not any(node.aside for node in own.nodes)


def test_a_page_that_cannot_be_kept_costs_no_version(
    grown: Grown, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong while it is drawn; the next run writes it."""

    def fail(*_: object) -> str:
        raise OSError("no space left")

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(kept, "page", fail)
        made = grown.register(0, here().registry)
    assert made.version == 1 and "the lineage of tiny version 1 was not kept: OSError" in caplog.text
    assert LineVersions(here().registry, "tiny").one("1").step == 1
    assert PAGE not in RunFiles(here().registry, made.run_id).names()
    assert not grown.register(0, here().registry).fresh
    assert sorted(RunFiles(here().registry, made.run_id).names()) == [PAGE, PICTURE, FOLDER, PACKAGES]


def test_a_tree_of_everything(grown: Grown) -> None:
    registered(grown)
    text = said("tiny")
    assert text.startswith("tiny@3 challenger head")
    for words in ("version 1 [champion]", "version 3 [challenger] [head] [refused]", "score 95.0 %", "took 1.5 s"):
        assert words in text, words
    assert str(grown.entries[0].update)[:15] in text
    assert "version 2" not in said("tiny@champion")


def test_json_and_mermaid_are_all_that_is_printed(grown: Grown) -> None:
    registered(grown)
    told = json.loads(said("tiny@2", "--json"))
    assert (told["title"], told["version"], told["similarity"]["updates"]) == ("tiny@2", 2, ["sums", "dates"])
    assert said("tiny", "--mermaid").startswith("flowchart LR\n")


def test_files_are_written(grown: Grown, tmp_path: Path) -> None:
    registered(grown)
    html, svg = tmp_path / "new" / "page.html", tmp_path / "picture.svg"
    text = said("tiny", "--html", str(html), "--svg", str(svg))
    assert str(html) in text and str(svg) in text
    assert "tiny@3" in html.read_text() and svg.read_text().startswith("<svg")


def test_the_page_is_opened(grown: Grown, monkeypatch: pytest.MonkeyPatch) -> None:
    registered(grown)
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or True)
    said("tiny@1", "--open")
    assert opened == [(here().settings.home / "reports" / "lineage-tiny@1.html").as_uri()]


def test_a_line_that_only_the_store_knows(grown: Grown) -> None:
    assert said("tiny").startswith("tiny, entry 3")
    text = said("tiny@2")
    assert text.startswith("tiny, entry 2") and "after 2 updates" in text and "(not registered)" in text
    found = ask("tiny@7")
    assert found.exit_code == 1 and "Entries: 0 to 3" in found.stderr
    assert ask("tiny@0").exit_code == 1


def test_wrong_words(grown: Grown) -> None:
    for arguments, words in (
        (("nothing",), "there is no registered model 'nothing'"),
        (("@3",), "names no version"),
        (("tiny", "--json", "--mermaid"), "both print"),
    ):
        found = ask(*arguments)
        assert found.exit_code == 1 and words in found.stderr, arguments
    registered(grown)
    found = ask("tiny@9")
    assert found.exit_code == 1 and "Versions: 1 to 3; aliases: challenger, champion, head" in found.stderr
