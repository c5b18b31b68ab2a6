"""Services that go away in the middle of a merge and come back: the line ends in the same state, by itself."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient

from flows import policy
from flows.servers import LOOPBACK, Server, free_port, start_mlflow
from flows.service import merge_pending
from flows.workplace import here
from storage.errors import Unavailable
from storage.lines import Line
from storage.queue import Queue
from storage.refs import CheckpointRef
from tests.flows.arrivals import LINE, open_line, submit, tuned
from tests.flows.test_pending import by_hand
from tests.storage.s3_faults import hang_up, relay

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("prefect_server", "home"),
    pytest.mark.filterwarnings("ignore:.*is_gradient"),
]
TASKS = ["one", "two", "three"]


class Mlflow:
    """MLflow's server on a port of its own, that can be killed and started again."""

    def __init__(self, home: Path) -> None:
        self.port = free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"
        self._settings = here().settings
        self._server: Server | None = None
        self.start()

    def start(self) -> None:
        self._server = start_mlflow(self._settings, LOOPBACK, self.port)
        self._server.await_answer()

    def kill(self) -> None:
        assert self._server is not None
        with suppress(psutil.Error):  # its workers first: they would go on answering for a while without it
            for one in psutil.Process(self._server._child.pid).children(recursive=True):
                with suppress(psutil.Error):
                    one.kill()
        self._server._child.kill()
        self._server._child.wait()
        deadline = time.monotonic() + 20  # its own children notice, and free the port
        while free_port(LOOPBACK, self.port) != self.port and time.monotonic() < deadline:
            time.sleep(0.2)


def submit_all(base: CheckpointRef, folder: Path) -> None:
    for seed, name in enumerate(TASKS, 1):
        submit(tuned(folder / "inbox" / name, seed), base)


def check_end(folder: Path) -> None:
    """Whatever happened: three merges in their order, the states of a line that was left alone, three versions."""
    history = Line(here().store.objects, LINE).history()
    assert [entry.task for entry in history] == TASKS
    assert [str(entry.state) for entry in history] == by_hand(folder, [1, 2, 3])
    assert Line(here().store.objects, LINE).head().number == 3
    assert {one.state for one in Queue(here().store.objects, LINE).submissions()} == {"merged"}
    client = MlflowClient(here().settings.tracking)
    found = sorted(client.search_model_versions(f"name = '{LINE}'"), key=lambda one: int(one.version))
    assert [one.tags["task"] for one in found] == TASKS


def when_merged(count: int, then: Callable[[], None]) -> threading.Thread:
    """Do something as soon as so many are in the line."""

    def watch() -> None:
        line = Line(here().store.objects, LINE)
        while line.head().number < count:
            time.sleep(0.02)
        then()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_mlflow_is_away_for_as_long_as_steps_are_tried_again(
    tmp_path: Path, s3_url: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTAWORKS_STORE", s3_url)
    mlflow = Mlflow(home)
    back, over = threading.Event(), threading.Event()
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow.url)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        base = open_line(tmp_path)
        submit_all(base, tmp_path)

        def gap() -> None:
            mlflow.kill()
            time.sleep(8)
            mlflow.start()
            back.set()
            over.wait()  # a server ends with the thread that started it

        when_merged(2, gap)
        _until_done(lambda: merge_pending(LINE))
        assert back.wait(60)
        _until_done(lambda: merge_pending(LINE))
        check_end(tmp_path)
    finally:
        over.set()
        mlflow.kill()


def test_mlflow_is_away_for_longer(tmp_path: Path, s3_url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run gives up; the next one, that the schedule starts when MLflow is back, does the rest."""
    monkeypatch.setenv("DELTAWORKS_STORE", s3_url)
    monkeypatch.setattr(policy, "named", lambda step, name: step.with_options(task_run_name=name, retries=0))
    monkeypatch.setattr(policy, "RETRY_DELAYS", [])
    mlflow = Mlflow(home)
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow.url)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        base = open_line(tmp_path)
        submit_all(base, tmp_path)
        watching = when_merged(1, mlflow.kill)
        with pytest.raises(Unavailable):
            merge_pending(LINE)
        watching.join()
        for _ in range(2):
            with pytest.raises(Unavailable):
                merge_pending(LINE)
        states = [one.state for one in Queue(here().store.objects, LINE).submissions()]
        assert states[0] == "merged" and set(states[1:]) <= {"pending", "merged"}
        mlflow.start()
        merge_pending(LINE)
        check_end(tmp_path)
    finally:
        mlflow.kill()


def test_the_store_is_away(tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer from it for a while, from the second merge on."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    with relay(endpoint, hang_up, matches=lambda request: False, always=True) as (address, found):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("DELTAWORKS_STORE", s3_url)
        base = open_line(tmp_path)
        submit_all(base, tmp_path)

        def gap() -> None:
            found.matches = lambda request: True
            time.sleep(10)
            found.matches = lambda request: False

        watching = when_merged(1, gap)
        _until_done(lambda: merge_pending(LINE))
        watching.join()
        _until_done(lambda: merge_pending(LINE))
        check_end(tmp_path)


def _until_done(start: Callable[[], object], patience: float = 180.0) -> None:
    """What a schedule does: start a run again and again. On a busy machine MLflow takes half a minute to start."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            start()
        except Unavailable:
            time.sleep(3)
        else:
            return
    raise AssertionError("no run came to its end")
