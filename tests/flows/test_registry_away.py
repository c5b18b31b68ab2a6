"""MLflow does not answer when a merge is registered: what was made is kept, and registered by the next run."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from rich.console import Console

from flows import policy, progress
from flows.chain import chain
from flows.launch import launch
from flows.service import merge_pending
from flows.workplace import here
from storage.errors import Unavailable
from storage.lines import Line
from tests.flows.arrivals import LINE, open_line, submit, tuned
from tests.flows.test_chain import Count
from tests.flows.test_gated_chain import gated

pytestmark = pytest.mark.usefixtures("prefect_server", "home")
AWAY = "http://127.0.0.1:9"
SAID = "could not be registered.* does not answer.*Nothing is lost.*the same command registers"


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "named", lambda step, name: step.with_options(task_run_name=name, retries=0))
    monkeypatch.setattr(policy, "RETRY_DELAYS", [])
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)


@pytest.mark.usefixtures("away")
def test_a_chain_registers_on_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = Count()
    progress.watch(watcher)
    config = gated(of_alone=None)
    name = config.lines[0].name
    with pytest.raises(Unavailable, match=SAID):
        chain(config)
    assert len(Line(here().store.objects, name).history()) == 1
    evaluated = [label for label in watcher.labels if "evaluate" in label]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    before = len(watcher.labels)
    (line,) = chain(config).lines
    assert [step.version.version for step in line.steps] == [1, 2, 3]
    again = [label for label in watcher.labels[before:] if "evaluate" in label]
    assert evaluated and not set(again) & set(evaluated), "nothing is evaluated twice"


def test_a_chain_without_its_summary_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow goes away after the last version."""
    monkeypatch.setattr(policy, "RETRY_DELAYS", [])
    config = gated(of_alone=None)
    chain(config)
    database = home / "mlflow.db"
    database.rename(home / "aside.db")
    database.mkdir()
    said = StringIO()
    assert launch(config, here(), Console(file=said, width=200), quiet=True).best.last.version.version == 3
    assert "note: the run with the summary is not in MLflow: " in said.getvalue()
    database.rmdir()
    (home / "aside.db").rename(database)
    said = StringIO()
    launch(config, here(), Console(file=said, width=200), quiet=True)
    assert "note" not in said.getvalue()
    client = MlflowClient(here().settings.tracking)
    experiment = client.get_experiment_by_name(config.name)
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id], "attributes.run_name = 'gated: summary'")) == 1


@pytest.mark.usefixtures("away")
def test_a_queue_registers_on_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_line(tmp_path)
    for seed, name in enumerate(["one", "two"], 1):
        submit(tuned(tmp_path / "inbox" / name, seed), base)
    for _ in range(2):
        with pytest.raises(Unavailable, match=SAID):
            merge_pending(LINE)
    assert [entry.task for entry in Line(here().store.objects, LINE).history()] == ["one"]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert merge_pending(LINE).versions == (1, 2)
    client = MlflowClient(here().settings.tracking)
    found = sorted(client.search_model_versions(f"name = '{LINE}'"), key=lambda one: int(one.version))
    assert [one.tags["task"] for one in found] == ["one", "two"]
