"""The whole service as real processes: `deltaworks up`, checkpoints dropped into a folder, versions that come of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest
from mlflow.tracking import MlflowClient

from flows.servers import LOOPBACK, free_port
from flows.workplace import here
from storage.lines import Line
from storage.queue import Queue
from tests.flows.arrivals import LINE, open_line, pickled, tuned

PATIENCE = 300.0  # seconds; on a busy machine a run takes half a minute to begin


class Service:
    """A service under test: its process, its inbox, its Prefect."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.inbox = folder, folder / "inbox"
        self.log = folder / "up.log"
        port = free_port()
        self.api = f"http://{LOOPBACK}:{port}/api"
        command = [sys.executable, "-m", "flows.cli", "up", "--inbox", f"{LINE}={self.inbox}", "--merge-every", "never"]
        command += ["--prefect-port", str(port), "--mlflow-port", str(free_port())]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        until(lambda: "ready;" in self.log.read_text(), self)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def runs(self) -> list[dict[str, Any]]:
        """Runs that a checkpoint started, oldest first."""
        body = json.dumps({"flows": {"name": {"any_": ["ingest-checkpoint"]}}, "sort": "START_TIME_ASC"}).encode()
        request = Request(f"{self.api}/flow_runs/filter", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=30) as answer:
            found: list[dict[str, Any]] = json.load(answer)
        return found

    def drop(self, source: Path, name: str) -> float:
        """Copy a checkpoint into the inbox, file by file; when the last one was there."""
        shutil.copytree(source, self.inbox / name)
        return time.time()

    def stop(self) -> None:
        """What Ctrl-C does in a terminal."""
        left = self.children()
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(60) == 0, self.log.read_text()
        _, alive = psutil.wait_procs(left, 10)
        assert not alive, [one.cmdline() for one in alive]


def until(done: Callable[[], Any], service: Service) -> Any:
    """What `done` gives, once that is something."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := done():
            return found
        assert service.process.poll() is None, service.log.read_text()
        time.sleep(0.1)
    logs = "\n".join(path.read_text()[-3000:] for path in sorted((service.folder / "home" / "logs").glob("w*.log")))
    raise AssertionError(f"it did not happen in {PATIENCE:.0f} s\n{service.log.read_text()}\n{logs}")


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("DELTAWORKS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home" / "prefect"))
    open_line(tmp_path)
    started = Service(tmp_path)
    try:
        yield started
    finally:
        for child in (
            [*started.children(), psutil.Process(started.process.pid)] if started.process.poll() is None else []
        ):
            child.kill()


def merged() -> list[str]:
    return [one.task for one in Queue(here().store.objects, LINE).submissions() if one.state == "merged"]


def versions() -> list[str]:
    found = MlflowClient(here().settings.tracking).search_model_versions(f"name = '{LINE}'")
    return [one.tags["task"] for one in sorted(found, key=lambda one: int(one.version))]


@pytest.mark.slow
def test_what_is_dropped_into_the_inbox_becomes_a_version(service: Service, tmp_path: Path) -> None:
    """One after the other, and how long it takes; a bad one and a copy among them; then one Ctrl-C."""
    seen, waits, ends = [], [], []
    for seed in range(1, 6):
        dropped = service.drop(tuned(tmp_path / "source" / str(seed), seed), f"run-{seed}")
        run = until(lambda count=seed: started(service, count), service)  # type: ignore[misc]
        seen.append(moment(run["created"]) - dropped)
        waits.append(moment(run["start_time"]) - dropped)
        until(lambda count=seed: len(versions()) == count, service)  # type: ignore[misc]
        ends.append(time.time() - dropped)
    report("complete to run created", seen)
    report("complete to run started", waits)
    report("complete to new version", ends)
    service.drop(pickled(tmp_path / "source" / "bad", 6), "bad")
    service.drop(tmp_path / "source" / "1", "copy")
    service.drop(tuned(tmp_path / "source" / "7", 7), "run-7")
    wanted = [f"run-{seed}" for seed in (1, 2, 3, 4, 5, 7)]
    until(lambda: len(versions()) == 6, service)
    assert merged() == versions() == wanted
    assert [entry.task for entry in Line(here().store.objects, LINE).history()] == wanted
    bad = [one for one in Queue(here().store.objects, LINE).submissions() if one.state == "quarantined"]
    assert [(one.task, "pickles" in one.why) for one in bad] == [("bad", True)]
    service.stop()


@pytest.mark.slow
def test_a_worker_that_is_killed_and_a_restart_lose_nothing(service: Service, tmp_path: Path) -> None:
    """SIGKILL for the worker and its run in the middle of a merge; SIGKILL for the whole service; then it goes on."""
    service.drop(tuned(tmp_path / "source" / "1", 1), "run-1")
    until(lambda: versions() == ["run-1"], service)
    service.drop(tuned(tmp_path / "source" / "2", 2), "run-2")
    until(lambda: started(service, 2), service)
    _kill(service, "prefect worker", "prefect.engine")  # the worker first: it would note the end of its run
    until(lambda: "worker ended, and is started again" in service.log.read_text(), service)
    service.drop(tuned(tmp_path / "source" / "3", 3), "run-3")
    until(lambda: versions() == ["run-1", "run-2", "run-3"], service)
    everybody = service.children()
    service.process.kill()
    _, alive = psutil.wait_procs(everybody, 30)
    assert not alive, [one.cmdline() for one in alive]
    shutil.copytree(tuned(tmp_path / "source" / "4", 4), service.inbox / "run-4")
    again = Service(tmp_path)
    until(lambda: versions() == ["run-1", "run-2", "run-3", "run-4"], again)
    assert merged() == versions()
    again.stop()


def _kill(service: Service, *words: str) -> None:
    """SIGKILL for the children whose commands hold the first of these words, then the second."""
    commands = {}
    for one in service.children():
        with suppress(psutil.Error):  # it ended in this moment
            commands[one] = " ".join(one.cmdline())
    found = [[one for one, command in commands.items() if word in command] for word in words]
    assert all(found), commands
    for one in (one for some in found for one in some):
        with suppress(psutil.Error):
            one.kill()


def started(service: Service, count: int) -> dict[str, Any] | None:
    """The run of that number, once it has begun."""
    found = service.runs()[count - 1 :]
    return found[0] if found and found[0]["start_time"] else None


def moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def report(what: str, seconds: list[float]) -> None:
    rounded = ", ".join(f"{one:.1f}" for one in seconds)
    print(f"{what}: median {statistics.median(seconds):.1f} s of {rounded}")
