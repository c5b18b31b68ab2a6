"""What people see: the page of a lineage by itself, and a finished chain in MLflow's own pages, in a real browser.

Needs Chromium, `apt-get install chromium`; DELTAWORKS_BROWSER names another command. SCREENSHOTS names a folder for
pictures of what was seen.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from configs.chain import load_chain
from flows.chain import Outcome, chain
from flows.cli import app
from flows.servers import LOOPBACK, free_port, start_mlflow
from flows.workplace import here
from storage.address import open_objects
from storage.artifacts import ArtifactStore
from storage.registry import Registry
from storage.registry_lines import LineVersions, RunFiles
from tasks.lineage.kept import PAGE, PICTURE
from tasks.lineage.measures import Measures
from tasks.lineage.page import page
from tasks.lineage.versions import version_lineage
from tests.flows.devtools import Page, browser, found_browser

BROWSER = found_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium, or DELTAWORKS_BROWSER"),
    pytest.mark.usefixtures("prefect_server"),
]


@dataclass(frozen=True)
class Seen:
    """A finished chain of two tasks, and where its MLflow is."""

    home: Path
    outcome: Outcome
    address: str

    @property
    def name(self) -> str:
        return self.outcome.lines[0].name

    def file(self, name: str) -> Path:
        """A file of the newest version's run, as MLflow keeps it."""
        run = self.outcome.lines[0].last.version.run_id
        (found,) = self.home.glob(f"mlflow-artifacts/*/{run}/artifacts/{name}")
        return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Iterator[Seen]:
    home = tmp_path_factory.mktemp("seen")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAWORKS_HOME", str(home))
        config = load_chain("smoke")
        outcome = chain(replace(config, tasks=config.tasks[:2], lines=config.lines[:1]))
        port = free_port()
        server = start_mlflow(here().settings, LOOPBACK, port)
        try:
            server.await_answer()
            yield Seen(home, outcome, f"http://{LOOPBACK}:{port}")
        finally:
            server.stop()


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    assert BROWSER is not None
    with browser(BROWSER) as page:
        page.resize(1280, 1000)
        yield page


def shot(page: Page, name: str) -> None:
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.shot(Path(folder) / f"{name}.png")


def chosen(page: Page) -> str:
    return str(page.ask("document.querySelector('.node.chosen .name')?.textContent ?? ''"))


def test_the_page_by_itself(seen: Seen, tab: Page) -> None:
    address = seen.file(PAGE).as_uri()
    tab.open(address)
    text = tab.wait_text(f"{seen.name}@2", "From the base to this version", "Everything as a table")
    for words in ("rot90", "invert", "ternary", "head", "How alike the updates are", "layers.0", "took"):
        assert words in text, words
    assert tab.ask("document.querySelectorAll('.canvas .node').length") == 1 + 2 * 6
    assert tab.ask("document.querySelectorAll('.nodes tbody tr').length") == 1 + 2 * 6
    assert tab.ask("document.querySelectorAll('.canvas .path').length") == 2 * 6 + 1
    assert tab.ask("document.documentElement.scrollWidth") <= 1280
    assert [one for one in tab.requests if one != address and not one.startswith("data:")] == []
    assert tab.errors == []
    shot(tab, "page-light")


def test_the_page_by_mouse_and_by_keys(seen: Seen, tab: Page) -> None:
    tab.open(seen.file(PAGE).as_uri())
    tab.ask("document.querySelector('.node.model').dispatchEvent(new MouseEvent('click'))")
    assert chosen(tab) == "version 1"
    detail = str(tab.ask("document.getElementById('detail').innerText"))
    model = seen.outcome.lines[0].steps[0].model
    assert model in detail and "average score" in detail
    lit = set(tab.ask("[...document.querySelectorAll('.node.lit')].map(one => one.classList[1])"))
    assert lit == {"base", "data", "tuned", "update", "compressed", "state", "model"}
    assert tab.ask("document.querySelectorAll('.node:not(.lit)').length") == 6, "nothing of the later merge"
    tab.press("Escape", 27)
    assert chosen(tab) == ""

    tab.ask("document.querySelector('nav a:last-child').focus()")
    for _ in range(10):  # past the links and the picture's frame, to its first node
        tab.press("Tab", 9)
        if tab.ask("document.activeElement.classList.contains('node')"):
            break
    assert tab.ask("document.activeElement.classList.contains('base')")
    tab.press("Enter", 13)
    assert chosen(tab) == "ViTModel"
    for key, code, name in (("ArrowRight", 39, "digits"), ("ArrowRight", 39, "rot90"), ("ArrowDown", 40, "invert")):
        tab.press(key, code)
        assert chosen(tab) == name
    assert tab.ask("document.activeElement.classList.contains('tuned')")
    shot(tab, "page-chosen")
    tab.open(seen.file(PAGE).as_uri() + "#n3")
    assert chosen(tab) != "", "an address leads to a node"
    assert tab.errors == []


