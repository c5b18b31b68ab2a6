"""Progress: what steps tell whoever watches. The command shows bars; without a watcher it goes to Prefect's log."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Protocol

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger


class Watcher(Protocol):
    def started(self, label: str) -> None: ...

    def advanced(self, label: str, done: int, total: int, note: str) -> None: ...

    def finished(self, label: str) -> None: ...

    def reused(self, label: str) -> None: ...

    def waiting(self, label: str, why: str) -> None: ...


class Log:
    """The watcher of unattended runs: one line at the start and at every quarter of a step."""

    def __init__(self) -> None:
        self._quarters: dict[str, int] = {}

    def started(self, label: str) -> None:
        self._quarters[label] = 0

    def advanced(self, label: str, done: int, total: int, note: str) -> None:
        if done == 0 and note:  # what is said before the first step is not said again
            _log(f"{label}: {note}")
        quarter = 4 * done // total if total else 0
        if quarter > self._quarters.get(label, 0):
            self._quarters[label] = quarter
            _log(f"{label}: {done} of {total} {note}".rstrip())

    def finished(self, label: str) -> None:
        self._quarters.pop(label, None)

    def reused(self, label: str) -> None:
        _log(f"{label}: nothing to do")

    def waiting(self, label: str, why: str) -> None:
        _log(f"{label}: trying again: {why}")


def said(label: str, line: str) -> None:
    """What a process of a step prints: for the log, whoever watches."""
    _log(f"{label}: {line}")


def _log(text: str) -> None:
    with suppress(MissingContextError):  # a step called outside a run has no log to write to
        get_run_logger().info(text)


_lock = threading.Lock()
_watcher: Watcher = Log()


def watch(watcher: Watcher) -> None:
    """Send the progress of this process to `watcher`."""
    global _watcher
    _watcher = watcher


def started(label: str) -> None:
    with _lock:
        _watcher.started(label)


def advanced(label: str, done: int, total: int, note: str) -> None:
    with _lock:
        _watcher.advanced(label, done, total, note)


def finished(label: str) -> None:
    with _lock:
        _watcher.finished(label)


def reused(label: str) -> None:
    with _lock:
        _watcher.reused(label)


def waiting(label: str, why: str) -> None:
    with _lock:
        _watcher.waiting(label, why)
