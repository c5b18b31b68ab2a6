"""A run killed with SIGKILL, several times, ends with the same refs as one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient

from configs.chain import load_chain
from flows.chain import chain
from flows.workplace import here
from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.lines import Line
from storage.verify import verify, verify_lines

RUN = [sys.executable, "-c", "from flows.cli import main; main()", "run"]


def run(home: Path, kill_when: Callable[[], bool] | None = None, config: str = "smoke") -> str:
    """Run a chain as a command; kill it without warning as soon as `kill_when` holds."""
    environment = {**os.environ, "DELTAWORKS_HOME": str(home)}
    child = subprocess.Popen(
        [*RUN, config], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if kill_when is not None:
        deadline = time.monotonic() + 120
        while not kill_when():
            assert child.poll() is None, f"the run ended before it could be killed:\n{child.communicate()[0]}"
            assert time.monotonic() < deadline, "the moment to kill never came"
            time.sleep(0.002)
        servers = psutil.Process(child.pid).children(recursive=True)
        child.kill()
        _, left = psutil.wait_procs(servers, timeout=30)
        assert not left, "the embedded Prefect server outlived its run"
    output, _ = child.communicate(timeout=180)
    assert child.returncode == (0 if kill_when is None else -signal.SIGKILL), output
    return output


def journal(store: ArtifactStore) -> dict[str, list[tuple[str, str | None, str | None]]]:
    return {
        name: [(entry.action, entry.update, entry.state) for entry in Line(store.objects, name).entries()]
        for name in Line.names(store.objects)
    }


@pytest.mark.usefixtures("prefect_server")
def test_killed_runs_go_on_where_they_stopped(home: Path, tmp_path: Path) -> None:
    undisturbed = chain(load_chain("smoke"))
    expected = here().store
    checkpoints = len(list(expected.refs("checkpoint")))

    killed = tmp_path / "killed"
    store = ArtifactStore(DirectoryObjects(killed / "store"))

    def has(prefix: str, count: int = 1) -> Callable[[], bool]:
        return lambda: len(list(store.objects.list(prefix))) >= count

    run(killed, kill_when=has("blob/", 20))  # while the base is being stored
    run(killed, kill_when=has("update/", 3))  # between compressing and the next training
    run(killed, kill_when=has("line/smoke-average/00000001"))  # a commit made, its model not yet written
    assert len(list(store.refs("checkpoint"))) < checkpoints
    output = run(killed)

    assert "found done" in output
    assert journal(store) == journal(expected)
    assert set(store.refs()) == set(expected.refs())
    assert undisturbed.best.last.model in output
    assert not verify(store, store.refs()).findings
    assert not verify_lines(store)

    client = MlflowClient(f"sqlite:///{killed / 'mlflow.db'}")
    for name in ("smoke-opcm", "smoke-average"):
        versions = client.search_model_versions(f"name = '{name}'")
        assert sorted(int(one.version) for one in versions) == [1, 2, 3]
    assert "nothing to do" in run(killed)


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_runs_killed_at_random_moments(home: Path, tmp_path: Path) -> None:
    chain(load_chain("smoke"))
    expected = here().store
    total = len(list(expected.objects.list("")))
    killed = tmp_path / "killed"
    store = ArtifactStore(DirectoryObjects(killed / "store"))
    moments = sorted(random.Random(0).sample(range(10, total - 5), 8))
    for moment in moments:
        run(killed, kill_when=lambda: len(list(store.objects.list(""))) >= moment)  # noqa: B023
    run(killed)
    assert journal(store) == journal(expected)
    assert set(store.refs()) == set(expected.refs())
    assert not verify(store, store.refs()).findings
