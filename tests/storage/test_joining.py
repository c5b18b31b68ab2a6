"""Several processes fold into one line at once, killed and started again: every update ends in it, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.errors import Mismatch, Missing
from storage.lines import Line
from tasks.join import join_line
from tasks.mergers import Average, Opcm
from tasks.recipe import Recipe
from tests.builders import checkpoint_of, random_tensors, update_of
from tests.storage.joining import Contest, Schedule, random_schedule

UPDATES = 5


def play(contest: Contest, seeds: range) -> None:
    """All seeds, and more until enough processes were killed: how many are still at work then depends on the disk."""
    seed = seeds.start
    while seed in seeds or contest.killed <= len(seeds) / 4:
        assert seed < seeds.start + 5 * len(seeds), f"{contest.killed} processes were killed at work"
        name = f"line-{seed}"
        contest.run(name, random_schedule(seed, UPDATES))
        contest.check(name)
        seed += 1


def test_schedules_in_a_folder(tmp_path: Path) -> None:
    play(Contest(f"file://{tmp_path}", UPDATES, Recipe(Average())), range(3))


def test_schedules_of_a_merger_that_depends_on_the_order(tmp_path: Path) -> None:
    play(Contest(f"file://{tmp_path}", UPDATES, Recipe(Opcm())), range(100, 102))


def test_schedules_on_s3(s3_url: str) -> None:
    play(Contest(s3_url, UPDATES, Recipe(Average())), range(200, 202))


@pytest.mark.slow
def test_hundreds_of_schedules_in_a_folder(tmp_path: Path) -> None:
    play(Contest(f"file://{tmp_path}", UPDATES, Recipe(Average())), range(1000, 1300))


@pytest.mark.slow
def test_a_hundred_schedules_on_s3(s3_url: str) -> None:
    play(Contest(s3_url, UPDATES, Recipe(Average())), range(2000, 2100))


def test_who_comes_second_folds_again(tmp_path: Path) -> None:
    """The race itself, with no luck in it: another update enters between reading the head and committing."""
    contest = Contest(f"file://{tmp_path}", 2, Recipe(Average()))
    store = contest.store()
    line = Line(store.objects, "main")
    line.open(contest.base, contest.recipe.spec())
    seen = []

    class Racing(Line):
        def head(self):  # type: ignore[no-untyped-def]
            found = super().head()
            seen.append(found.number)
            if len(seen) == 1:
                join_line(line, contest.updates[0], store)
            return found

    joined = join_line(Racing(store.objects, "main"), contest.updates[1], store, task="second", weight=2.0)
    assert (joined.is_new, joined.lost, seen) == (True, 1, [0, 1])
    assert [(entry.update, entry.weight) for entry in line.history()] == [
        (contest.updates[0], 1.0),
        (contest.updates[1], 2.0),
    ]
    again = join_line(line, contest.updates[0], store)
    assert (again.is_new, again.entry.step) == (False, 1)


def test_what_cannot_be_folded_leaves_the_line_alone(tmp_path: Path) -> None:
    contest = Contest(f"file://{tmp_path}", 1, Recipe(Average()))
    store = contest.store()
    line = Line(store.objects, "main")
    with pytest.raises(Missing, match="no line 'main'"):
        join_line(line, contest.updates[0], store)
    line.open(contest.base, contest.recipe.spec())
    other = checkpoint_of(random_tensors(50), store)
    with pytest.raises(Mismatch, match="base of update"):
        join_line(line, update_of(random_tensors(51), other, store), store)
    assert line.head().number == 0


def test_a_schedule_without_kills_loses_nothing_either(tmp_path: Path) -> None:
    contest = Contest(f"file://{tmp_path}", 4, Recipe(Average()))
    contest.run("main", Schedule([[0, 1, 2, 3], [3, 2, 1, 0], [1, 3], [0]]))
    contest.check("main")
    assert contest.killed == 0
