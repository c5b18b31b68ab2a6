"""Processes that fold updates into one line at the same time, and are killed without warning while they do."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from storage.address import open_objects
from storage.artifacts import ArtifactStore
from storage.lines import Line
from storage.refs import CheckpointRef, StateRef, UpdateRef
from storage.verify import verify, verify_lines
from tasks.join import join_line
from tasks.merge import fold_update
from tasks.parallel import Budget
from tasks.recipe import Recipe
from tests.builders import checkpoint_of, random_tensors, update_of

# the libraries are imported once, by a process that has no threads when it forks
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([__name__])
_LIMIT = 60.0  # seconds that a schedule may take


@dataclass
class Schedule:
    """One way things may go: which process folds what, and after how many milliseconds it is killed, if at all."""

    shares: Sequence[Sequence[int]]
    kills: Sequence[float | None] = field(default_factory=list)


def random_schedule(seed: int, updates: int) -> Schedule:
    """Two to four processes share the updates (some have two folders), and about half of them are killed."""
    draw = random.Random(seed)
    writers = draw.randint(2, 4)
    shares: list[list[int]] = [[] for _ in range(writers)]
    for number in range(updates):
        for writer in draw.sample(range(writers), draw.choice([1, 1, 2])):
            shares[writer].append(number)
    kills = [draw.uniform(0, 60) if draw.random() < 0.5 else None for _ in range(writers)]
    return Schedule(shares, kills)


class Contest:
    """A line at an address, and updates that are to end in it."""

    def __init__(self, url: str, updates: int, recipe: Recipe) -> None:
        self.url, self.recipe = url, recipe
        self.killed = 0  # processes, so far
        store = self.store()
        self.base: CheckpointRef = checkpoint_of(random_tensors(0), store)
        self.updates: list[UpdateRef] = [update_of(random_tensors(1 + n), self.base, store) for n in range(updates)]

    def store(self) -> ArtifactStore:
        return ArtifactStore(open_objects(self.url))

    def run(self, name: str, schedule: Schedule) -> None:
        """Everybody at once; who was killed is started again until done."""
        Line(self.store().objects, name).open(self.base, self.recipe.spec())
        deadline = time.monotonic() + _LIMIT
        kills = [*schedule.kills, *[None] * (len(schedule.shares) - len(schedule.kills))]
        running = [(share, kill, self._start(name, share)) for share, kill in zip(schedule.shares, kills, strict=True)]
        started = time.monotonic()
        while running:
            assert time.monotonic() < deadline, f"{len(running)} processes are not done"
            again = []
            for share, kill, process in running:
                if kill is not None and 1000 * (time.monotonic() - started) >= kill and process.is_alive():
                    with suppress(ProcessLookupError):  # it may have ended since
                        os.kill(process.pid, signal.SIGKILL)
                    process.join()
                    self.killed += process.exitcode == -signal.SIGKILL
                    again.append((share, None, self._start(name, share)))
                elif process.is_alive():
                    again.append((share, kill, process))
                else:
                    process.join()
                    assert process.exitcode in (0, -signal.SIGKILL), f"a process ended with {process.exitcode}"
                    if process.exitcode:
                        again.append((share, None, self._start(name, share)))
            running = again
            time.sleep(0.001)

    def check(self, name: str) -> None:
        """Every update is in the line once, and its state is that of folding them in this order."""
        store = self.store()
        line = Line(store.objects, name)
        history = line.history()
        assert sorted(str(entry.update) for entry in history) == sorted(self.updates)
        assert [entry.number for entry in line.entries()] == list(range(len(self.updates) + 1))
        state: StateRef | None = None
        for entry in history:
            assert entry.update is not None
            state = fold_update(self.base, state, entry.update, self.recipe, store, budget=Budget(workers=1))
            assert entry.state == state
        assert not verify(store, [self.base, *self.updates, *([state] if state else [])]).findings
        assert not verify_lines(store)

    def _start(self, name: str, share: Sequence[int]) -> Any:
        variables = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
        updates = [self.updates[number] for number in share]
        process = _SERVER.Process(target=_fold, args=(self.url, name, updates, variables))
        process.start()
        return process


def _fold(url: str, name: str, updates: Sequence[UpdateRef], variables: dict[str, str]) -> None:
    os.environ.update(variables)
    store = ArtifactStore(open_objects(url))
    for update in updates:
        join_line(Line(store.objects, name), update, store, budget=Budget(workers=1))
