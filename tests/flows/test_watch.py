"""The watcher as a command and as a flow: it queues, tells Prefect, and outlives what does not answer."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL
from typer.testing import CliRunner

from flows import watch as watching
from flows.cli import app
from flows.service import watch
from flows.watch import keep_watching
from flows.words import interval
from flows.workplace import here
from storage.errors import InvalidInput, Missing, Unavailable
from storage.queue import Queue
from storage.refs import CheckpointRef
from tests.flows.arrivals import LINE, open_line, tuned
from tests.flows.test_pending import await_events

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def base(tmp_path: Path, home: Path) -> CheckpointRef:
    return open_line(tmp_path)


def tasks() -> list[str]:
    return [one.task for one in Queue(here().store.objects, LINE).submissions()]


def test_the_command_looks_until_nothing_changes(base: CheckpointRef, tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    tuned(inbox / "one", 1)
    shutil.copytree(inbox / "one", inbox / "half")
    (inbox / "half" / "config.json").unlink()
    command = ["watch", str(inbox), "--line", LINE, "--once", "--every", "50ms"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.stderr
    assert "half waits for config.json" in found.output
    assert "queued one from file://" in found.output and "1 queued" in found.output
    assert "0 queued" in CliRunner().invoke(app, command).output
    assert tasks() == ["one"]
    wrong = CliRunner().invoke(app, ["watch", str(inbox), "--line", "none", "--once"])
    assert (wrong.exit_code, "no line 'none'" in wrong.stderr) == (1, True)


@pytest.mark.parametrize(("text", "found"), [("5s", 5.0), ("500ms", 0.5), ("2m", 120.0), ("1.5 h", 5400.0), ("3", 3.0)])
def test_times(text: str, found: float) -> None:
    assert interval(text) == found


@pytest.mark.parametrize("text", ["", "s", "-1s", "0s", "5 days", "five"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(InvalidInput, match="is no time"):
        interval(text)


@pytest.mark.usefixtures("prefect_server")
def test_events_that_prefect_did_not_take_are_sent_again(
    base: CheckpointRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watcher goes on while Prefect is away; what it queued meanwhile is told when Prefect is back."""
    inbox = tmp_path / "inbox"
    tuned(inbox / "while-away", 1)
    monkeypatch.setenv("PREFECT_API_URL", PREFECT_API_URL.value() or "")
    announce, refusals = watching.announce_waiting, [Unavailable("Prefect is away")] * 3

    def refusing(queue: Queue) -> int:
        if any(one.state == "pending" for one in queue.submissions()) and refusals:
            raise refusals.pop()
        return announce(queue)

    monkeypatch.setattr(watching, "announce_waiting", refusing)
    said: list[str] = []
    assert keep_watching(str(inbox), LINE, 0.05, said.append, lasting=1.5, once=False) == 1
    assert not refusals
    assert said.count("waiting: Prefect is away") == 1
    assert await_events("deltaworks.checkpoint.created", {"while-away"})


@pytest.mark.usefixtures("prefect_server")
def test_the_flow_ends_in_time_and_says_what_came(base: CheckpointRef, tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    later = threading.Timer(0.5, lambda: tuned(inbox / "later", 2))
    later.start()
    start = time.monotonic()
    assert watch(str(inbox), LINE, every=0.1, minutes=2.5 / 60) == 1
    assert time.monotonic() - start < 10
    later.join()
    assert tasks() == ["later"]
    with pytest.raises(Missing, match="no line 'none'"):
        watch(str(inbox), "none", minutes=0)
