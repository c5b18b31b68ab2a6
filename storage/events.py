"""Events of a queue, and what they say together: the state of every submission.

A submission is pending, running, merged, quarantined or discarded. Its state is nowhere written down: it follows from
the events, each of which had to fit those before it (storage/queue.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from storage.errors import Conflict, Damaged, InvalidInput
from storage.refs import parse_ref
from storage.trust import check_count, check_digest, check_mapping, check_name, check_number

Action = Literal["policy", "submit", "announce", "start", "release", "merge", "quarantine", "requeue", "discard"]
State = Literal["pending", "running", "merged", "quarantined", "discarded"]

ACTIONS: tuple[str, ...] = get_args(Action)
STATES: tuple[str, ...] = get_args(State)

# action -> the states that it may follow, and the one that it leads to
_MOVES: Mapping[str, tuple[frozenset[str], State]] = {
    "start": (frozenset({"pending", "running"}), "running"),
    "release": (frozenset({"running"}), "pending"),
    # what is in the line is merged, even if somebody else gave it up meanwhile
    "merge": (frozenset({"pending", "running", "quarantined", "discarded"}), "merged"),
    "quarantine": (frozenset({"pending", "running"}), "quarantined"),
    "requeue": (frozenset({"quarantined", "discarded"}), "pending"),
    "discard": (frozenset({"pending", "running", "quarantined"}), "discarded"),
}


@dataclass(frozen=True)
class Event:
    """One thing that happened in a queue. Which fields count depends on the action.

    content:   sha256 of what was submitted; every action but `policy` is about one
    reference: where it is: a ref of the store, a folder, an address (submit; requeue, if it has moved)
    base:      ref of the checkpoint that it was tuned from (submit)
    task:      what the line's journal will call it; `weight`: how much it will count (submit)
    by:        who works on it (start)
    entry:     number of the line's entry that holds it (merge)
    kind, why: of which kind the trouble was, and the reason in words; of a merge, what the line's gate said of it
    policy:    how submissions become updates: `extract` and `codec`, as their specs; `exam`: what merges are asked
    """

    number: int
    action: Action
    content: str = ""
    reference: str = ""
    base: str = ""
    task: str = ""
    weight: float = 1.0
    by: str = ""
    entry: int = 0
    kind: str = ""
    why: str = ""
    policy: Mapping[str, Any] = field(default_factory=dict)
    at: str = ""

    def as_json(self) -> dict[str, Any]:
        """Only what differs from the defaults."""
        defaults = Event(-1, "policy", at="-")
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**{k: v for k, v in found.items() if v != getattr(defaults, k)}, "action": self.action}


@dataclass(frozen=True)
class Submission:
    """A checkpoint that was submitted, as it stands. `number` is its place: lower ones are merged first.

    arrived, since: when it was submitted, and when it came into its state
    announced:      whether an event told others of it
    tries:          how often somebody started on it and was not heard of again
    """

    number: int
    content: str
    reference: str
    base: str
    task: str
    weight: float
    arrived: str
    since: str
    state: State = "pending"
    announced: bool = False
    tries: int = 0
    by: str = ""
    entry: int = 0
    kind: str = ""
    why: str = ""


class Book:
    """All events so far, and what they come to."""

    def __init__(self) -> None:
        self.count = 0
        self.policy: Mapping[str, Any] = {}
        self.known: dict[str, Submission] = {}

    def ordered(self) -> list[Submission]:
        """Every submission, in the order of merging."""
        return sorted(self.known.values(), key=lambda one: one.number)

    def allows(self, action: str, content: str) -> bool:
        """Whether this could happen next."""
        held = self.known.get(content)
        if action == "policy":
            return True
        if action == "submit":
            return held is None
        if held is None:
            return False
        return not held.announced if action == "announce" else held.state in _MOVES[action][0]

    def add(self, event: Event) -> None:
        """Take in the next event. Damaged if it does not fit those before it."""
        if not self.allows(event.action, event.content):
            held = self.known.get(event.content)
            state = held.state if held else "unknown"
            raise Damaged(
                f"event {event.number} of a queue says {event.action} of {event.content[:12]}, which is {state}"
            )
        self.count += 1
        if event.action == "policy":
            self.policy = dict(event.policy)
        elif event.action == "submit":
            self.known[event.content] = Submission(
                event.number, event.content, event.reference, event.base, event.task, event.weight, event.at, event.at
            )
        else:
            self.known[event.content] = _after(self.known[event.content], event)


def _after(held: Submission, event: Event) -> Submission:
    """A submission after one more event about it."""
    if event.action == "announce":
        return replace(held, announced=True)
    now = replace(held, state=_MOVES[event.action][1], since=event.at, kind=event.kind, why=event.why)
    match event.action:
        case "start":
            return replace(now, by=event.by, tries=held.tries + 1)
        case "release":
            return replace(now, tries=0)
        case "requeue":
            place = event.reference or held.reference
            return replace(now, number=event.number, tries=0, announced=False, reference=place)
        case "merge":
            return replace(now, entry=event.entry)
        case _:
            return now


def decode_event(data: bytes, number: int, source: str) -> Event:
    """The event in these bytes, which `source` holds."""
    try:
        found = Event(**json.loads(data))
        if found.action not in ACTIONS:
            raise Damaged(f"{source} holds the action {found.action!r}, which this version does not know")
        if found.number != number or isinstance(found.number, bool):
            raise InvalidInput(f"{source}: says that it is event {found.number!r}")
        check_event(found, source)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{source} is not an event of a queue: {error}") from error
    return found


def check_event(event: Event, what: str) -> None:
    """Refuse what no queue may hold: events are shown, and what they name is read."""
    for name in ("reference", "task", "by", "kind", "at"):
        check_name(getattr(event, name), f"{what}, {name}")
    check_name(event.why.replace("\n", " "), f"{what}, why")
    check_number(event.weight, f"{what}, weight")
    check_count(event.entry, f"{what}, entry")
    check_mapping(event.policy, f"{what}, policy")
    if event.action != "policy":
        check_digest(event.content, f"{what}, content")
    if event.action == "submit":
        parse_ref(event.base, "checkpoint")
        if not event.reference or not event.task or not event.weight > 0:
            raise InvalidInput(f"{what}: a submission needs a reference, a task and a positive weight")


def book_of(events: Iterable[Event]) -> Book:
    """What these events come to."""
    book = Book()
    for event in events:
        book.add(event)
    return book


def refuse_move(line: str, action: str, content: str, held: Submission | None) -> Conflict:
    """The error of a person or program that wants what does not fit."""
    if held is None:
        return Conflict(
            f"the queue of line {line!r} has no submission {content[:12]}",
            remedy=f"`deltaworks line status {line}` lists them",
        )
    return Conflict(
        f"{held.task!r} ({content[:12]}) in the queue of line {line!r} is {held.state}: {action} does not apply",
        remedy=f"It applies to what is {' or '.join(sorted(_MOVES[action][0]))}: see `deltaworks line status {line}`",
    )
