"""A checkpoint that was trained elsewhere goes through a chain like any other, and is marked wherever it is shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from configs.chain import load_chain
from flows.chain import chain
from flows.cli import app
from flows.workplace import here
from storage.index import index_file, indexed
from storage.inventory import updates
from storage.roots import read_journals
from tasks.export import export
from tasks.ingest import Checkpoint
from tasks.tensors import read_delta

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_a_checkpoint_trained_elsewhere_is_marked_external(home: Path, tmp_path: Path) -> None:
    config = load_chain("smoke")
    config = replace(config, tasks=config.tasks[:1], lines=config.lines[:1])
    trained = chain(config).prepared[0]
    store = here().store
    export(trained.tuned, tmp_path / "tuned", store)

    task = replace(config.tasks[0], tuner=None, checkpoint=Checkpoint(source=str(tmp_path / "tuned")))
    line = replace(config.lines[0], name="elsewhere")
    outcome = chain(replace(config, tasks=(task,), lines=(line,)))
    external, own = (store.open(one) for one in (outcome.prepared[0].update, trained.update))
    assert external.manifest.facts["external"] is True
    assert "external" not in own.manifest.facts
    for name in own.names:  # the same weights, the same update, the same form
        assert torch.equal(read_delta(external, name), read_delta(own, name))
        assert external.record(name) == own.record(name)
    assert external.manifest.lineage.spec == own.manifest.lineage.spec

    shown = CliRunner().invoke(app, ["show", external.ref]).output
    assert "fact external" in shown
    assert "external: trained elsewhere" in CliRunner().invoke(app, ["line", "show", "elsewhere"]).output
    assert "external" not in CliRunner().invoke(app, ["line", "show", config.lines[0].name]).output
    rows = indexed(store, index_file(tmp_path / "index", store.url)).rows
    table = updates(rows, read_journals(store.objects).lines).to_pylist()
    marked = {row["ref"]: row["external"] for row in table}
    assert marked[external.ref] is True and marked[own.ref] is False
    version = MlflowClient(here().settings.tracking).get_model_version_by_alias("elsewhere", "head")
    assert version.tags["external"] == "true" and "start" not in version.tags
