"""Pending: everything that waits in a line's queue, merged one after the other by the steps of the chain.

A submission that can never be merged is put aside with a reason, and the next one is taken. A run that is killed
anywhere leaves nothing to repair: the next one takes up the same submission, finds the steps that were done, looks in
the line's journal whether the merge was committed, and comes to the same refs. Two runs at once do no harm either.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from prefect import get_run_logger
from prefect.runtime import flow_run

from flows import notices, steps
from flows.policy import run_now
from flows.workplace import here
from storage.address import open_objects
from storage.errors import Conflict, DeltaworksError, InvalidInput, Mismatch
from storage.events import Submission
from storage.lines import Entry, Fold, Line
from storage.queue import Queue
from storage.refs import CheckpointRef, UpdateRef, parse_ref, short
from tasks.inbox import fingerprint, offer_at, task_name
from tasks.intake import Intake, intake_of
from tasks.recipe import Recipe
from tasks.register import step_key

TRIES = 5  # deaths of runs over the same submission, after which it is put aside: it may be what kills them
# What a submission itself is to blame for. Anything else ends the run, and the submission waits for the next one.
_ITS_FAULT = (InvalidInput, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Folded:
    """What a run came to: the line's new entries, what was put aside, and how many versions were registered."""

    line: str
    merged: tuple[Entry, ...] = ()
    quarantined: tuple[Submission, ...] = ()
    versions: tuple[int, ...] = ()


def take_in(reference: str, line: str, base: str = "", content: str = "", task: str = "", weight: float = 1.0) -> None:
    """Queue a checkpoint unless it is queued. What is empty is found out: the line's base, the digest, the name."""
    objects = here().store.objects
    queue, head = Queue(objects, line), Line(objects, line).head()
    if not content and reference.startswith("checkpoint/"):
        content = parse_ref(reference, "checkpoint").partition("/")[2]
    if not content:
        place = open_objects(reference)
        content = fingerprint(place, offer_at(place))
    tuned_from = CheckpointRef(parse_ref(base or head.base, "checkpoint"))
    name = task_name(task or reference.rstrip("/").rpartition("/")[2])
    one, is_new = queue.submit(content, reference, tuned_from, name, weight)
    get_run_logger().info("line %s: %s is %s", line, one.task, "queued" if is_new else one.state)


def work_off(line: str, at_most: int | None = None) -> Folded:
    """Merge what waits, oldest first, and register a version for each merge. Inside whichever flow calls it.

    at_most: end after so many submissions, and leave the others to the next run.
    """
    place = here()
    queue, journal = Queue(place.store.objects, line), Line(place.store.objects, line)
    journal.head()  # a line that does not exist is said at once
    intake = intake_of(queue, journal, place.store)
    merged, aside, versions, seen = [], [], register_new(journal), 0
    while (at_most is None or seen < at_most) and (one := queue.next()) is not None:
        seen += 1
        entry = _take(queue, one, journal, intake)
        if entry is not None:
            merged.append(entry)
            versions += register_new(journal)
        elif (now := queue.find(one.content)) is not None and now.state == "quarantined":
            aside.append(now)
            notices.quarantined(line, now)
    found = Folded(line, tuple(merged), tuple(aside), tuple(versions))
    notices.worked_off(found, queue.submissions())
    return found


def _take(queue: Queue, one: Submission, journal: Line, intake: Intake) -> Entry | None:
    """Merge one submission; None if it was put aside."""
    log = get_run_logger()
    try:
        started = queue.start(one.content, by=_myself())
    except Conflict:  # another run ended it in this moment
        return None
    if started.tries > TRIES:
        reason = f"{TRIES} runs started on it, and none of them came to an end"
        queue.quarantine(one.content, "Killed", f"{reason}: it may take more memory or time than there is")
        return None
    log.info("line %s: %s from %s, content %s", queue.line, one.task, one.reference, one.content[:12])
    try:
        update = _prepare(queue.line, one, journal.head().base, intake)
        entry = _join(journal, one, update)
    except _ITS_FAULT as error:
        queue.quarantine(one.content, type(error).__name__, str(error))
        return None
    except DeltaworksError as error:
        queue.release(one.content, str(error))
        raise
    queue.merge(one.content, entry.number)
    log.info("line %s: %s is entry %s, state %s", queue.line, one.task, entry.number, short(entry.state or ""))
    return entry


def _prepare(line: str, one: Submission, base: CheckpointRef, intake: Intake) -> UpdateRef:
    """The way of a submission to an update of the line's base."""
    if one.base != base:
        raise Mismatch(
            f"the base of {one.task!r}",
            expected=f"that of line {line!r}, {short(base)}",
            found=short(one.base),
            remedy="Submit it to a line of its own base",
        )
    tuned = run_now(steps.receive, f"{line}: receive {one.task}", one.content, one.reference, base)
    update = run_now(steps.extract, f"{line}: extract {one.task}", base, tuned, intake.extract)
    small: UpdateRef = run_now(steps.compress, f"{line}: compress {one.task}", update, intake.codec)
    return small


def _join(journal: Line, one: Submission, update: UpdateRef) -> Entry:
    """The entry that holds `update`: made now, or by a run before, even if the line was rolled back since."""
    while True:
        head = journal.head()  # before it is searched: what comes in between makes the commit fail
        held = journal.holding(update)
        if held is not None:
            return held
        recipe = Recipe.from_spec(head.merger, f"line {journal.name!r}")
        label = f"{journal.name}: merge {one.task}"
        state = run_now(steps.fold, label, head.base, head.state, update, recipe, one.weight)
        folded = Fold(one.task, update, state, one.weight, head.factor)
        try:
            entry: Entry = run_now(steps.commit, f"{journal.name}: commit {one.task}", journal.name, head, folded)
        except Conflict:
            continue  # others merged something else: fold again onto that
        return entry


def register_new(journal: Line) -> list[int]:
    """A version in MLflow for each merge at the end of the line's history that has none yet, oldest first."""
    place = here()
    history = journal.history()
    count = len(history)
    while count and place.registry.find(journal.name, step_key(place.store, journal.name, history[:count])) is None:
        count -= 1
    versions = []
    for entry in history[count:]:
        if entry.state is None or not place.store.has(entry.state):
            continue  # an older state that was pruned: its version is the business of whoever wants it back
        written = (entry.base, entry.state) if entry.factor == 1 else (entry.base, entry.state, entry.factor)
        model = run_now(steps.materialize, f"{journal.name}: write {entry.task}", *written)
        label = f"{journal.name}: register {entry.task}"
        version = run_now(steps.register, label, journal.name, journal.name, history[: entry.step], model)
        versions.append(version.version)
    return versions


def _myself() -> str:
    """Who works, for people who look: the run in Prefect, or the process."""
    return f"run {flow_run.id}" if flow_run.id else f"process {os.getpid()} on {socket.gethostname()}"