def test_the_page_in_the_dark_and_on_a_phone(seen: Seen, tab: Page) -> None:
    tab.open(seen.file(PAGE).as_uri())
    colours = {}
    for scheme in ("light", "dark"):
        tab.prefer(scheme)
        paper, *inks = (
            str(tab.ask(f"getComputedStyle(document.querySelector('{part}')).{style}"))
            for part, style in (("body", "backgroundColor"), ("h1", "color"), (".canvas .name", "fill"))
        )
        assert all(contrast(paper, ink) > 7 for ink in inks), scheme
        colours[scheme] = paper
    assert colours["light"] != colours["dark"]
    shot(tab, "page-dark")
    tab.resize(480, 900)
    try:
        assert tab.ask("document.documentElement.scrollWidth") <= 480, "only figures scroll sideways"
        shot(tab, "page-phone")
    finally:
        tab.resize(1280, 1000)
        tab.prefer("light")


def test_the_picture_by_itself(seen: Seen, tab: Page) -> None:
    picture = seen.file(PICTURE)
    ElementTree.parse(picture)
    tab.open(picture.as_uri())
    assert tab.ask("document.querySelectorAll('.node').length") == 13
    assert tab.errors == []


def test_the_version_in_mlflow(seen: Seen, tab: Page) -> None:
    versions = LineVersions(registry_at(seen), seen.name)
    version = versions.one()
    page = versions.page(version)
    assert page is not None
    tab.open(page)
    text = tab.wait_text("Version 2", "parent_version", "merged one by one with opcm")
    for words in ("rot90 + invert", "update/", "head", "Source Run"):
        assert words in text, words
    shot(tab, "mlflow-version")


def test_the_run_in_mlflow_and_its_page_inside(seen: Seen, tab: Page) -> None:
    versions = LineVersions(registry_at(seen), seen.name)
    run = versions.run_page(versions.one())
    assert run is not None
    tab.open(run)
    text = tab.wait_text(f"{seen.name} 2: invert", "forgetting")
    assert seen.name in text
    shot(tab, "mlflow-run")
    tab.open(run.replace("?", f"/artifacts/{PAGE}?"))
    inside = tab.frame("From the base to this version")
    assert tab.ask("document.querySelectorAll('.canvas .node').length", inside) == 13
    assert f"{seen.name}@2" in str(tab.ask("document.body.innerText", inside))
    tab.ask("document.querySelector('.node.model').dispatchEvent(new MouseEvent('click'))", inside)
    assert tab.ask("document.querySelectorAll('.node.chosen').length", inside) == 1, "its script runs there too"
    shot(tab, "mlflow-artifact")


def test_links_of_the_page_lead_to_mlflow(seen: Seen, tab: Page, tmp_path: Path) -> None:
    """A page that is written where a server is known links every stage to its run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAWORKS_HOME", str(seen.home))
        patch.setenv("MLFLOW_TRACKING_URI", seen.address)
        found = CliRunner().invoke(app, ["lineage", seen.name, "--html", str(tmp_path / "page.html")])
    assert found.exit_code == 0, found.output
    tab.open((tmp_path / "page.html").as_uri())
    assert tab.ask("document.querySelectorAll('.address').length") == 0, "links work: no need to write them out"
    assert "lets no link out" not in str(tab.ask("document.body.innerText"))
    links = tab.ask("[...document.querySelectorAll('.nodes a[target]')].map(one => one.href)")
    runs = [one for one in links if "/runs/" in one]
    assert len(runs) == 2 * 5, "fine-tuned, update, compressed, state and model of both merges"
    tab.open(runs[0])
    tab.wait_text("fine_tune", "training_loss")


def test_links_inside_the_frame_of_mlflow_can_be_copied(seen: Seen, tab: Page) -> None:
    """MLflow's frame is sandboxed: nothing in it opens a window, or leads its page elsewhere."""
    registry = registry_at(seen)
    versions = LineVersions(registry, seen.name)
    version, store = versions.one(), ArtifactStore(open_objects(f"file://{seen.home}/store"))
    lineage = version_lineage(version, versions.all(), [], store, {version.number: versions.stage_pages(version)})
    RunFiles(registry, version.run_id).write("linked.html", page(lineage, Measures()))
    run = versions.run_page(version)
    assert run is not None
    tab.open(run.replace("?", "/artifacts/linked.html?"))
    inside = tab.frame("From the base to this version")
    beside = "[...document.querySelectorAll('a[target]')].map(one => [one.href, one.nextElementSibling.textContent])"
    found = tab.ask(beside, inside)
    assert len(found) > 5, "the version and the runs of its stages"
    assert all(address == text and address.startswith(seen.address) for address, text in found)
    assert "lets no link out of it" in str(tab.ask("document.body.innerText", inside))
    newest = "[...document.querySelectorAll('.node.model')].at(-1)"
    tab.ask(f"{newest}.dispatchEvent(new MouseEvent('click'))", inside)
    assert tab.ask("document.querySelector('#detail .address').textContent", inside).startswith(seen.address)
    mark = "getSelection().selectAllChildren(document.querySelector('.nodes .address')), getSelection().toString()"
    assert str(tab.ask(mark, inside)).startswith(seen.address)
    before = tab.tabs()
    tab.ask("document.querySelector('.nodes a[target]').click()", inside)
    time.sleep(0.5)
    assert tab.tabs() == before, "no window was opened: if MLflow allows it by now, the addresses may go"
    shot(tab, "mlflow-artifact-links")


def registry_at(seen: Seen) -> Registry:
    return Registry(seen.address, seen.home / "mlflow-artifacts")


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2, from 1 to 21."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
