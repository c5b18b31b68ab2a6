"""The graph in Mermaid's language, read by Mermaid itself in a real browser.

DELTAWORKS_MERMAID names its file, which is in no Python package: `npm pack mermaid@11`, then
package/dist/mermaid.min.js of the archive.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest

from tasks.lineage.mermaid import mermaid
from tasks.lineage.nodes import Lineage
from tasks.lineage.scored import Scored
from tasks.lineage.versions import entry_lineage
from tests.builders import memory_store
from tests.flows.devtools import Page, browser, found_browser
from tests.tasks.lineage_case import Grown

BROWSER, MERMAID = found_browser(), os.environ.get("DELTAWORKS_MERMAID", "")
HOSTILE = '</script>"]; click n0 href "javascript:alert(1)" %% `end` #quot; é 東京 | subgraph'
LINK = 'http://mlflow/#/runs/a?b=1&c="; d'
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None or not MERMAID, reason="needs Chromium, and DELTAWORKS_MERMAID=mermaid.min.js"),
]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert BROWSER is not None
    blank = tmp_path_factory.mktemp("mermaid") / "page.html"
    blank.write_text("<!doctype html><meta charset=utf-8><title>Mermaid</title><div id=drawn></div>")
    with browser(BROWSER) as page:
        page.open(blank.as_uri())
        page.ask(f"{Path(MERMAID).read_text()}\n;mermaid.initialize({{startOnLoad: false}})")
        yield page


def drawn(tab: Page, text: str) -> list[str]:
    """The texts of the nodes that Mermaid draws."""
    draw = (
        f"mermaid.render('graph', {json.dumps(text)}).then(one => document.getElementById('drawn').innerHTML = one.svg)"
    )
    tab.ask(f"{draw}.then(() => true)")
    return [str(one) for one in tab.ask("[...document.querySelectorAll('#drawn .node')].map(one => one.textContent)")]


@pytest.fixture(scope="module")
def lineage() -> Lineage:
    grown = Grown(memory_store())
    return entry_lineage(grown.name, grown.entries, grown.store, Scored.everything(grown.store))


def test_mermaid_draws_every_node_and_edge(tab: Page, lineage: Lineage) -> None:
    texts = drawn(tab, mermaid(lineage))
    assert len(texts) == len(lineage.nodes)
    assert all(any(node.title in text for text in texts) for node in lineage.nodes)
    assert tab.ask("document.querySelectorAll('#drawn .edgePaths path').length") == len(lineage.edges)


def test_mermaid_takes_any_name_as_a_name(tab: Page, lineage: Lineage) -> None:
    named = tuple(replace(node, title=HOSTILE, links={"run": LINK}) for node in lineage.nodes)
    texts = drawn(tab, mermaid(replace(lineage, nodes=named)))
    assert len(texts) == len(lineage.nodes) and all(" ".join(HOSTILE.split()) in text for text in texts)
    links = tab.ask("[...document.querySelectorAll('#drawn a')].map(one => one.getAttribute('xlink:href') || one.href)")
    assert {unquote(one) for one in links} == {LINK}
