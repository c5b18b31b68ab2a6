"""The webhook as a process: signed notices let it look at once; forged, doubled and large ones are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import requests
from starlette.testclient import TestClient

from flows.deliveries import Deliveries, signature
from flows.servers import LOOPBACK, free_port, start_mlflow
from flows.webhook import LARGEST, Ringing, endpoint
from flows.workplace import here
from storage.address import open_objects
from storage.queue import Queue
from storage.refs import CheckpointRef
from tests.flows.arrivals import LINE, open_line, tuned

SECRET = "a secret that only the tests know"
INBOX = "s3://models/inbox"


def post(to: Any, path: str, said: Any, **headers: str) -> Any:
    """Send a signed message, as a sender in any language would."""
    body = said if isinstance(said, bytes) else json.dumps(said).encode()
    found, moment = str(uuid4()), int(time.time())
    own = {
        "webhook-id": found,
        "webhook-timestamp": str(moment),
        "webhook-signature": signature(SECRET, found, moment, body),
        **headers,
    }
    return to(path, body, {name.replace("_", "-"): value for name, value in own.items()})


def arrived(bucket: str, key: str, event: str = "ObjectCreated:Put") -> dict[str, Any]:
    """What AWS says of a new object; MinIO writes `s3:` before the event."""
    return {"Records": [{"eventName": event, "s3": {"bucket": {"name": bucket}, "object": {"key": key}}}]}


@pytest.fixture
def bells() -> dict[str, Ringing]:
    return {INBOX: Ringing(), "models:/tuned": Ringing()}


@pytest.fixture
def client(bells: dict[str, Ringing]) -> TestClient:
    return TestClient(endpoint(bells, Deliveries([SECRET]), lambda text: None))


def sender(client: TestClient) -> Any:
    return lambda path, body, headers: client.post(path, content=body, headers=headers)


@pytest.mark.parametrize(
    ("path", "said", "status", "looking"),
    [
        ("/s3", arrived("models", "inbox/run+1/model.safetensors"), 202, [INBOX]),
        ("/s3", arrived("models", "inbox/run%2B1/_SUCCESS", "s3:ObjectCreated:CompleteMultipartUpload"), 202, [INBOX]),
        ("/s3", arrived("models", "inboxes/run/model.safetensors"), 200, []),
        ("/s3", arrived("others", "inbox/run/model.safetensors"), 200, []),
        ("/s3", arrived("models", "inbox/run/config.json", "ObjectRemoved:Delete"), 200, []),
        ("/s3", {"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "models"}, 200, []),
        ("/s3", {"Records": [{"eventName": "ObjectCreated:Put", "s3": {}}]}, 400, None),
        ("/s3", {"Records": "many"}, 400, None),
        ("/s3", b"[]", 400, None),
        ("/s3", b"[" * 100_000, 400, None),
        (
            "/mlflow",
            {"entity": "model_version", "action": "created", "data": {"name": "tuned"}},
            202,
            ["models:/tuned"],
        ),
        ("/mlflow", {"entity": "model_version", "action": "created", "data": {"name": "other"}}, 200, []),
        ("/mlflow", {"entity": "registered_model", "action": "created", "data": {"name": "tuned"}}, 200, []),
        ("/mlflow", {"entity": "model_version", "action": "created"}, 400, None),
    ],
)
def test_a_notice_lets_the_watcher_of_its_inbox_look(
    client: TestClient, bells: dict[str, Ringing], path: str, said: Any, status: int, looking: list[str] | None
) -> None:
    found = post(sender(client), path, said)
    assert (found.status_code, found.json().get("looking")) == (status, looking), found.json()
    for address, bell in bells.items():
        assert bell._rung.is_set() == (address in (looking or []))


def test_what_is_forged_or_too_large_is_refused(client: TestClient, bells: dict[str, Ringing]) -> None:
    said = arrived("models", "inbox/run/model.safetensors")
    assert post(sender(client), "/s3", said, webhook_signature="v1,AAAA").status_code == 401
    assert client.post("/s3", json=said).status_code == 401
    assert post(sender(client), "/s3", b" " * (LARGEST + 1)).status_code == 413
    assert client.post("/s3", content=iter([b" " * LARGEST, b" "])).status_code == 413  # its length is not announced
    assert client.post("/s3", content=b"", headers={"content-length": "-1"}).status_code == 413
    assert client.get("/s3").status_code == 405
    assert client.get("/health").json() == {"status": "ok"}
    assert not any(bell._rung.is_set() for bell in bells.values())


def test_a_notice_comes_once(client: TestClient) -> None:
    body, found, moment = json.dumps(arrived("models", "inbox/a/_SUCCESS")).encode(), "twice", int(time.time())
    names = ("webhook-id", "webhook-timestamp", "webhook-signature")
    headers = dict(zip(names, (found, str(moment), signature(SECRET, found, moment, body)), strict=True))
    answers = [client.post("/s3", content=body, headers=headers).status_code for _ in range(3)]
    assert answers == [202, 409, 409]


class Process:
    """The command, running."""

    def __init__(self, folder: Path, inbox: str) -> None:
        file, self.log, port = folder / "webhook.secret", folder / "webhook.log", free_port()
        file.write_text(SECRET)
        self.url = f"http://{LOOPBACK}:{port}"
        command = [sys.executable, "-m", "flows.cli", "webhook", "--inbox", f"{LINE}={inbox}", "--every", "10m"]
        command += ["--secret-file", str(file), "--port", str(port)]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "PYTHONUNBUFFERED": "1"}
            )
        await_true(self.answers)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return requests.get(f"{self.url}/health", timeout=5).ok
        except requests.ConnectionError:
            return False

    def send(self, path: str, body: bytes, headers: dict[str, str]) -> requests.Response:
        return requests.post(f"{self.url}{path}", body, headers=headers, timeout=10)


def await_true(done: Any, patience: float = 60.0) -> None:
    deadline = time.monotonic() + patience
    while not done():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def queued() -> list[str]:
    return [one.task for one in Queue(here().store.objects, LINE).submissions()]


@pytest.fixture
def base(tmp_path: Path, home: Path) -> CheckpointRef:
    return open_line(tmp_path)


@pytest.fixture
def process(base: CheckpointRef, tmp_path: Path, s3_url: str) -> Iterator[Process]:
    started = Process(tmp_path, f"{s3_url}/inbox")
    try:
        yield started
    finally:
        started.process.terminate()
        started.process.wait(20)


def test_a_real_bucket_is_looked_at_when_a_notice_says_so(process: Process, tmp_path: Path, s3_url: str) -> None:
    """It looks every ten minutes otherwise. What is not complete is left until the next notice."""
    bucket, _, prefix = f"{s3_url}/inbox".removeprefix("s3://").partition("/")
    place = open_objects(f"{s3_url}/inbox/run-7")
    await_true(lambda: "watching" in process.log.read_text())
    time.sleep(1.0)  # the first look
    folder = tuned(tmp_path / "run-7", 1)
    place.put("model.safetensors", (folder / "model.safetensors").read_bytes())
    assert post(process.send, "/s3", arrived(bucket, f"{prefix}/run-7/model.safetensors")).status_code == 202
    await_true(lambda: "waits for config.json" in process.log.read_text())
    assert queued() == []
    place.put("config.json", (folder / "config.json").read_bytes())
    assert post(process.send, "/s3", arrived(bucket, f"{prefix}/run-7/config.json")).status_code == 202
    await_true(lambda: queued() == ["run-7"])
    assert post(process.send, "/s3", arrived(bucket, f"{prefix}/run-7/config.json")).status_code == 202
    time.sleep(0.5)
    assert queued() == ["run-7"]
    assert SECRET not in process.log.read_text()


def test_the_secret_must_be_there(base: CheckpointRef, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from flows.cli import app

    monkeypatch.delenv("DELTAWORKS_WEBHOOK_SECRET", raising=False)
    found = CliRunner().invoke(app, ["webhook", "--inbox", f"{LINE}=s3://models/inbox"])
    assert found.exit_code == 1 and "there is no secret to check signatures with" in found.stderr


@pytest.mark.slow
def test_mlflow_tells_of_a_new_version(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own server signs and sends; the files come by way of it."""
    from cryptography.fernet import Fernet
    from mlflow.entities.webhook import WebhookAction, WebhookEntity, WebhookEvent
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY", Fernet.generate_key().decode())
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http")
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    open_line(tmp_path)
    port = free_port()
    server = start_mlflow(here().settings, LOOPBACK, port)
    try:
        server.await_answer()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{LOOPBACK}:{port}")
        process = Process(tmp_path, "models:/tuned")
        try:
            await_true(lambda: "watching" in process.log.read_text())
            time.sleep(2.0)  # the first look
            client = MlflowClient(f"http://{LOOPBACK}:{port}")
            event = WebhookEvent(WebhookEntity.MODEL_VERSION, WebhookAction.CREATED)
            client.create_webhook("deltaworks", f"{process.url}/mlflow", [event], secret=SECRET)
            client.create_registered_model("tuned")
            run = client.create_run("0").info
            client.log_artifacts(run.run_id, str(tuned(tmp_path / "tuned", 1)), "model")
            client.create_model_version("tuned", f"{run.artifact_uri}/model", run.run_id)
            await_true(lambda: queued() == ["tuned-1"])
            assert "is about models:/tuned" in process.log.read_text()
        finally:
            process.process.terminate()
            process.process.wait(20)
    finally:
        server.stop()
