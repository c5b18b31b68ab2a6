"""The chain under a real Prefect server, with MLflow on SQLite and a store on disk and on S3."""

from __future__ import annotations

import io
import os
import socket
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import torch
from mlflow.tracking import MlflowClient
from rich.console import Console
from rich.table import Table
from transformers import AutoModel

from configs.chain import ChainConfig, load_chain
from flows import progress, steps
from flows.chain import Outcome, chain, count_steps
from flows.report import accuracy_table, comparison_table
from flows.workplace import here
from storage.errors import Conflict, Missing
from storage.lines import Line
from storage.refs import Ref, StateRef, UpdateRef
from storage.verify import verify
from tasks.checkpoints import load_model
from tasks.codecs import Ternary
from tasks.evaluate import leading
from tasks.export import export
from tasks.materialize import materialize
from tasks.mergers import Average, Opcm
from tasks.recipe import Recipe
from tasks.search import Search
from tasks.tensors import read_tensor

pytestmark = pytest.mark.usefixtures("prefect_server")


class Count:
    """A watcher that counts."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.reused_labels: list[str] = []
        self.waits: list[str] = []

    def started(self, label: str) -> None:
        pass

    def advanced(self, label: str, done: int, total: int, note: str) -> None:
        pass

    def finished(self, label: str) -> None:
        self.labels.append(label)

    def reused(self, label: str) -> None:
        self.reused_labels.append(label)

    def waiting(self, label: str, why: str) -> None:
        self.waits.append(why)


@pytest.fixture
def count() -> Count:
    watcher = Count()
    progress.watch(watcher)
    return watcher


def short_chain() -> ChainConfig:
    """Two tasks into one line."""
    config = load_chain("smoke")
    return replace(config, tasks=config.tasks[:2], lines=config.lines[:1])


def refs(outcome: Outcome) -> list[str]:
    return [ref for line in outcome.lines for step in line.steps for ref in (step.entry.state, step.model, step.scores)]


@pytest.mark.usefixtures("home")
def test_chain_runs_once_and_then_finds_everything_done(count: Count, tmp_path: Path) -> None:
    config = load_chain("smoke")
    first = chain(config)
    assert len(first.prepared) == 3
    assert [len(line.steps) for line in first.lines] == [3, 3]
    assert count.labels and not count.reused_labels

    done = len(count.labels)
    second = chain(config)
    assert len(count.labels) == done, f"done again: {count.labels[done:]}"
    # commits of a journal are no step of a second run, because the entries are there
    assert len(count.reused_labels) == done - sum("commit" in label for label in count.labels)
    assert refs(second) == refs(first)
    assert [line.last.version.version for line in second.lines] == [3, 3]

    store = here().store
    assert not verify(store, store.refs()).findings
    folder = tmp_path / "model"
    export(first.best.last.model, folder, store)
    _, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.usefixtures("home", "count")
def test_registry_tells_where_a_version_comes_from() -> None:
    config = short_chain()
    outcome = chain(config)
    place = here()
    client = MlflowClient(place.settings.tracking)
    last = outcome.lines[0].last
    version = client.get_model_version_by_alias(config.lines[0].name, "head")
    assert int(version.version) == last.version.version == 2
    assert version.tags["weights"] == place.store.address(last.model)
    assert version.tags["base"] == outcome.base
    assert version.tags["state"] == last.entry.state
    assert version.tags["parent_version"] == "1"
    assert version.tags["update"] == outcome.prepared[-1].update
    assert '"name":"opcm"' in version.tags["merger"]

    experiment = client.get_experiment_by_name(config.name)
    parent = client.get_run(version.run_id)
    assert parent.data.metrics["average"] == pytest.approx(last.summary.average)
    children = client.search_runs(
        [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{version.run_id}'", max_results=20
    )
    stages = {run.data.tags["stage"] for run in children}
    assert stages == {"fine_tune", "extract", "compress", "fold", "materialize", "evaluate"}
    scores = next(run for run in children if run.data.tags["stage"] == "evaluate")
    leads = leading(place.store.open(last.scores))
    assert {name: scores.data.metrics[name] for name in leads} == pytest.approx(leads)
    assert f"{last.entry.task}.calibration_error" in scores.data.metrics
    tuned = next(run for run in children if run.data.tags["stage"] == "fine_tune")
    assert len(client.get_metric_history(tuned.info.run_id, "training_loss")) > 3
    assert tuned.data.metrics["seconds"] > 0 and tuned.data.tags["device"] == place.settings.device
    kept = {file.path for file in client.list_artifacts(version.run_id)}
    assert kept >= {"lineage.html", "lineage.svg"}
    beside = set(version.tags["measured"].split())
    (ahead,) = beside - {outcome.base_scores, outcome.prepared[-1].alone}
    assert place.store.open(ahead).manifest.lineage.inputs["model"] == outcome.lines[0].steps[0].model
    assert list(leading(place.store.open(ahead))) == [outcome.prepared[-1].task.name]


@pytest.mark.usefixtures("home", "count")
def test_two_homes_give_the_same_refs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here_refs = refs(chain(short_chain()))
    monkeypatch.setenv("DELTAWORKS_HOME", str(tmp_path / "elsewhere"))
    assert refs(chain(short_chain())) == here_refs


@pytest.mark.usefixtures("home")
def test_a_new_task_extends_the_line(count: Count) -> None:
    config = load_chain("smoke")
    chain(replace(config, tasks=config.tasks[:2]))
    done = len(count.labels)
    longer = chain(config)
    new = count.labels[done:]
    assert {label.rsplit(" ", 1)[-1] for label in new if "alone" not in label and "base" not in label} == {"permute"}
    line = Line(here().store.objects, config.lines[0].name)
    assert [entry.task for entry in line.history()] == ["rot90", "invert", "permute"]
    assert longer.lines[0].last.version.version == 3


def searching(*factors: float) -> ChainConfig:
    """Two tasks into one line that searches among these factors."""
    config = short_chain()
    line = replace(config.lines[0], merger=Average(), search=Search(factors=factors, samples=50))
    return replace(config, lines=(line,))


def printed(table: Table) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def cells(table: Table, header: str) -> list[Any]:
    return next(list(column.cells) for column in table.columns if column.header == header)


@pytest.mark.usefixtures("home")
def test_a_search_chooses_how_much_is_written(tmp_path: Path, count: Count) -> None:
    """The factor of every step is in the journal, and what is exported is what was evaluated."""
    config = searching(0.5, 1.0, 3.0)
    outcome = chain(config)
    assert len(count.labels) == count_steps(config)
    grown, store = outcome.lines[0], here().store
    searches = {
        str(one.manifest.lineage.inputs["state"]): one.manifest.facts
        for one in (store.open(ref) for ref in store.refs("scores"))
        if one.manifest.lineage.step == "search"
    }
    for step in grown.steps:
        facts = searches[str(step.entry.state)]
        assert step.entry.factor == facts["factor"]
        assert max(facts["means"].values()) == facts["means"][repr(step.entry.factor)]
    last = grown.last
    assert last.entry.factor != 1
    assert last.entry == Line(store.objects, grown.name).head()

    export(steps.head_model(grown.name), tmp_path / "model", store)
    written, kept = AutoModel.from_pretrained(tmp_path / "model").state_dict(), load_model(store.open(last.model))
    assert all(torch.equal(tensor, kept.state_dict()[name]) for name, tensor in written.items())
    base, evaluated, unscaled = map(
        store.open, (outcome.base, last.model, materialize(outcome.base, last.entry.state, store))
    )
    moved = 0
    for name in evaluated.names:
        at_base, found, plain = (read_tensor(one, name) for one in (base, evaluated, unscaled))
        torch.testing.assert_close(found - at_base, last.entry.factor * (plain - at_base), rtol=0, atol=1e-6)
        moved += not torch.equal(found, plain)
    assert moved

    version = MlflowClient(here().settings.tracking).get_model_version_by_alias(grown.name, "head")
    assert (version.tags["weights"], version.tags["factor"]) == (store.address(last.model), f"{last.entry.factor:g}")
    assert cells(comparison_table(outcome), "factor") == [f"{last.entry.factor:g}"]
    assert cells(accuracy_table(outcome, grown), f"+{last.entry.task}")[-1] == f"{last.entry.factor:g}"
    assert not verify(store, store.refs()).findings

    done = len(count.labels)
    again = chain(config)
    assert count.labels[done:] == []
    assert refs(again) == refs(outcome)


@pytest.mark.usefixtures("home")
def test_what_is_merged_keeps_its_factor_until_it_is_rolled_back(count: Count) -> None:
    """A search that came later, or changed, is for later merges; from step 0 it is done for all, and nothing merged."""
    plain = replace(config := searching(3.0), lines=(replace(config.lines[0], search=None),))
    first = chain(plain)
    done = len(count.labels)
    assert refs(chain(config)) == refs(first)
    assert count.labels[done:] == []
    line = Line(here().store.objects, config.lines[0].name)
    line.rollback(next(line.entries()), "search for all")
    searched = chain(config)
    kinds = {label.split()[1] for label in count.labels[done:]}
    assert kinds == {"search", "commit", "write", "evaluate", "register"}
    assert [entry.factor for entry in line.history()] == [3.0, 3.0]
    assert [step.entry.state for step in searched.lines[0].steps] == [step.entry.state for step in first.lines[0].steps]
    assert searched.lines[0].last.model != first.lines[0].last.model
    for other in (plain, searching(2.0)):
        assert refs(chain(other)) == refs(searched)

    task = load_chain("smoke").tasks[2]
    longer = chain(replace(searching(2.0), tasks=(*config.tasks, task)))
    assert [step.entry.factor for step in longer.lines[0].steps] == [3.0, 3.0, 2.0]


@pytest.mark.usefixtures("home", "count")
def test_a_search_that_finds_one_is_as_if_there_were_none() -> None:
    plain = replace(config := searching(1.0), lines=(replace(config.lines[0], name="plain", search=None),))
    outcome = chain(replace(config, lines=(*plain.lines, *config.lines)))
    assert refs(replace(outcome, lines=outcome.lines[:1])) == refs(replace(outcome, lines=outcome.lines[1:]))
    assert "factor" not in {column.header for column in comparison_table(outcome).columns}


@pytest.mark.usefixtures("home", "count")
def test_a_line_does_not_change_its_history() -> None:
    config = short_chain()
    chain(config)
    with pytest.raises(Conflict, match="already holds 'rot90'"):
        chain(replace(config, tasks=config.tasks[::-1]))
    other = replace(config, lines=(replace(config.lines[0], merger=Opcm(alpha=0.25)),))
    with pytest.raises(Conflict, match=r"merges with .*'alpha': 0\.5.*rebuild smoke-opcm --set alpha=0\.25"):
        chain(other)


@pytest.mark.usefixtures("home")
def test_a_merge_that_comes_in_between_is_not_lost(count: Count) -> None:
    """Somebody else commits to the line after this chain has folded, and before it commits."""
    config = short_chain()
    store = here().store
    line = Line(store.objects, config.lines[0].name)
    theirs = UpdateRef(Ref(f"update/{'7' * 64}"))

    def interfere(label: str) -> None:
        if label.endswith("merge invert"):
            line.fold(line.head(), "theirs", theirs, StateRef(Ref(f"state/{'7' * 64}")))

    count.finished = interfere  # type: ignore[method-assign]
    with pytest.raises(Conflict, match="entry 2 already holds update/7777"):
        chain(config)
    assert [entry.task for entry in line.history()] == ["rot90", "theirs"]


@pytest.mark.usefixtures("home", "count")
def test_a_rolled_back_line_goes_on_from_there() -> None:
    config = short_chain()
    outcome = chain(config)
    line = Line(here().store.objects, config.lines[0].name)
    line.rollback(line.history()[0], why="invert made it worse")
    again = chain(config)
    actions = [entry.action for entry in line.entries()]
    assert actions == ["open", "fold", "fold", "rollback", "fold"]
    assert again.lines[0].last.entry.state == outcome.lines[0].last.entry.state


@pytest.mark.usefixtures("count")
def test_chain_on_s3(s3_url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk = refs(chain(short_chain()))
    monkeypatch.setenv("DELTAWORKS_STORE", s3_url)
    assert refs(chain(short_chain())) == on_disk
    store = here().store
    assert store.url.startswith("s3://")
    assert not verify(store, store.refs()).findings


@pytest.mark.usefixtures("home")
def test_wrong_input_is_not_retried(count: Count) -> None:
    config = short_chain()
    base = chain(config).base
    state = steps.fold(base, None, UpdateRef(Ref(f"update/{'0' * 64}")), Recipe(Average()), 1.0, return_state=True)
    assert state.is_failed()
    assert count.waits == []
    with pytest.raises(Missing, match="update/0000"):
        state.result()


@pytest.mark.usefixtures("home")
def test_an_unavailable_store_is_retried(s3_url: str, count: Count, monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint is dead when the step begins, and comes back while it is being retried."""
    config = short_chain()
    monkeypatch.setenv("DELTAWORKS_STORE", s3_url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    update = chain(config).prepared[0].update
    with Relay(os.environ["AWS_ENDPOINT_URL"]) as relay:
        # another prefix of the address opens another client, through the relay that is still closed
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.url)
        monkeypatch.setenv("DELTAWORKS_STORE", f"{s3_url}/")
        threading.Timer(2.0, relay.open).start()
        again = steps.compress(update, Ternary(density=0.1))
    assert again != update
    assert count.waits


class Relay:
    """Forwards a local port to a server, once it is opened; until then connections are refused."""

    def __init__(self, target: str) -> None:
        address = urlparse(target)
        self._target = (address.hostname or "", address.port or 80)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._port = self._socket.getsockname()[1]
        self._socket.close()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def open(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", self._port))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._socket.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
