"""The registry on a real MLflow over SQLite: written once, completed after a crash, first starts in a race."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from storage.errors import InvalidInput, Unavailable
from storage.refs import KINDS, Ref
from storage.registry import DataInput, Registry, Stage

STEP = Stage("a-line", "checkpoint/1", {"merger": {"name": "opcm", "alpha": 0.5}}, {"average": 0.5}, tags={"step": "1"})
STAGES = [
    Stage("fold", "state/1", {"alpha": 0.5}, {"norm": 2.0}),
    Stage("evaluate", "scores/1", {}, {"task": 0.5}, {"curve": [(1, 0.1), (2, 0.2)]}),
]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "artifacts")


def client(registry: Registry) -> MlflowClient:
    return MlflowClient(registry.tracking)


def test_registering_twice_writes_once(registry: Registry) -> None:
    first = registry.register("chain", "k1", STEP, STAGES, "s3://bucket/checkpoint/1", "first")
    again = registry.register("chain", "k1", STEP, STAGES, "s3://bucket/checkpoint/1", "first")
    assert (first.version, first.fresh) == (1, True)
    assert (again.version, again.fresh, again.run_id) == (1, False, first.run_id)
    experiment = client(registry).get_experiment_by_name("chain")
    assert len(client(registry).search_runs([experiment.experiment_id])) == 1 + len(STAGES)


def test_head_is_the_newest_version(registry: Registry) -> None:
    registry.register("chain", "k1", STEP, STAGES, "s3://bucket/1", "")
    second = registry.register("chain", "k2", STEP, STAGES, "s3://bucket/2", "")
    registry.register("chain", "k1", STEP, STAGES, "s3://bucket/1", "")  # a look back does not move it
    head = client(registry).get_model_version_by_alias("a-line", "head")
    assert int(head.version) == second.version == 2
    assert head.source == "s3://bucket/2"
    assert registry.find("a-line", "k1") == 1
    assert registry.find("a-line", "k3") is None


def test_a_description_is_cut_to_what_mlflow_has_room_for(registry: Registry) -> None:
    """Postgres refuses a longer one; SQLite does not."""
    registry.register("chain", "k1", STEP, STAGES, "s3://bucket/1", "x" * 6000)
    assert client(registry).get_model_version("a-line", "1").description == "x" * 4999 + "…"


def test_a_half_written_step_is_completed(registry: Registry) -> None:
    """A crash after the runs were created, before they were filled and before the version."""
    there = client(registry)
    experiment = there.create_experiment("chain", artifact_location=None)
    started = there.create_run(experiment, tags={"deltaworks.key": "k1/step"})
    found = registry.register("chain", "k1", STEP, STAGES, "s3://bucket/1", "")
    assert found.run_id == started.info.run_id
    run = there.get_run(found.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"average": 0.5}
    assert run.data.params == {"merger.name": "opcm", "merger.alpha": "0.5"}


def test_series_become_metric_histories(registry: Registry) -> None:
    registry.register("chain", "k1", STEP, STAGES, "s3://bucket/1", "")
    experiment = client(registry).get_experiment_by_name("chain")
    run = next(
        one for one in client(registry).search_runs([experiment.experiment_id]) if one.data.tags["stage"] == "evaluate"
    )
    points = client(registry).get_metric_history(run.info.run_id, "curve")
    assert [(point.step, point.value) for point in points] == [(1, 0.1), (2, 0.2)]


def test_data_become_inputs_of_the_run(registry: Registry) -> None:
    data = DataInput("billing", "a1" * 32, {"name": "jsonl", "train": ["s3://bucket/x.jsonl"]}, {"examples": 7})
    stages = [Stage("fine_tune", "checkpoint/2", data=data)]
    for _ in range(2):
        registry.register("chain", "k1", STEP, stages, "s3://bucket/1", "")
    runs = client(registry).search_runs([client(registry).get_experiment_by_name("chain").experiment_id])
    (found,) = next(run.inputs.dataset_inputs for run in runs if run.data.tags["stage"] == "fine_tune")
    assert (found.dataset.name, found.dataset.digest) == ("billing", "a1" * 18)
    assert found.dataset.source_type == "deltaworks jsonl"
    assert json.loads(found.dataset.source)["train"] == ["s3://bucket/x.jsonl"]
    assert json.loads(found.dataset.profile) == {"examples": 7}
    tags = {tag.key: tag.value for tag in found.tags}
    assert tags == {"mlflow.data.context": "training", "sha256": "a1" * 32}


def test_four_processes_start_on_a_new_file(tmp_path: Path) -> None:
    start = f"Registry('sqlite:///{tmp_path}/new.db', Path())"
    code = f"from pathlib import Path; from storage.registry import Registry; {start}"
    children = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(4)]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors.decode()


def test_an_absent_server_is_unavailable_and_keeps_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(Unavailable) as caught:
        Registry("http://someone:pass-phrase@127.0.0.1:9", tmp_path)
    assert "MLflow at http://127.0.0.1:9 does not answer: NewConnectionError" in str(caught.value)
    assert "pass-phrase" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "said"), [(401, "wants to know who asks"), (403, "does not allow this to 'reader'")]
)
def test_a_server_that_wants_another_user_says_what_to_set(
    status: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands in front of MLflow, or its own authentication, answers so."""

    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_error(status)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pass-phrase")
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(InvalidInput, match=f"{said}.*Set MLFLOW_TRACKING_USERNAME and") as caught:
            Registry(f"http://127.0.0.1:{server.server_port}", tmp_path)
        server.shutdown()
    assert "pass-phrase" not in str(caught.value)


def test_refs_are_those_that_any_version_names(registry: Registry) -> None:
    """What a prune must keep: models, and what they were made of; not the beginnings of refs that people read."""
    assert registry.refs() == frozenset()
    named = {kind: Ref(f"{kind}/{letter * 64}") for kind, letter in zip(KINDS, "abcd", strict=True)}
    older = Ref(f"checkpoint/{'e' * 64}")
    tags = {"state": named["state"], "updates": f"update/{'f' * 12} {named['update']}", "scores": named["scores"]}
    registry.register("chain", "k1", STEP, STAGES, f"s3://bucket/{older}", "")
    step = Stage("b-line", named["checkpoint"], tags=tags)
    registry.register("chain", "k2", step, STAGES, f"file:///x/{named['checkpoint']}", "")
    assert registry.refs() == {*named.values(), older}
