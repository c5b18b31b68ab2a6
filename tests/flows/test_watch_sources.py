"""Other sources of the watcher: a queue that speaks SQS lets it look at once; new versions of a registered model."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import boto3
import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from flows.cli import app
from flows.servers import LOOPBACK, free_port
from flows.watch import keep_watching
from flows.workplace import here
from storage.errors import InvalidInput, Unavailable
from storage.queue import Queue
from storage.refs import CheckpointRef
from storage.s3_queue import S3Queue
from tests.flows.arrivals import LINE, open_line, pickled, tuned

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def base(tmp_path: Path, home: Path) -> CheckpointRef:
    return open_line(tmp_path)


def tasks() -> list[str]:
    return [one.task for one in Queue(here().store.objects, LINE).submissions()]


@pytest.fixture
def sqs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a server on this machine that speaks SQS."""
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", LOOPBACK, "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://{LOOPBACK}:{port}"
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                with urlopen(f"{address}/moto-api/", timeout=2):
                    break
            except (URLError, OSError):
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield boto3.client("sqs", endpoint_url=address)
    finally:
        server.kill()
        server.wait()


def left(sqs: Any, url: str) -> int:
    """How many notices are waiting or being looked after."""
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    return sum(map(int, sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"].values()))


def test_a_notice_ends_the_waiting_and_is_removed_after_the_look(base: CheckpointRef, tmp_path: Path, sqs: Any) -> None:
    url = sqs.create_queue(QueueName="inbox")["QueueUrl"]
    inbox = tmp_path / "inbox"
    inbox.mkdir()

    def drop() -> None:
        tuned(inbox / "run-7", 1)
        for number in range(25):  # one for each file, as buckets do
            sqs.send_message(QueueUrl=url, MessageBody=f"file {number}")

    timer = threading.Timer(1.0, drop)
    timer.start()
    start = time.monotonic()
    seen: list[float] = []
    say = lambda text: seen.append(time.monotonic() - start) if text.startswith("queued") else None  # noqa: E731
    keep_watching(str(inbox), LINE, 8.0, say, lasting=16.0, once=False, bell=S3Queue(url))
    timer.join()
    assert tasks() == ["run-7"]
    assert seen[0] < 6.0, "it was seen at the next look, eight seconds later"
    assert left(sqs, url) == 0


def test_a_queue_that_is_away_does_not_stop_the_looking(base: CheckpointRef, tmp_path: Path, sqs: Any) -> None:
    inbox = tmp_path / "inbox"
    tuned(inbox / "run-1", 1)
    said: list[str] = []
    gone = S3Queue(f"http://{LOOPBACK}:{free_port()}/123456789012/inbox")
    with pytest.raises(Unavailable, match="does not answer"):
        gone.wait(0.1)
    assert keep_watching(str(inbox), LINE, 0.2, said.append, lasting=3.0, once=False, bell=gone) == 1
    assert sum("because the queue" in text for text in said) == 1
    with pytest.raises(InvalidInput, match=r"refused: .*NonExistentQueue"):
        S3Queue(sqs.create_queue(QueueName="a")["QueueUrl"] + "-none").wait(0.1)
    with pytest.raises(InvalidInput, match="is no address of a queue"):
        S3Queue("inbox")


def registered(folder: Path, name: str = "tuned") -> int:
    """A new version of a registered model whose files are in a folder of a run's artifacts."""
    client = MlflowClient(here().settings.tracking)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    experiment = client.get_experiment_by_name("others")
    place = (here().settings.home / "others").as_uri()
    number = experiment.experiment_id if experiment else client.create_experiment("others", artifact_location=place)
    run = client.create_run(number).info
    client.log_artifacts(run.run_id, str(folder), "model/inner")
    found = client.create_model_version(name, f"{run.artifact_uri}/model", run.run_id)
    return int(found.version)


def test_new_versions_of_a_registered_model_are_queued_once(base: CheckpointRef, tmp_path: Path) -> None:
    registered(tuned(tmp_path / "first", 1))
    registered(pickled(tmp_path / "pickled", 2))
    registered(tuned(tmp_path / "again", 1))
    command = ["watch", "models:/tuned", "--line", LINE, "--once"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.stderr
    assert "queued tuned-1 from checkpoint/" in found.output
    assert "nothing to do for models:/tuned/3: its content is tuned-1, pending" in found.output
    first, second = Queue(here().store.objects, LINE).submissions()
    assert here().store.has(first.reference)  # type: ignore[arg-type]
    assert (second.task, second.state) == ("tuned-2", "quarantined")
    assert "pickles" in second.why and second.reference == "models:/tuned/2" and "/tmp" not in second.why
    registered(tuned(tmp_path / "third", 3))
    assert "queued tuned-4" in CliRunner().invoke(app, command).output
    assert "0 queued" in CliRunner().invoke(app, command).output
    assert tasks() == ["tuned-1", "tuned-2", "tuned-4"]


def test_versions_of_our_own_and_models_that_are_none(base: CheckpointRef, tmp_path: Path) -> None:
    """A line that watched its own model would merge what it merged for ever."""
    number = registered(tuned(tmp_path / "own", 1), "own")
    MlflowClient(here().settings.tracking).set_model_version_tag("own", str(number), "deltaworks.key", "k")
    assert "0 queued" in CliRunner().invoke(app, ["watch", "models:/own", "--line", LINE, "--once"]).output
    assert "0 queued" in CliRunner().invoke(app, ["watch", "models:/none", "--line", LINE, "--once"]).output
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no weights")
    registered(empty, "bare")
    said = CliRunner().invoke(app, ["watch", "models:/bare", "--line", LINE, "--once"]).output
    assert "models:/bare/1 is left alone: models:/bare/1 must hold one folder with weights, found none" in said
    wrong = CliRunner().invoke(app, ["watch", "models:/own/3", "--line", LINE, "--once"])
    assert wrong.exit_code == 1 and "is no registered model" in wrong.stderr
