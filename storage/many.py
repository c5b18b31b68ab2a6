"""Many objects at once: reading and writing takes waiting, so several wait together, within a limit of memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
Report = Callable[[int, int], None]  # done and total, of whatever the work counts

THREADS = 8  # objects under way; a disk and a server both gain up to about as many
ROOM = 1 << 30  # bytes under way: objects are held whole while they are checked


def silent(done: int, total: int) -> None:
    """The report of those whom nobody watches."""


class Room:
    """Lets work begin while its bytes fit beside what is under way; one that is larger than all room goes alone."""

    def __init__(self, size: int = ROOM) -> None:
        self._size = size
        self._used = 0
        self._changed = threading.Condition()

    def take(self, size: int) -> int:
        """Wait for room; returns what to give back."""
        wanted = max(0, min(size, self._size))
        with self._changed:
            self._changed.wait_for(lambda: self._used + wanted <= self._size)
            self._used += wanted
        return wanted

    def give(self, taken: int) -> None:
        with self._changed:
            self._used -= taken
            self._changed.notify_all()


def each(
    items: Iterable[T],
    work: Callable[[T], R],
    *,
    size: Callable[[T], int] = lambda item: 0,
    report: Report = silent,
    threads: int = THREADS,
    room: Room | None = None,
) -> list[R]:
    """`work(item)` of every item, in the order of the items. The first error stops what has not begun, and is raised.

    `size` is how many bytes an item takes while it is worked on, `report` is called as items are done.
    """
    todo: Sequence[T] = list(items)
    found: dict[int, R] = {}
    limit, lock, stop = room or Room(), threading.Lock(), threading.Event()
    numbers = iter(range(len(todo)))

    def take_and_work() -> None:
        while not stop.is_set():
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            taken = limit.take(size(todo[number]))
            try:
                result = work(todo[number])
            except BaseException:
                stop.set()
                raise
            finally:
                limit.give(taken)
            with lock:
                found[number] = result
                report(len(found), len(todo))

    with ThreadPoolExecutor(threads) as pool:
        workers: list[Future[None]] = [pool.submit(take_and_work) for _ in range(min(threads, len(todo)))]
        try:
            for worker in workers:
                worker.result()
        finally:  # Ctrl-C too: what has not begun must not be waited for
            stop.set()
    return [found[number] for number in range(len(todo))]
