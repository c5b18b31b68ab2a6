"""A chain whose trainings run in several processes: their log is Prefect's, and they end with the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml

from configs.chain import ChainConfig, dump_chain, load_chain
from storage.directory import DirectoryObjects
from tasks.tuners import Full

pytestmark = pytest.mark.slow


def long_chain() -> ChainConfig:
    """Two trainings that would go on for hours."""
    config = load_chain("smoke")
    tuner = Full(steps=100_000, batch=32, save_every=5, processes=2)
    tasks = tuple(replace(task, tuner=tuner) for task in config.tasks[:2])
    return replace(config, tasks=tasks, lines=config.lines[:1])


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=["term", "int", "kill"])
def test_a_cancelled_run_takes_its_processes_with_it(tmp_path: Path, how: signal.Signals) -> None:
    file = tmp_path / "long.yaml"
    file.write_text(yaml.safe_dump(dump_chain(long_chain())))
    command = [sys.executable, "-c", "from flows.cli import main; main()", "run", str(file), "--verbose"]
    environment = {**os.environ, "DELTAWORKS_HOME": str(tmp_path / "home"), "PREFECT_LOGGING_LEVEL": "INFO"}
    environment |= {"TORCH_CPP_LOG_LEVEL": "INFO"}  # the processes have something to say
    objects = DirectoryObjects(tmp_path / "home" / "store")
    said = tmp_path / "said.txt"
    with said.open("w") as output:
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 200
        while not list(objects.list("training/")):
            assert child.poll() is None, said.read_text()
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.05)
        started = psutil.Process(child.pid).children(recursive=True)
        workers = [one for one in started if "tasks.worker" in one.cmdline()]
        assert len(workers) >= 3, [one.cmdline() for one in started]
        child.send_signal(how)
        assert not psutil.wait_procs(workers, timeout=30)[1]
        assert child.wait(timeout=60) != 0
    lines = [line for line in said.read_text().splitlines() if "fine-tune rot90: " in line]
    assert any("INFO" in line and "[c10d]" in line for line in lines), said.read_text()
    assert list(objects.list("training/"))  # the next run goes on there
