"""Deployed flows on real workers of a real Prefect server: every deployment once, and a machine that dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.commands.deploy import registered
from flows.notices import announce_waiting
from flows.pools import Pool
from flows.schedules import When
from flows.servers import LOOPBACK, Server, free_port, start_prefect, start_worker
from flows.workplace import here
from storage.lines import Line
from storage.queue import Queue
from tests.builders import random_tensors, update_of
from tests.flows.arrivals import LINE, open_line, submit, tuned

POOL = Pool("workers")
NEVER = When(merge_every=None, tidy_at=None)
PATIENCE = 400.0  # seconds; on a busy machine a run takes half a minute to begin

pytestmark = pytest.mark.slow


@pytest.fixture
def client(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    """A server of this test's own: its runs, and the events that it sends late, are nobody else's business."""
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.setenv("PREFECT_HOME", str(home / "prefect"))
    (home / "prefect").mkdir(parents=True)
    port = free_port()
    server = start_prefect(here().settings, LOOPBACK, port, ui=False)
    api = f"http://{LOOPBACK}:{port}/api"
    monkeypatch.setenv("PREFECT_API_URL", api)
    try:
        server.await_answer()
        with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as found:
            yield found
    finally:
        server.stop()


@pytest.fixture
def workers() -> Iterator[list[Server]]:
    """Whatever is put in here is ended, with its children."""
    found: list[Server] = []
    yield found
    for one in found:
        kill_all(one)


def work(workers: list[Server]) -> Server:
    found = start_worker(here().settings, os.environ["PREFECT_API_URL"], POOL.name, 2)
    workers.append(found)
    found.await_answer()
    return found


def kill_all(worker: Server) -> None:
    """What a machine that loses its power does: the worker and its runs are gone at once."""
    with suppress(psutil.Error):
        parent = psutil.Process(worker._child.pid)
        for one in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.Error):
                one.send_signal(signal.SIGKILL)
    worker._child.wait()


def run(client: SyncPrefectClient, deployment: str, **parameters: Any) -> str:
    """Start a deployment as a person at the form does; its final state and message."""
    found = client.read_deployment_by_name(deployment)
    started = client.create_flow_run_from_deployment(found.id, parameters=parameters)
    state = until(lambda: (now := client.read_flow_run(started.id).state) and now.is_final() and now)
    return f"{state.name}: {state.message}" if state.message else str(state.name)


def until(done: Callable[[], Any], patience: float = PATIENCE) -> Any:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if found := done():
            return found
        time.sleep(0.3)
    logs = "\n".join(path.read_text()[-4000:] for path in (here().settings.home / "logs").glob("worker*.log"))
    raise AssertionError(f"it did not happen in {patience:.0f} s\n{logs}")


def artifacts(client: SyncPrefectClient, key: str) -> list[str]:
    body = {"artifacts": {"key": {"any_": [key]}}}
    return [str(one["data"]) for one in client.request("POST", "/artifacts/filter", json=body).json()]


def test_every_deployment_runs(client: SyncPrefectClient, workers: list[Server], tmp_path: Path) -> None:
    line = "smoke-opcm"
    registered([line], {}, NEVER, POOL)
    work(workers)
    objects = here().store.objects

    assert run(client, "fine-tune-and-merge/store", config="smoke") == "Completed"
    assert [entry.task for entry in Line(objects, line).history()] == ["rot90", "invert", "permute"]

    assert run(client, f"evaluate-line/{line}", config="smoke") == "Completed"
    (table,) = artifacts(client, f"{line}-scores")
    assert all(task in table for task in ("rot90", "invert", "permute"))
    head = Line(objects, line).head()

    assert run(client, f"rebuild-line/{line}", drop=["invert"], why="it was trained on the wrong data") == "Completed"
    rebuilt = Line(objects, line).head()
    assert (rebuilt.action, rebuilt.why) == ("rebuild", "it was trained on the wrong data")
    assert [entry.task for entry in Line(objects, line).history()] == ["rot90", "permute"]
    said = run(client, f"rebuild-line/{line}", drop=["nobody"])
    assert said.startswith("Failed") and "nobody" in said

    before = set(here().store.refs())
    nobodys = update_of(random_tensors(7), head.base, here().store)
    assert run(client, "verify-and-prune/store") == "Completed"
    assert set(here().store.refs()) == before | {nobodys}
    assert run(client, "verify-and-prune/store", prune=True, grace_days=0.0) == "Completed"
    assert nobodys not in set(here().store.refs())
    assert here().store.has(rebuilt.state) and head.state is not None  # type: ignore[arg-type]
    blob = next(iter(objects.list("blob/")))
    objects.put(blob, b"spoiled")
    assert run(client, "verify-and-prune/store", prune=True).startswith("Failed")
    assert blob in artifacts(client, "damage")[0]


def test_a_schedule_merges_what_nobody_told_prefect_of(
    client: SyncPrefectClient, workers: list[Server], tmp_path: Path
) -> None:
    base = open_line(tmp_path)
    registered([LINE], {}, When(merge_every=10.0, tidy_at=None), POOL)
    queue = Queue(here().store.objects, LINE)
    submit(tuned(tmp_path / "one", 1), base)
    submit(tuned(tmp_path / "two", 2), base)
    work(workers)
    until(lambda: [one.state for one in queue.submissions()] == ["merged", "merged"])
    assert [entry.task for entry in Line(here().store.objects, LINE).history()] == ["one", "two"]
    runs = client.read_flow_runs()
    assert runs and all(one.auto_scheduled for one in runs), "the schedule started them, and nobody else"


def test_a_machine_that_dies_does_not_hold_the_line(
    client: SyncPrefectClient, workers: list[Server], tmp_path: Path
) -> None:
    """Nobody tells Prefect. Its automation misses the heartbeats, and the next run on another machine takes over."""
    base = open_line(tmp_path)
    registered([LINE], {}, NEVER, POOL, silent_for=45.0)
    queue = Queue(here().store.objects, LINE)
    first = work(workers)
    submit(tuned(tmp_path / "one", 1), base)
    announce_waiting(queue)
    until(lambda: queue.submissions()[0].state == "running")  # in its first seconds: hardly a heartbeat was sent
    kill_all(first)
    died = time.monotonic()
    (lost,) = client.read_flow_runs()
    assert lost.state_name == "Running"
    submit(tuned(tmp_path / "two", 2), base)
    announce_waiting(queue)
    work(workers)
    until(lambda: [one.state for one in queue.submissions()] == ["merged", "merged"])
    print(f"after {time.monotonic() - died:.0f} s the line had gone on")
    assert [entry.task for entry in Line(here().store.objects, LINE).history()] == ["one", "two"]
    now = client.read_flow_run(lost.id).state
    assert now is not None and (now.name, now.message) == ("Crashed", "Its process is gone")
    time.sleep(100)  # twice what a run may be silent: whoever has ended is left alone
    states = sorted(str(one.state_name) for one in client.read_flow_runs())
    assert states == ["Completed", "Crashed"]
