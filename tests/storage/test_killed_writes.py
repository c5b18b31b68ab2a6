"""A process killed at every single step of writing: nothing half-written is seen, and the next one ends the work."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from storage.address import open_objects
from storage.artifacts import ArtifactStore
from storage.lines import Line
from storage.refs import UpdateRef
from storage.verify import verify, verify_lines
from tasks.join import join_line
from tasks.mergers import Opcm
from tasks.parallel import Budget
from tasks.recipe import Recipe
from tests.storage.joining import Contest

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([__name__])
_STEPS = ("fsync", "replace", "link", "unlink")  # what a write to a folder consists of, beside filling a new file


def fold(url: str, update: UpdateRef, last: int) -> None:
    """Fold, but die before the step of writing that has the number `last`."""
    steps = count()

    def deadly(work: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            if next(steps) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*arguments, **named)

        return step

    for name in _STEPS:
        setattr(os, name, deadly(getattr(os, name)))
    store = ArtifactStore(open_objects(url))
    join_line(Line(store.objects, "main"), update, store, budget=Budget(workers=1))


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_at_every_step(stride: int, tmp_path: Path) -> None:
    contest = Contest(f"file://{tmp_path}/whole", 2, Recipe(Opcm()))
    store = contest.store()
    line = Line(store.objects, "main")
    line.open(contest.base, contest.recipe.spec())
    join_line(line, contest.updates[0], store)
    shutil.copytree(tmp_path / "whole", tmp_path / "begun")
    wanted = join_line(line, contest.updates[1], store).entry.state
    for last in count(step=stride):
        folder = tmp_path / f"killed-{last}"
        shutil.copytree(tmp_path / "begun", folder)
        process = _SERVER.Process(target=fold, args=(f"file://{folder}", contest.updates[1], last))
        process.start()
        process.join()
        held = ArtifactStore(open_objects(f"file://{folder}"))
        left = Line(held.objects, "main")
        assert not verify(held, list(held.refs())).findings, last
        assert not verify_lines(held), last
        assert left.head().step in (1, 2), last
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert join_line(left, contest.updates[1], held).entry.state == wanted, last
        assert left.head().step == 2
        shutil.rmtree(folder)
    assert last > 20  # blobs, a manifest and an entry: at least three steps each
