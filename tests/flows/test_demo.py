"""The demo keeps its promises: six good models, and one merged model that is far better than their average."""

from __future__ import annotations

import pytest

from configs.chain import load_chain
from flows.chain import chain
from flows.workplace import here
from tasks.evaluate import leading


@pytest.mark.usefixtures("prefect_server", "home")
def test_demo() -> None:
    outcome = chain(load_chain("demo"))
    store = here().store
    base = leading(store.open(outcome.base_scores))
    alone = {one.task.name: leading(store.open(one.alone))[one.task.name] for one in outcome.prepared}
    average = {line.name: line.last.summary.average for line in outcome.lines}
    # the margins are those that held over seeds and orders when the benchmark was made
    assert sum(base.values()) / 6 <= 0.25, "the base must not know the tasks"
    assert min(alone.values()) >= 0.95
    assert average["demo-average"] <= 0.70, "the tasks must be in conflict"
    assert average["demo-opcm"] >= average["demo-average"] + 0.15
    assert average["demo-tsv"] >= average["demo-opcm"]
    assert outcome.best.name == "demo-tsv"
    for one in outcome.prepared:
        assert store.open(one.update).manifest.facts["ratio"] > 12
