"""The two servers people look at, MLflow and Prefect, over the embedded databases, on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from configs.settings import Settings
from storage.errors import Unavailable

LOOPBACK = "127.0.0.1"
_PATIENCE = 120.0  # seconds; a first start creates the databases
_PREFECT_BATCH = "100"  # the default of 1 lets the server lag a minute behind a burst of task runs


class Servers:
    """Child processes that end with this one."""

    def __init__(self, settings: Settings, host: str = LOOPBACK, mlflow_port: int = 5000, prefect_port: int = 4200):
        self._host = host
        self._logs = settings.home / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._children: list[tuple[str, subprocess.Popen[bytes], Path]] = []
        self.mlflow = f"http://{host}:{_free(host, mlflow_port)}"
        self.prefect = f"http://{host}:{_free(host, prefect_port, taken=self.mlflow)}"
        self._settings = settings

    def __enter__(self) -> Servers:
        try:
            self._start_mlflow()
            self._start_prefect()
            self._await(f"{self.mlflow}/health", "mlflow")
            self._await(f"{self.prefect}/api/health", "prefect")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for _name, child, _log in self._children:
            child.terminate()
        for _name, child, _log in self._children:
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()

    def wait(self) -> None:
        """Return when one of the servers has ended."""
        while all(child.poll() is None for _, child, _ in self._children):
            time.sleep(0.5)

    def _start_mlflow(self) -> None:
        port = self.mlflow.rpartition(":")[2]
        artifacts = (self._settings.home / "mlflow-artifacts").as_uri()
        command = ["-m", "mlflow", "server", "--backend-store-uri", self._settings.tracking]
        command += ["--artifacts-destination", artifacts, "--host", self._host, "--port", port, "--workers", "1"]
        self._start("mlflow", command, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})

    def _start_prefect(self) -> None:
        port = self.prefect.rpartition(":")[2]
        batches = {
            "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": _PREFECT_BATCH,
            "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": _PREFECT_BATCH,
            "PREFECT_UI_API_URL": f"{self.prefect}/api",
        }
        self._start("prefect", ["-m", "prefect", "server", "start", "--host", self._host, "--port", port], batches)

    def _start(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        log = self._logs / f"{name}.log"
        with open(log, "wb") as output:
            child = subprocess.Popen(
                [sys.executable, *command],
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        self._children.append((name, child, log))

    def _await(self, url: str, name: str) -> None:
        child, log = next((child, log) for known, child, log in self._children if known == name)
        start = time.monotonic()
        while time.monotonic() - start < _PATIENCE:
            if child.poll() is not None:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise Unavailable(f"the {name} server ended at once:\n{tail}\n", remedy=f"Its whole log is {log}")
            try:
                with urlopen(url, timeout=2):
                    return
            except (URLError, OSError):
                time.sleep(0.3)
        raise Unavailable(f"the {name} server did not answer within {_PATIENCE:.0f} s", remedy=f"Its log is {log}")


def _free(host: str, wanted: int, taken: str = "") -> int:
    """The wanted port, or the next free one above it."""
    for port in range(wanted, wanted + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if not taken.endswith(f":{port}"):
                try:
                    probe.bind((host, port))
                    return port
                except OSError:
                    continue
    raise Unavailable(f"no free port on {host} from {wanted} to {wanted + 99}")
