"""`deltaworks up --postgres`: Prefect and MLflow on a real Postgres, and a line that is merged through them."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from urllib.request import Request, urlopen

import psutil
import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from flows.cli import app
from flows.postgres import ensure_databases
from flows.servers import LOOPBACK, free_port
from storage.errors import InvalidInput, Unavailable
from tests.flows.arrivals import LINE, open_line, tuned
from tests.flows.test_service import Service, merged, until

HOW = (
    "This test starts a Postgres server: apt-get install --no-install-recommends postgresql-15 (or newer) has it; "
    "as root it is run as the user `postgres` that the package makes"
)


def programs() -> Path:
    """The newest Postgres of this machine."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    if path := shutil.which("initdb"):
        return Path(path).resolve().parent
    pytest.fail(HOW, pytrace=False)


@pytest.fixture
def postgres() -> Iterator[str]:
    """The address of an empty Postgres on loopback, with a password."""
    binaries = programs()
    folder = Path(mkdtemp(prefix="deltaworks-postgres-"))  # short: the name of its socket has a limit
    switch: list[str] = []
    if os.geteuid() == 0:  # it refuses to run as root
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            pytest.fail(HOW, pytrace=False)
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        switch = ["runuser", "-u", "postgres", "--"]
    password = folder / "password"
    password.write_text("not-a-secret")
    password.chmod(0o644)
    data, port = folder / "data", free_port()

    def call(program: str, *arguments: object) -> None:
        command = [*switch, str(binaries / program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
        assert done.returncode == 0, done.stdout + done.stderr

    call("initdb", "--pgdata", data, "--username", "deltaworks", "--auth", "scram-sha-256", "--pwfile", password,
         "--encoding", "UTF8", "--locale", "C.UTF-8")  # fmt: skip
    options = f"-c listen_addresses={LOOPBACK} -p {port} -k {folder}"
    call("pg_ctl", "start", "--pgdata", data, "--wait", "--log", folder / "log", "--options", options)
    try:
        yield f"postgresql://deltaworks:not-a-secret@{LOOPBACK}:{port}"
    finally:
        call("pg_ctl", "stop", "--pgdata", data, "--mode", "immediate")
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_line_is_merged_by_servers_on_postgres(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefect, mlflow = ensure_databases(postgres)
    assert ensure_databases(postgres) == (prefect, mlflow), "a second time nothing is made"
    assert prefect.startswith("postgresql+asyncpg://") and prefect.endswith("/prefect")
    wrong = postgres.replace("not-a-secret", "a-guess")
    with pytest.raises(Unavailable, match="does not let us in: password authentication failed") as caught:
        ensure_databases(wrong)
    assert "a-guess" not in str(caught.value)

    monkeypatch.setenv("DELTAWORKS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home" / "prefect"))
    open_line(tmp_path)
    monkeypatch.setenv("DELTAWORKS_POSTGRES", postgres)
    service = Service(tmp_path)
    try:
        for seed in (1, 2):
            service.drop(tuned(tmp_path / "source" / str(seed), seed), f"run-{seed}")
        client = MlflowClient(mlflow)
        until(lambda: len(client.search_model_versions(f"name = '{LINE}'")) == 2, service)
        assert merged() == ["run-1", "run-2"]
        assert not list((tmp_path / "home").rglob("mlflow.db")) + list((tmp_path / "home").rglob("prefect.db"))
        request = Request(
            f"{service.api}/flow_runs/filter", json.dumps({}).encode(), {"Content-Type": "application/json"}
        )

        def completed() -> bool:  # a version is registered a moment before its run ends
            with urlopen(request, timeout=30) as answer:
                return "Completed" in {one["state_name"] for one in json.load(answer)}

        until(completed, service)
        commands = " ".join(" ".join(one.cmdline()) for one in service.children())
        assert "not-a-secret" not in commands, "everybody on this machine sees the commands of others"
        logs = "".join(path.read_text() for path in (tmp_path / "home" / "logs").iterdir())
        assert "not-a-secret" not in logs + service.log.read_text()
        service.stop()
    finally:
        if service.process.poll() is None:
            for child in [*service.children(), psutil.Process(service.process.pid)]:
                child.kill()


def test_addresses_that_are_none() -> None:
    for address in ("mysql://localhost", "postgresql://localhost/database", "localhost:5432"):
        with pytest.raises(InvalidInput, match="must name a server and no database"):
            ensure_databases(address)
    port = free_port()
    found = CliRunner().invoke(app, ["up", "--postgres", f"postgresql://x@{LOOPBACK}:{port}"])
    assert found.exit_code == 1 and f"Postgres at {LOOPBACK} does not let us in" in found.stderr
