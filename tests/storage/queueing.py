"""Processes that submit to one queue and work on it at the same time, and are killed without warning while they do."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from storage.address import open_objects
from storage.errors import Conflict
from storage.lines import Line
from storage.queue import Queue
from storage.refs import UpdateRef
from tests.storage.test_lines import BASE, MERGER, ref, state_of

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([__name__])
_LIMIT = 60.0  # seconds that a schedule may take
BAD = ("c1", "c4")  # what can never be merged


def content(name: str) -> str:
    return ref("update", name).partition("/")[2]


def submit_all(url: str, line: str, names: Sequence[str]) -> None:
    queue = Queue(open_objects(url), line)
    for name in names:
        queue.submit(content(name), f"/inbox/{name}", BASE, name)


def work_off(url: str, line: str) -> None:
    """Merge what waits, one after the other, the way the flow does: the line first, then the queue."""
    objects = open_objects(url)
    queue, journal = Queue(objects, line), Line(objects, line)
    while (one := queue.next()) is not None:
        with suppress(Conflict):  # somebody else ended it in this moment
            queue.start(one.content, by=str(os.getpid()))
        if one.task in BAD:
            queue.quarantine(one.content, "Mismatch", "it is bad")
            continue
        update = UpdateRef(ref("update", one.task))
        while True:
            head = journal.head()
            held = next((entry for entry in journal.entries() if entry.update == update), None)
            if held is None:
                with suppress(Conflict):
                    held = journal.fold(head, one.task, update, state_of(head.state, one.task, 1.0, head.merger))
            if held is not None:
                break
        queue.merge(one.content, held.number)


def play(url: str, line: str, seed: int) -> int:
    """One schedule: submitters and workers share a queue, about half are killed, all are started again until done.

    Returns how many were killed.
    """
    draw = random.Random(seed)
    names = [f"c{number}" for number in range(6)]
    Line(open_objects(url), line).open(BASE, MERGER)
    todo: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
    for _ in range(draw.randint(1, 3)):
        todo.append((submit_all, (url, line, draw.sample(names, len(names)))))
    todo += [(work_off, (url, line))] * draw.randint(1, 2)
    running = [(work, _start(work, more), draw.uniform(0, 40) if draw.random() < 0.6 else None) for work, more in todo]
    begun, killed = time.monotonic(), 0
    while running:
        assert time.monotonic() < begun + _LIMIT, f"{len(running)} processes are not done"
        left = []
        for number, (work, process, kill) in enumerate(running):
            if kill is not None and 1000 * (time.monotonic() - begun) >= kill and process.is_alive():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                kill = None
            if process.is_alive():
                left.append((work, process, kill))
                continue
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL), f"process {number} ended with {process.exitcode}"
            if process.exitcode:
                killed += 1
                more = (url, line, draw.sample(names, len(names))) if work is submit_all else (url, line)
                left.append((work, _start(work, more), None))
        running = left
        time.sleep(0.001)
    work_off(url, line)  # what was submitted after the last worker had looked
    return killed


def check(url: str, line: str) -> None:
    """Everything was submitted once; what is good is in the line once, in the order of the queue; the bad is aside."""
    objects = open_objects(url)
    found = Queue(objects, line).submissions()
    assert sorted(one.task for one in found) == [f"c{number}" for number in range(6)]
    assert {one.task: one.state for one in found} == {
        f"c{number}": "quarantined" if f"c{number}" in BAD else "merged" for number in range(6)
    }
    entries = list(Line(objects, line).entries())
    merged = [one for one in found if one.state == "merged"]
    assert [entry.task for entry in entries[1:]] == [one.task for one in merged]
    assert [one.entry for one in merged] == [1, 2, 3, 4]


def _start(work: Callable[..., None], arguments: tuple[Any, ...]) -> Any:
    variables = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    process = _SERVER.Process(target=_run, args=(work, arguments, variables))
    process.start()
    return process


def _run(work: Callable[..., None], arguments: tuple[Any, ...], variables: dict[str, str]) -> None:
    os.environ.update(variables)
    work(*arguments)
