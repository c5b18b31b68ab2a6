"""What waits in a queue is merged in its order, the bad put aside, and a killed run goes on to the same refs."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import examining, pending
from flows.notices import QUARANTINED, Folded, announce_waiting
from flows.service import merge_pending
from flows.workplace import here
from storage.errors import Missing, Unavailable
from storage.lines import Line
from storage.queue import Queue
from storage.refs import CheckpointRef
from storage.verify import verify, verify_lines
from tasks.compress import compress_update
from tasks.extract import Extract, extract_update
from tasks.ingest import Checkpoint, ingest
from tasks.join import join_line
from tasks.mergers import Opcm
from tasks.recipe import Recipe
from tests.builders import memory_store, perturbed
from tests.flows.arrivals import BAD, INTAKE, LINE, MODEL, open_line, submit, tuned

# the libraries are imported once, by a process that has no threads when it forks
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([__name__])

pytestmark = [pytest.mark.usefixtures("prefect_server", "home"), pytest.mark.filterwarnings("ignore:.*is_gradient")]


@pytest.fixture
def base(tmp_path: Path, home: Path, tables: Path) -> CheckpointRef:
    home.mkdir()
    shutil.copy(tables, home)
    return open_line(tmp_path)


def queue() -> Queue:
    return Queue(here().store.objects, LINE)


def journal() -> Line:
    return Line(here().store.objects, LINE)


def by_hand(tmp_path: Path, seeds: list[int]) -> list[str]:
    """The states that come of folding these fine-tunings in this order, without a queue."""
    store = memory_store()
    base = ingest(Checkpoint(source=str(tmp_path / "base")), store)
    line = Line(store.objects, LINE)
    line.open(base, Recipe(Opcm()).spec())
    states = []
    for seed in seeds:
        after = ingest(Checkpoint(source=str(tuned(tmp_path / "by-hand" / str(seed), seed))), store)
        update = compress_update(extract_update(base, after, Extract(), store), INTAKE.codec, store)
        states.append(str(join_line(line, update, store).entry.state))
    return states


def test_three_at_once_are_merged_in_their_order_and_the_bad_are_put_aside(base: CheckpointRef, tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    names = ["one", "nan", "unreadable", "two", "pickled", "other-base", "strange", "three"]
    seeds = {name: seed for seed, name in enumerate(names, 1)}
    for name in names:
        make = BAD[name][0] if name in BAD else tuned
        submit(make(inbox / name, seeds[name]), base)  # type: ignore[operator]
    found = merge_pending(LINE)
    assert [entry.task for entry in found.merged] == ["one", "two", "three"]
    assert [str(entry.state) for entry in found.merged] == by_hand(
        tmp_path, [seeds[one] for one in ("one", "two", "three")]
    )
    assert found.versions == (1, 2, 3)
    aside = {one.task: one for one in found.quarantined}
    assert set(aside) == set(BAD)
    for name, (_, kind, said) in BAD.items():
        assert kind in aside[name].kind and said in aside[name].why, aside[name]

    client = MlflowClient(here().settings.tracking)
    versions = [client.get_model_version(LINE, str(number)) for number in (1, 2, 3)]
    assert [one.tags["task"] for one in versions] == ["one", "two", "three"]
    assert [one.tags["parent_version"] for one in versions] == ["none", "1", "2"]
    assert int(client.get_model_version_by_alias(LINE, "head").version) == 3
    assert not verify(here().store, here().store.refs()).findings
    assert merge_pending(LINE) == Folded(LINE)

    said = artifacts(f"{LINE}-quarantine")
    assert len(said) == len(BAD)
    assert any("pickles" in text for text in said)
    assert "entry 1" in artifacts(f"{LINE}-pending")[0]
    assert await_events(QUARANTINED, set(BAD)) == set(BAD)


def artifacts(key: str) -> list[str]:
    with get_client(sync_client=True) as client:
        body = {"artifacts": {"key": {"any_": [key]}}}
        return [str(one["data"]) for one in client.request("POST", "/artifacts/filter", json=body).json()]


def await_events(name: str, wanted: set[str]) -> set[str]:
    """Those of the wanted resources that an event of this kind tells of. The server takes a moment to write them down,
    and has those of other tests too."""
    found: set[str] = set()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with get_client(sync_client=True) as client:
            body = {"filter": {"event": {"name": [name]}}}
            events = client.request("POST", "/events/filter", json=body).json()["events"]
        found = wanted & {one["resource"]["prefect.resource.name"] for one in events}
        if found == wanted:
            break
        time.sleep(0.2)
    return found


def test_the_same_content_twice_is_merged_once(base: CheckpointRef, tmp_path: Path) -> None:
    first, again = tuned(tmp_path / "first", 1), tuned(tmp_path / "again", 1)
    assert submit(first, base) == submit(again, base)
    assert len(merge_pending(LINE).merged) == 1
    submit(again, base)
    assert merge_pending(LINE) == Folded(LINE)
    # sharded otherwise it is other files, but the same update: the line has it
    perturbed(MODEL, 1).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    submit(tmp_path / "sharded", base)
    merge_pending(LINE)
    assert [one.state for one in queue().submissions()] == ["merged", "merged"]
    assert [one.entry for one in queue().submissions()] == [1, 1]
    assert journal().head().number == 1


def test_what_was_put_aside_comes_back_at_the_end(base: CheckpointRef, tmp_path: Path) -> None:
    """Its folder was gone for a while."""
    place = tuned(tmp_path / "gone", 1)
    content = submit(place, base)
    place.rename(tmp_path / "moved")
    submit(tuned(tmp_path / "second", 2), base)
    found = merge_pending(LINE)
    assert [one.task for one in found.quarantined] == ["gone"]
    queue().requeue(content, "it was moved", str(tmp_path / "moved"))
    assert [entry.task for entry in merge_pending(LINE).merged] == ["gone"]
    assert [entry.task for entry in journal().history()] == ["second", "gone"]


def test_a_submission_for_another_base_is_put_aside(base: CheckpointRef, tmp_path: Path) -> None:
    submit(tuned(tmp_path / "one", 1), CheckpointRef(f"checkpoint/{'1' * 64}"))  # type: ignore[arg-type]
    (one,) = merge_pending(LINE).quarantined
    assert (one.kind, "the base of 'one'" in one.why) == ("Mismatch", True)


def test_a_line_that_is_not_there_is_said(base: CheckpointRef) -> None:
    with pytest.raises(Missing, match="there is no line 'other'"):
        merge_pending("other")


def test_a_store_that_does_not_answer_is_nobodys_fault(
    base: CheckpointRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The submission waits for the next run, however often that happens."""
    content = submit(tuned(tmp_path / "one", 1), base)
    with monkeypatch.context() as patch:
        patch.setattr(pending, "_prepare", lambda *_: (_ for _ in ()).throw(Unavailable("the store is away")))
        for _ in range(2):
            with pytest.raises(Unavailable):
                merge_pending(LINE)
    found = queue().find(content)
    assert found is not None and (found.state, found.tries, found.why) == ("pending", 0, "the store is away")
    assert len(merge_pending(LINE).merged) == 1


