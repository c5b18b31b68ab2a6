"""Deployments in a real Prefect server: what is registered, what an event starts, and that infra says the same."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL
from prefect.states import Pending, Running
from typer.testing import CliRunner

from flows.cli import app
from flows.commands.deploy import registered
from flows.deployments import give_up_lost, planned
from flows.notices import announce_waiting
from flows.pending import take_in
from flows.pools import Pool
from flows.schedules import When
from flows.workplace import here
from storage.queue import Queue
from storage.refs import CheckpointRef
from tests.flows.arrivals import open_line, tuned

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("prefect_server", "home")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> str:
    address = PREFECT_API_URL.value()
    assert address
    monkeypatch.setenv("PREFECT_API_URL", address)
    return address


def ask(path: str, body: dict[str, Any]) -> Any:
    with get_client(sync_client=True) as client:
        return client.request("POST", path, json=body).json()


def deployments(pool: str) -> dict[str, dict[str, Any]]:
    """What is registered for a pool, by full name, without what differs from one registration to the next."""
    flows = {one["id"]: one["name"] for one in ask("/flows/filter", {})}
    kept = ("entrypoint", "parameters", "tags", "work_queue_name", "parameter_openapi_schema", "job_variables")
    found = {}
    for one in ask("/deployments/filter", {}):
        if one["work_pool_name"] == pool:
            plain = {name: one[name] for name in kept}
            plain["schedules"] = [_plain(schedule["schedule"]) for schedule in one["schedules"]]
            plain["limit"] = (
                one["global_concurrency_limit"]["limit"],
                one["concurrency_options"]["collision_strategy"],
            )
            found[f"{flows[one['flow_id']]}/{one['name']}"] = plain
    return found


def _plain(schedule: dict[str, Any]) -> dict[str, Any]:
    return {name: schedule[name] for name in ("interval", "cron", "timezone") if schedule.get(name) is not None}


def automations(line: str) -> list[dict[str, Any]]:
    return [one for one in ask("/automations/filter", {}) if one["name"].endswith(f"for {line}")]


@pytest.mark.usefixtures("api")
def test_the_command_registers_what_a_line_needs(tmp_path: Path) -> None:
    open_line(tmp_path, "alpha")
    options = ["--pool", "pool-a", "--inbox", f"alpha={tmp_path}", "--merge-every", "15m", "--zone", "Europe/Berlin"]
    for _ in range(2):  # the second time it changes nothing
        found = CliRunner().invoke(app, ["deploy", "--line", "alpha", *options])
        assert found.exit_code == 0, found.stderr
    assert "merge-pending/alpha" in found.output and "every 900 s" in found.output
    registered = deployments("pool-a")
    assert set(registered) == {
        *(f"{flow}/alpha" for flow in ("ingest-checkpoint", "merge-pending", "rebuild-line", "evaluate-line", "watch")),
        "fine-tune-and-merge/store",
        "verify-and-prune/store",
    }
    merge = registered["merge-pending/alpha"]
    assert merge["entrypoint"] == "flows.service.merge_pending"
    assert (merge["parameters"], merge["limit"]) == ({"line": "alpha"}, (1, "ENQUEUE"))
    assert merge["schedules"] == [{"interval": 900.0, "timezone": "Europe/Berlin"}]
    assert merge["tags"] == ["deltaworks", "line:alpha"]
    assert registered["verify-and-prune/store"]["schedules"] == [{"cron": "0 3 * * 0", "timezone": "Europe/Berlin"}]
    for name, one in registered.items():
        for parameter, about in one["parameter_openapi_schema"]["properties"].items():
            assert about.get("description"), f"{name}: {parameter} is not described"
    assert len(automations("alpha")) == 1
    with get_client(sync_client=True) as client:
        assert client.read_work_queue_by_name("line-alpha", "pool-a").concurrency_limit == 1
        for which in ("without a heartbeat", "that never began"):
            assert len(client.read_automations_by_name(f"deltaworks: end runs {which}")) == 1


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--line", "none"], "there is no line 'none'"),
        (["--zone", "Mars/Olympus"], "no time zone"),
        (["--tidy-at", "daily"], "no cron expression"),
        (["--merge-every", "often"], "is no time"),
        (["--inbox", "alpha"], "LINE=ADDRESS"),
    ],
)
def test_mistakes_are_answered(options: list[str], said: str) -> None:
    found = CliRunner().invoke(app, ["deploy", *options])
    assert (found.exit_code, said in " ".join(found.stderr.split())) == (1, True), found.stderr


def test_without_a_server_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    found = CliRunner().invoke(app, ["deploy"])
    assert found.exit_code == 1 and "PREFECT_API_URL is not set" in found.stderr


@pytest.mark.usefixtures("api")
def test_an_event_starts_a_run_of_its_line_with_what_it_says(tmp_path: Path) -> None:
    base = open_line(tmp_path, "beta")
    registered(["beta", "gamma"], {}, When(merge_every=None, tidy_at=None), Pool("pool-b"))
    queue = Queue(here().store.objects, "beta")
    queue.submit("b" * 64, "s3://models/inbox/run", base, "run", 2.5)
    assert announce_waiting(queue) == 1
    assert announce_waiting(queue) == 0
    (run,) = await_runs("ingest-checkpoint", "beta")
    assert run["parameters"] == {
        "line": "beta", "reference": "s3://models/inbox/run", "base": base, "content": "b" * 64, "task": "run",
        "weight": 2.5,
    }  # fmt: skip
    assert run["work_queue_name"] == "line-beta"
    assert await_runs("ingest-checkpoint", "gamma", 0.5) == []


def await_runs(flow: str, deployment: str, patience: float = 40) -> list[dict[str, Any]]:
    deadline = time.monotonic() + patience
    found: list[dict[str, Any]] = []
    while not found and time.monotonic() < deadline:
        time.sleep(0.2)
        wanted = {"flows": {"name": {"any_": [flow]}}, "deployments": {"name": {"any_": [deployment]}}}
        found = ask("/flow_runs/filter", wanted)
    return found


def test_runs_of_a_machine_that_went_down_are_ended(api: str) -> None:
    """What waits is left alone, and so is what another pool runs."""
    registered(["zeta"], {}, When(merge_every=None, tidy_at=None), Pool("pool-c"))
    registered(["eta"], {}, When(merge_every=None, tidy_at=None), Pool("pool-d"))
    with get_client(sync_client=True) as client:
        runs = []
        for name, state in (("zeta", Running()), ("zeta", Pending()), ("zeta", None), ("eta", Running())):
            deployment = client.read_deployment_by_name(f"rebuild-line/{name}")
            run = client.create_flow_run_from_deployment(deployment.id)
            if state is not None:
                client.set_flow_run_state(run.id, state, force=True)
            runs.append(run.id)
        assert give_up_lost(client, "pool-c") == 2
        assert give_up_lost(client, "pool-c") == 0
        found = [client.read_flow_run(one).state_type.value for one in runs]  # type: ignore[union-attr]
    assert found == ["CRASHED", "CRASHED", "SCHEDULED", "RUNNING"]


def test_infra_says_the_same(api: str, tmp_path: Path) -> None:
    """`prefect deploy` with infra/prefect.yaml, and `deltaworks deploy`, register the same deployments."""
    command = [
        sys.executable,
        "-m",
        "prefect",
        "--no-prompt",
        "deploy",
        "--all",
        "--prefect-file",
        "infra/prefect.yaml",
    ]
    registered(["delta"], {"delta": "s3://models/inbox"}, When(), Pool("deltaworks"))
    ours, events = deployments("deltaworks"), automations("delta")
    before = {one["id"] for one in ask("/deployments/filter", {})}
    environment = {"DELTAWORKS_LINE": "delta", "DELTAWORKS_INBOX": "s3://models/inbox", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {one["id"] for one in ask("/deployments/filter", {})} == before
    assert deployments("deltaworks") == ours
    assert len(ours) == len(planned(["delta"], {"delta": "s3://models/inbox"}, When()))
    assert [_essence(one) for one in automations("delta")] == [_essence(one) for one in events]


def _essence(automation: dict[str, Any]) -> dict[str, Any]:
    trigger = {key: value for key, value in automation["trigger"].items() if key != "id"}
    return {"trigger": trigger, "parameters": automation["actions"][0]["parameters"], "enabled": automation["enabled"]}


def test_what_an_event_leaves_out_is_found_out(tmp_path: Path) -> None:
    """Events of other programs may lack the base and the digest."""
    base = open_line(tmp_path, "epsilon")
    folder = tuned(tmp_path / "run", 1)

    @flow
    def take(reference: str) -> None:
        take_in(reference, "epsilon")

    take(str(folder))
    take(str(folder))
    take(base)
    first, second = Queue(here().store.objects, "epsilon").submissions()
    assert (first.task, first.base, second.reference) == ("run", base, CheckpointRef(base))
