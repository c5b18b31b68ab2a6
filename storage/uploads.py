"""Writes that go on while the next one is prepared: a bounded number of them, of a bounded size together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

THREADS = 8
MEMORY = 64 * 2**20


class Uploads:
    """Work that is done beside its caller. What goes wrong is raised by the next `add`, or by `finish`."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._futures: list[Future[None]] = []
        self._taken, self._inside = 0, 0
        self._changed = threading.Condition()

    def add(self, work: Callable[[], None], size: int) -> None:
        """Begin `work`, which holds `size` bytes, as soon as they fit beside the others or nothing else is held."""
        self._raise_failures()
        with self._changed:
            while self._inside and self._taken + size > MEMORY:
                self._changed.wait()
            self._inside += 1
            self._taken += size
        self._pool = self._pool or ThreadPoolExecutor(THREADS, thread_name_prefix="uploads")
        self._futures.append(self._pool.submit(self._do, work, size))

    def finish(self) -> None:
        """Return when all is done."""
        for future in self._futures:
            future.result()
        self._futures.clear()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _do(self, work: Callable[[], None], size: int) -> None:
        try:
            work()
        finally:
            with self._changed:
                self._inside -= 1
                self._taken -= size
                self._changed.notify_all()

    def _raise_failures(self) -> None:
        waiting = []
        for future in self._futures:
            if future.done():
                future.result()
            else:
                waiting.append(future)
        self._futures = waiting
