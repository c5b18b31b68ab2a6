"""Pending: everything that waits in a line's queue, merged one after the other by the steps of the chain.

A submission that can never be merged, or that the line's gate leaves out, is put aside with a reason, and the next one
is taken. A run that is killed anywhere leaves nothing to repair: the next one takes up the same submission, finds the
steps that were done, looks in the line's journal whether the merge was committed, and comes to the same refs. Two runs
at once do no harm either.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from prefect import get_run_logger
from prefect.runtime import flow_run

from flows import notices, steps
from flows.examining import Examined, Examiner, examiner_of, register_examined
from flows.notices import Folded
from flows.policy import run_now
from flows.registering import kept, patiently
from flows.retrying import alternatives, commit
from flows.workplace import here
from storage.address import open_objects
from storage.errors import Conflict, DeltaworksError, InvalidInput, Mismatch
from storage.events import Submission
from storage.lines import Entry, Fold, Line, after_fold
from storage.queue import Queue
from storage.refs import CheckpointRef, StateRef, UpdateRef, parse_ref, short
from tasks.inbox import fingerprint, offer_at, task_name
from tasks.intake import Intake, intake_of
from tasks.recipe import Recipe
from tasks.register import step_key

TRIES = 5  # deaths of runs over the same submission, after which it is put aside: it may be what kills them
GATE = "Gate"  # the kind of what the line's gate put aside


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
    state = "queued" if is_new else one.state
    get_run_logger().info("line %s: %s is %s", line, one.task, state, extra=_about(line, one, reference))


def work_off(line: str, at_most: int | None = None) -> Folded:
    """Merge what waits, oldest first, and register a version for each merge. Inside whichever flow calls it.

    at_most: end after so many submissions, and leave the others to the next run.
    """
    place = here()
    queue, journal = Queue(place.store.objects, line), Line(place.store.objects, line)
    journal.head()  # a line that does not exist is said at once
    intake = intake_of(queue, journal, place.store)
    examiner = examiner_of(queue, journal)
    merged, aside, versions, seen = [], [], register_new(journal, examiner), 0
    while (at_most is None or seen < at_most) and (one := queue.next()) is not None:
        seen += 1
        entry = _take(queue, one, journal, intake, examiner)
        if entry is not None:
            merged.append(entry)
            versions += register_new(journal, examiner)
        elif (now := queue.find(one.content)) is not None and now.state == "quarantined":
            aside.append(now)
            notices.quarantined(line, now)
    found = Folded(line, tuple(merged), tuple(aside), tuple(versions))
    notices.worked_off(found, queue.submissions())
    return found


class _Unfit(Exception):
    """A submission that is put aside: of which kind its trouble is, and the reason."""

    def __init__(self, kind: str, why: str) -> None:
        self.kind, self.why = kind, why
        super().__init__(why)


@contextmanager
def _its_fault() -> Iterator[None]:
    """What the submission itself is to blame for: it was read, and cannot be used. Nothing else is: a bug of ours, or
    a service that is away, ends the run, and the submission waits for the next one."""
    try:
        yield
    except InvalidInput as error:
        raise _Unfit(type(error).__name__, str(error)) from error


def _take(queue: Queue, one: Submission, journal: Line, intake: Intake, examiner: Examiner | None) -> Entry | None:
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
    about = _about(queue.line, one, one.reference)
    log.info("line %s: %s from %s, content %s", queue.line, one.task, one.reference, one.content[:12], extra=about)
    try:
        with _its_fault():
            update = _prepare(queue.line, one, journal.head().base, intake)
        entry, examined = _join(journal, one, update, examiner)
    except _Unfit as error:
        log.warning("line %s: %s is put aside: %s: %s", queue.line, one.task, error.kind, error.why, extra=about)
        queue.quarantine(one.content, error.kind, error.why)
        return None
    except Exception as error:
        why = str(error) if isinstance(error, DeltaworksError) else f"{type(error).__name__}: {error}"
        queue.release(one.content, why)
        log.warning("line %s: %s waits for the next run: %s", queue.line, one.task, why, extra=about)
        raise
    kind, why = examined.noted if examined else ("", "")
    queue.merge(one.content, entry.number, kind, why or entry.why)
    said = f"entry {entry.number}, state {short(entry.state or '')}{kind and f', {kind}'}"
    log.info("line %s: %s is %s", queue.line, one.task, said, extra=_about(queue.line, one, entry.state or ""))
    return entry


def _about(line: str, one: Submission, ref: str) -> dict[str, str]:
    """What a log line is about, as fields, for logs that are written as JSON; Prefect adds the run."""
    return {"line": line, "task": one.task, "content": one.content, "ref": ref}


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


def _join(
    journal: Line, one: Submission, update: UpdateRef, examiner: Examiner | None
) -> tuple[Entry, Examined | None]:
    """The entry that holds `update`: made now, or by a run before, even if the line was rolled back since; and what the
    line's exam says of it. _Unfit if the gate leaves it out."""
    while True:
        head = journal.head()  # before all else is read: what comes in between makes the commit fail
        before = journal.steps() if examiner else []
        held = journal.holding(update)
        if held is not None:
            return held, _examined_again(examiner, before, held)
        with _its_fault():
            state = _fold(journal.name, head, one, update)
        entry, found = after_fold(head, Fold(one.task, update, state, one.weight, head.factor)), None
        if examiner is not None:
            entry, found = _examined(examiner, before, entry)
            if not examiner.lets_in(found):
                version = examiner.register_left_out(before, entry, found)
                notices.judged(journal.name, entry, version, found)
                raise _Unfit(GATE, found.noted[1])
        try:
            return commit(journal.name, head, entry), found
        except Conflict:
            continue  # others merged something else: fold again onto that


