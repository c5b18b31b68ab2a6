"""Launched: one training in several processes, by `accelerate launch`, and what they say on the way.

The processes end with whoever waits for them: when that is interrupted or its flow fails, and when the waiting process
is killed, which they look for themselves (tasks/worker.py).
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from storage.artifacts import ArtifactStore
from storage.errors import DeltaworksError, InvalidInput
from storage.refs import CheckpointRef, parse_ref
from tasks.choice import plain, restored
from tasks.suites import AnySuite
from tasks.told import Progress, Report, failure, result
from tasks.tuners import AnyTuner

Log = Callable[[str], None]

_OFTEN = 0.2  # seconds between two looks at the progress
_PATIENCE = 10.0  # seconds between asking processes to end and ending them
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_KEPT = 200  # lines of what was printed, if a failure says nothing better

_one_at_a_time = threading.Lock()  # two trainings would share the same GPUs


@dataclass(frozen=True)
class Job:
    """A training as it is told to its processes. `seen`: numbers of the examples, which were looked at before."""

    base: CheckpointRef
    start: CheckpointRef | None
    task: str
    suite: AnySuite
    tuner: AnyTuner
    device: str
    seen: Mapping[str, int]

    def written(self) -> dict[str, Any]:
        return {name: plain(asdict(one) if name in ("suite", "tuner") else one) for name, one in self.__dict__.items()}

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Job:
        kinds = {"suite": AnySuite, "tuner": AnyTuner}
        return cls(**{name: restored(kinds[name], one) if name in kinds else one for name, one in found.items()})


def launch(job: Job, store: ArtifactStore, report: Report, log: Log) -> CheckpointRef:
    """Train in `job.tuner.processes` processes, and give the ref that the leading one stored.

    Raises what one of them raised. What they print goes to `log`.
    """
    if store.url.startswith("memory:"):
        raise InvalidInput(
            f"processes is {job.tuner.processes}, but no other process can open the store {store.url}",
            remedy="Use a store in a folder or on S3, or set processes to 1",
        )
    with tempfile.TemporaryDirectory() as folder, _one_at_a_time:
        told = {"job": job.written(), "store": store.url, "threads": torch.get_num_threads(), "parent": os.getpid()}
        Path(folder, "job.json").write_text(json.dumps(told))
        tail: deque[str] = deque(maxlen=_KEPT)
        wait = _waiting.get() or _Wait()
        with _started(job.tuner.processes, Path(folder), wait) as child:
            progress = Progress(Path(folder), report)
            for line in _lines(child, progress.look):
                tail.append(line)
                log(line)
            code = child.wait()
            progress.look()
        ref = result(Path(folder))
        if code == 0 and ref is not None:
            return CheckpointRef(parse_ref(ref, "checkpoint"))
        wait.check()
        raise failure(Path(folder), job.tuner.processes, code, list(tail))


class _Wait:
    """Somebody who waits for trainings: when that is over, those under way are ended, and no other begins."""

    def __init__(self) -> None:
        self._over = False
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()

    def check(self) -> None:
        if self._over:
            raise DeltaworksError("the training was given up: nobody waits for it any more")

    def joined(self, child: subprocess.Popen[str]) -> None:
        with self._lock:
            self._running.add(child)
        self.check()

    def left(self, child: subprocess.Popen[str]) -> None:
        with self._lock:
            self._running.discard(child)

    def end(self) -> None:
        self._over = True
        with self._lock:
            under_way = list(self._running)
        for child in under_way:
            _end(child)


# threads of a flow have that of the flow
_waiting: ContextVar[_Wait | None] = ContextVar("waiting", default=None)


@contextmanager
def ending_with_us() -> Iterator[None]:
    """Ends all launched trainings if what is done inside fails or is cancelled. They go on at their last saves, another
    time."""
    wait = _Wait()
    token = _waiting.set(wait)
    try:
        yield
    except BaseException:
        wait.end()
        raise
    finally:
        _waiting.reset(token)


@contextmanager
def _started(processes: int, folder: Path, wait: _Wait) -> Iterator[subprocess.Popen[str]]:
    wait.check()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--main_process_port", str(_free_port())]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--module", "tasks.worker", str(folder)]
    ours = str(Path(__file__).parents[1])  # where this package is, wherever the command was called
    path = os.pathsep.join([ours, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )
    try:
        wait.joined(child)
        yield child
    finally:
        _end(child)
        wait.left(child)
        assert child.stdout is not None
        child.stdout.close()


def _lines(child: subprocess.Popen[str], look: Callable[[], None]) -> Iterator[str]:
    """What the processes print, by a thread of its own: whoever waits can be interrupted, and calls `look` often."""
    said: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert child.stdout is not None
        with suppress(ValueError):  # closed while it was read
            for line in child.stdout:
                said.put(line.rstrip())
        said.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = said.get(timeout=_OFTEN)
        except queue.Empty:
            look()
            if not threading.main_thread().is_alive():  # the interpreter ends, and waits for this thread
                _end(child)
            continue
        if line is None:
            return
        if line:
            yield line


def _end(child: subprocess.Popen[str]) -> None:
    if child.poll() is not None:
        return
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)
