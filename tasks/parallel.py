"""Work on many tensors at once, within a budget of threads and memory, with results in order.

Threads are the only executor for now; what they run gets plain arguments and shares nothing, so that another
executor can take their place.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from storage.errors import InvalidInput

Item = TypeVar("Item")
Result = TypeVar("Result")
Report = Callable[[int, int, str], None]  # done, total, note

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}


def parse_bytes(text: str) -> int:
    """`4GiB`, `500 MB` or a number of bytes."""
    digits = text.strip().rstrip("BbGgIiKkMmTt ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        found = int(float(digits) * _UNITS[unit])
    except (ValueError, KeyError):
        raise InvalidInput(f"{text!r} is not an amount of memory", remedy="Write it like 4GiB or 500MB") from None
    if found <= 0:
        raise InvalidInput(f"an amount of memory must be positive, found {text!r}")
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Budget:
    """`workers`: tensors worked on at once. `memory`: bytes that the tensors in work may take together."""

    workers: int = field(default_factory=lambda: min(_cores(), 16))
    memory: int = 4 * 2**30


def in_order(
    items: Sequence[Item],
    work: Callable[[Item], Result],
    cost: Callable[[Item], float],
    budget: Budget,
    report: Report | None = None,
) -> Iterator[Result]:
    """`work` of every item, in their order. `cost` is an item's memory in bytes.

    An item starts when a worker is free and its cost fits beside those in work; one that is larger than the budget
    runs alone. The first error in their order is raised, and ends what has not begun. Within `work`, torch computes on
    one thread, whatever it was told.
    """
    if budget.workers == 1 or len(items) < 2:
        for done, item in enumerate(items, 1):
            with one_thread():
                result = work(item)
            yield result
            if report:
                report(done, len(items), "tensors")
        return
    room = _Room(budget.memory)

    def one(item: Item, needed: float) -> Result:
        try:
            return work(item)
        finally:
            room.leave(needed)

    waiting: deque[Future[Result]] = deque()
    done = 0
    with one_thread(), ThreadPoolExecutor(budget.workers, "tensors", initializer=_compute_alone) as pool:
        try:
            for item in items:
                needed = cost(item)
                room.enter(needed)
                waiting.append(pool.submit(one, item, needed))
                while len(waiting) > 2 * budget.workers or (waiting and waiting[0].done()):
                    yield waiting.popleft().result()
                    done += 1
                    if report:
                        report(done, len(items), "tensors")
            while waiting:
                yield waiting.popleft().result()
                done += 1
                if report:
                    report(done, len(items), "tensors")
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes on the calling thread alone, and then as before.

    Norms, products and decompositions round differently on several threads, and would be stored under other refs on
    another machine. The workers fill the cores anyway.
    """
    import torch  # takes seconds: not for those who only read a budget

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compute_alone() -> None:
    """The same for a new thread, which may have a number of its own."""
    import torch

    torch.set_num_threads(1)


class _Room:
    """Bytes to be shared out: `enter` waits until there is room, or nobody else is in."""

    def __init__(self, size: float) -> None:
        self._size, self._taken, self._inside = size, 0.0, 0
        self._changed = threading.Condition()

    def enter(self, size: float) -> None:
        with self._changed:
            while self._inside and self._taken + size > self._size:
                self._changed.wait()
            self._inside += 1
            self._taken += size

    def leave(self, size: float) -> None:
        with self._changed:
            self._inside -= 1
            self._taken -= size
            self._changed.notify_all()
