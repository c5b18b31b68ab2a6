"""The set-up of a team: the store on S3, an MLflow server and a Prefect server, and nothing kept in the home."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from configs.settings import Settings
from flows.servers import LOOPBACK, free_port, start_mlflow, start_prefect


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Both servers with databases of their own; yields the addresses as environment variables."""
    home = tmp_path / "servers"
    (home / "prefect").mkdir(parents=True)
    settings = Settings(home, "memory:", f"sqlite:///{home / 'mlflow.db'}", "cpu", 1)
    ports = free_port(), free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home / "prefect"))
        started = [start_mlflow(settings, LOOPBACK, ports[0]), start_prefect(settings, LOOPBACK, ports[1], ui=False)]
    try:
        for server in started:
            server.await_answer()
        yield {
            "MLFLOW_TRACKING_URI": f"http://{LOOPBACK}:{ports[0]}",
            "PREFECT_API_URL": f"http://{LOOPBACK}:{ports[1]}/api",
        }
    finally:
        for server in started:
            server.stop()


def test_a_chain_against_servers(servers: dict[str, str], s3_url: str, tmp_path: Path) -> None:
    home = tmp_path / "worker"
    environment = {**os.environ, **servers, "DELTAWORKS_STORE": s3_url, "DELTAWORKS_HOME": str(home)}

    def run() -> str:
        command = [sys.executable, "-c", "from flows.cli import main; main()", "run", "smoke", "--quiet"]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert found.returncode == 0, found.stderr
        return found.stdout

    first = run()
    assert first.startswith("best: smoke-")
    assert len(first.splitlines()) == 1, "a server's addresses are not what was asked for"
    assert run().startswith("nothing to do")

    client = MlflowClient(servers["MLFLOW_TRACKING_URI"])
    head = client.get_model_version_by_alias("smoke-opcm", "head")
    assert head.tags["weights"].startswith(f"{s3_url}/checkpoint/")
    runs = client.search_runs([client.get_experiment_by_name("smoke").experiment_id], "tags.stage = 'summary'")
    assert {file.path for file in client.list_artifacts(runs[0].info.run_id)} == {"smoke.png", "smoke.parquet"}
    assert not (home / "store").exists()
    assert not (home / "mlflow.db").exists()
