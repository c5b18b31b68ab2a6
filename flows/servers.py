"""Servers as child processes, on loopback: Prefect for one run, Prefect and MLflow for people to look at, and a worker.

A child ends with its parent even if that is killed without warning; Prefect's own temporary server would stay.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from configs.settings import Settings
from storage.errors import Unavailable

LOOPBACK = "127.0.0.1"
_PATIENCE = 120.0  # seconds; a first start creates the databases
_STOP = 10.0  # seconds between asking a server to end and ending it
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Server:
    """A server process: starts at once, answers a little later; one without `health` has nothing to answer."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], health: str, log: Path) -> None:
        self.name = name
        self._health = health
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as output:
            self._child = subprocess.Popen(
                [sys.executable, "-m", *command],
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )

    @property
    def running(self) -> bool:
        return self._child.poll() is None

    def await_answer(self) -> None:
        start = time.monotonic()
        while time.monotonic() - start < _PATIENCE:
            if not self.running:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
                raise Unavailable(f"the {self.name} server ended at once:\n{tail}\n", remedy=f"Its log is {self.log}")
            if not self._health:
                return
            try:
                with urlopen(self._health, timeout=2):
                    return
            except (URLError, OSError):
                time.sleep(0.1)
        raise Unavailable(f"the {self.name} server did not answer in {_PATIENCE:.0f} s", remedy=f"Log: {self.log}")

    def stop(self) -> None:
        self._child.terminate()
        try:
            self._child.wait(timeout=_STOP)
        except subprocess.TimeoutExpired:
            self._child.kill()


def start_prefect(settings: Settings, host: str, port: int, *, ui: bool, database: str = "") -> Server:
    """Prefect's server, over the database in the home or another one; its API is at http://host:port/api."""
    address = f"http://{host}:{port}/api"
    environment = {
        "PREFECT_API_URL": "",
        "PREFECT_UI_API_URL": address,
        "PREFECT_SERVER_UI_ENABLED": str(ui).lower(),
        # the defaults of 1 let the server lag a minute behind a burst of task runs
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
    }
    if database:
        environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
    command = ["prefect", "server", "start", "--host", host, "--port", str(port)]
    log = settings.home / "logs" / ("prefect.log" if ui else "prefect-run.log")
    return Server("Prefect", command, environment, f"{address}/health", log)


def start_mlflow(settings: Settings, host: str, port: int) -> Server:
    """MLflow's server over the tracking database. One worker without job runner: a tenth of the default's memory."""
    artifacts = (settings.home / "mlflow-artifacts").as_uri()
    command = ["mlflow", "server", "--artifacts-destination", artifacts]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    # the address of a database may hold a password, and everybody sees the command of a process
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_BACKEND_STORE_URI": settings.tracking}
    return Server("MLflow", command, environment, f"http://{host}:{port}/health", settings.home / "logs" / "mlflow.log")


def start_worker(settings: Settings, api: str, pool: str, limit: int) -> Server:
    """A worker of Prefect's: it runs deployed flows as processes of this machine, `limit` of them at once."""
    port = free_port()
    environment = {
        **_service(settings, api),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_WORKER_WEBSERVER_HOST": LOOPBACK,
        "PREFECT_WORKER_WEBSERVER_PORT": str(port),
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",
    }
    command = ["prefect", "worker", "start", "--pool", pool, "--type", "process", "--limit", str(limit)]
    command += ["--name", f"deltaworks-{port}", "--with-healthcheck"]
    log = settings.home / "logs" / "worker.log"
    return Server("worker", command, environment, f"http://{LOOPBACK}:{port}/health", log)


def start_watcher(settings: Settings, api: str, source: str, line: str) -> Server:
    """A process that watches an inbox for a line, in which `deltaworks watch` runs."""
    command = ["flows.cli", "watch", source, "--line", line]
    return Server(
        f"watcher of {source}", command, _service(settings, api), "", settings.home / "logs" / f"watch-{line}.log"
    )


def start_webhook(settings: Settings, api: str, inboxes: Mapping[str, str], port: int, secret_file: str) -> Server:
    """A process that watches these inboxes (line -> address), and looks when a signed message says so."""
    command = ["flows.cli", "webhook", "--port", str(port), "--every", "5s", "--secret-file", secret_file]
    for line, address in inboxes.items():
        command += ["--inbox", f"{line}={address}"]
    health = f"http://{LOOPBACK}:{port}/health"
    return Server("webhook", command, _service(settings, api), health, settings.home / "logs" / "webhook.log")


def _service(settings: Settings, api: str) -> dict[str, str]:
    """Where a process finds Prefect and the home, from whichever folder it starts."""
    return {"PREFECT_API_URL": api, "DELTAWORKS_HOME": str(settings.home), "PYTHONUNBUFFERED": "1"}


def free_port(host: str = LOOPBACK, wanted: int = 0) -> int:
    """The wanted port, or the next free one above it; any free one if none is wanted."""
    for port in range(wanted, wanted + 100) if wanted else [0]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise Unavailable(f"no free port on {host} from {wanted} to {wanted + 99}")


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)
