"""Shared by all tests: one thread, an own home per test, and one Prefect server for the whole run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# before anything imports torch or prefect, which read these once
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "120"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["PREFECT_LOGGING_LEVEL"] = "WARNING"
os.environ["PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW"] = "ignore"  # some tests call a step alone
os.environ["HF_HUB_OFFLINE"] = "1"
for _name in ("DELTAWORKS_STORE", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "DELTAWORKS_DEVICE", "DELTAWORKS_CACHE"):
    os.environ.pop(_name, None)

pytest_plugins = ["tests.storage.s3_fixtures"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    """A test that asks for chance without a seed gets the same numbers each time, whatever ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An embedded set-up of its own: store, MLflow on SQLite."""
    monkeypatch.setenv("DELTAWORKS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A real Prefect server with a database of its own, started once: it takes ten seconds."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database with nothing in it: making its tables takes seconds, which one test pays for all."""
    from storage.registry import Registry

    folder = tmp_path_factory.mktemp("mlflow")
    Registry(f"sqlite:///{folder / 'mlflow.db'}", folder)
    return folder / "mlflow.db"