def _examined(examiner: Examiner, before: list[Entry], entry: Entry) -> tuple[Entry, Examined]:
    """What the exam says of a fold; if its gate refuses it, the first of what that lists that passes, and of that."""
    first = examiner.examine(before, entry)
    if first.verdict is None or first.verdict.passed:
        return entry, first
    for other in alternatives(examiner.line, entry, before, examiner.retry, first.verdict.reasons):
        found = examiner.examine(before, other.entry)
        if found.verdict is not None and found.verdict.passed:
            return other.entry, found
    return entry, first


def _fold(line: str, head: Entry, one: Submission, update: UpdateRef) -> StateRef:
    recipe = Recipe.from_spec(head.merger, f"line {line!r}")
    label = f"{line}: merge {one.task}"
    state: StateRef = run_now(steps.fold, label, head.base, head.state, update, recipe, one.weight)
    return state


def _examined_again(examiner: Examiner | None, in_line: list[Entry], held: Entry) -> Examined | None:
    """What was said of an entry that a run before committed; nothing if it is no longer in the line."""
    place = next((at for at, entry in enumerate(in_line) if entry == held), None)
    return None if examiner is None or place is None else examiner.examine(in_line[:place], held)


def register_new(journal: Line, examiner: Examiner | None = None) -> list[int]:
    """A version in MLflow for each merge at the end of the line that has none yet, oldest first."""
    place = here()
    in_line = journal.steps()
    count = len(in_line)
    with kept(journal.name, "its newest merge"):
        while count:
            key = step_key(place.store, journal.name, in_line[:count])
            if patiently(partial(_version_of, journal.name, key)) is not None:
                break
            count -= 1
    versions = []
    for number, entry in enumerate(in_line[count:], count):
        if entry.state is None or not place.store.has(entry.state):
            continue  # an older state that was pruned: its version is the business of whoever wants it back
        found = None if examiner is None else examiner.examine(in_line[:number], entry)
        version = register_examined(journal.name, in_line[: number + 1], found)
        if version.fresh and found is not None:
            notices.judged(journal.name, entry, version, found)
        versions.append(version.version)
    return versions


def _version_of(line: str, key: str) -> int | None:
    return here().registry.find(line, key)  # opened here too: without an answer, that fails


def _myself() -> str:
    """Who works, for people who look: the run in Prefect, or the process."""
    return f"run {flow_run.id}" if flow_run.id else f"process {os.getpid()} on {socket.gethostname()}"