def test_what_kills_every_run_is_put_aside(base: CheckpointRef, tmp_path: Path) -> None:
    deadly, good = submit(tuned(tmp_path / "deadly", 1), base), submit(tuned(tmp_path / "good", 2), base)
    for _ in range(pending.TRIES):
        queue().start(deadly, "a run that was killed")
    found = merge_pending(LINE)
    assert [(one.content, one.kind) for one in found.quarantined] == [(deadly, "Killed")]
    assert [one.content for one in queue().submissions() if one.state == "merged"] == [good]


def test_a_merge_that_was_rolled_back_meanwhile_is_not_made_again(base: CheckpointRef, tmp_path: Path) -> None:
    """The run died between the commit and the queue's note, and somebody took the merge back before the next run."""
    content = submit(tuned(tmp_path / "one", 1), base)
    beginning = journal().head()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Queue, "merge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge_pending(LINE)
    assert journal().head().number == 1
    journal().rollback(beginning, "it hurt")
    assert merge_pending(LINE).versions == ()
    assert journal().head().action == "rollback"
    found = queue().find(content)
    assert found is not None and (found.state, found.entry) == ("merged", 1)


# a process dies at these steps: right before they begin, or right after they ended
DEATHS = [f"{when} {step}" for step in ("receive", "extract", "compress", "merge", "commit", "write", "register")
              for when in ("before", "after")]  # fmt: skip


def dying(death: str, home: str, api: str) -> None:
    """Merge what waits, and be killed there."""
    os.environ["DELTAWORKS_HOME"] = home
    when, _, step = death.partition(" ")
    run_now = pending.run_now

    def deadly(task: Any, label: str, *inputs: Any) -> Any:
        is_there = label.split(": ")[1].startswith(f"{step} two")
        if is_there and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        found = run_now(task, label, *inputs)
        if is_there:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    pending.run_now = examining.run_now = deadly
    with temporary_settings({PREFECT_API_URL: api}):
        merge_pending(LINE)


@pytest.mark.slow
def test_a_run_killed_at_every_step_goes_on(base: CheckpointRef, tmp_path: Path, tables: Path) -> None:
    """Each death in a store of its own; a second run ends what the first began."""
    wanted = by_hand(tmp_path, [1, 2, 3])
    api = PREFECT_API_URL.value()
    assert api
    for number, death in enumerate(DEATHS):
        with pytest.MonkeyPatch.context() as patch:
            home = tmp_path / f"home-{number}"
            home.mkdir()
            shutil.copy(tables, home)
            patch.setenv("DELTAWORKS_HOME", str(home))
            open_line(tmp_path / f"again-{number}")
            for seed, name in enumerate(("one", "two", "three"), 1):
                submit(tuned(tmp_path / "inbox" / name, seed), base)
            process = _SERVER.Process(target=dying, args=(death, str(home), api))
            process.start()
            process.join()
            assert process.exitcode == -signal.SIGKILL, death
            left = queue().next()
            assert left is not None and left.task in ("two", "three"), death
            merge_pending(LINE)
            assert [str(entry.state) for entry in journal().history()] == wanted, death
            assert journal().head().number == 3, death
            assert {one.state for one in queue().submissions()} == {"merged"}, death
            client = MlflowClient(here().settings.tracking)
            assert len(client.search_model_versions(f"name = '{LINE}'")) == 3, death
            assert not verify_lines(here().store), death


def test_events_are_posted_once_and_again_after_an_outage(
    base: CheckpointRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(tuned(tmp_path / "told", 1), base)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}), pytest.raises(Unavailable, match="'told'"):
        announce_waiting(queue())
    assert announce_waiting(queue()) == 1
    assert announce_waiting(queue()) == 0
    assert await_events("deltaworks.checkpoint.created", {"told"})
