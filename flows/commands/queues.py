"""The `deltaworks line` commands of a queue: what waits, what was put aside, and what becomes of that."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from flows.terminal import called, console, errors_explained, open_workplace
from storage.errors import InvalidInput, Missing

if TYPE_CHECKING:
    from flows.workplace import Workplace
    from storage.events import Submission
    from storage.queue import Queue

Name = Annotated[str, typer.Argument(help="Name of the line, such as demo-opcm.")]
Which = Annotated[str, typer.Argument(metavar="SUBMISSION", help="Its task, or the beginning of its content's digest.")]
_SHOWN = 20  # of each state


def line_status(
    name: Name,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for monitoring.")] = False,
) -> None:
    """Print what waits to be merged into a line, what runs, what was merged, and what was put aside and why.

    With --json: counts, queue_length, oldest_pending_seconds, failures by kind, and each submission not merged.

    Examples:  deltaworks line status support        deltaworks line status support --json | jq .queue_length
    """
    with errors_explained():
        place = open_workplace()
        from storage.waiting import waiting

        queue = _queue(place, name)
        submissions = queue.submissions()
        found = waiting(name, submissions)
        if as_json:
            others = [one for one in submissions if one.state != "merged"]
            listed = [_plain(one) for one in others]
            print(json.dumps({**found.as_json(), "head": _head(place, name), "submissions": listed}, indent=2))
            return
        counts = ", ".join(f"{number} {state}" for state, number in found.counts.items() if number)
        console.print(f"line {name}: {counts or 'nothing was ever submitted'}")
        if found.length:
            console.print(f"the first of {found.length} has waited for {_lasted(found.oldest)}")
        _show(submissions)
        if found.failures:
            console.print(
                f"next: {called()} line requeue {name} TASK    or    line discard {name} TASK", soft_wrap=True
            )


def line_requeue(
    name: Name,
    which: Which,
    why: Annotated[str, typer.Option(help="The reason, for the record.")] = "",
    source: Annotated[
        str | None, typer.Option("--from", metavar="PATH", help="Where its files are now, if they have moved.")
    ] = None,
) -> None:
    """Put a quarantined or discarded submission at the end of the queue again.

    Examples:  deltaworks line requeue support billing --why "the base was ingested again"
    """
    with errors_explained():
        queue = _queue(open_workplace(), name)
        one = _find(queue, which)
        queue.requeue(one.content, why, source or "")
        console.print(f"{one.task} waits again, as the last of {_length(queue)}")


def line_discard(
    name: Name,
    which: Which,
    why: Annotated[str, typer.Option(help="The reason, for the record.")] = "",
) -> None:
    """Give a submission up. It stays on record, and `line requeue` brings it back.

    Examples:  deltaworks line discard support billing --why "trained on the wrong data"
    """
    with errors_explained():
        queue = _queue(open_workplace(), name)
        one = _find(queue, which)
        queue.discard(one.content, why)
        console.print(f"{one.task} is discarded; {_length(queue)} left in the queue")


def _queue(place: Workplace, name: str) -> Queue:
    from storage.lines import Line
    from storage.queue import Queue

    if name not in Line.names(place.store.objects) and name not in Queue.names(place.store.objects):
        known = ", ".join(Line.names(place.store.objects)) or "none yet"
        raise Missing(f"there is no line {name!r} in {place.store.url}", remedy=f"There are: {known}")
    return Queue(place.store.objects, name)


def _find(queue: Queue, which: str) -> Submission:
    """The submission that a person means."""
    found = [
        one for one in queue.submissions() if one.task == which or (len(which) > 3 and one.content.startswith(which))
    ]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{one.task} ({one.content[:12]}, {one.state})" for one in found or queue.submissions())
    problem = "could be several" if found else "is none of the"
    raise InvalidInput(
        f"{which!r} {problem} submissions to line {queue.line!r}",
        remedy=f"Give a task, or digits of the content: {listed or 'nothing was submitted'}",
    )


def _length(queue: Queue) -> int:
    return sum(one.state in ("pending", "running") for one in queue.submissions())


def _head(place: Workplace, name: str) -> dict[str, object] | None:
    from storage.lines import Line

    try:
        head = Line(place.store.objects, name).head()
    except Missing:
        return None
    return {"entry": head.number, "step": head.step, "state": head.state, "at": head.at}


def _plain(one: Submission) -> dict[str, object]:
    kept = ("content", "task", "reference", "base", "state", "arrived", "since", "tries", "by", "kind", "why")
    return {name: getattr(one, name) for name in kept}


def _show(submissions: list[Submission]) -> None:
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("state", "task", "content", "since (UTC)", "from", "why"):
        table.add_column(column, no_wrap=column in ("state", "content", "since (UTC)"))
    for state in ("merged", "running", "pending", "quarantined", "discarded"):
        some = [one for one in submissions if one.state == state]
        for one in some[-_SHOWN:] if state == "merged" else some[:_SHOWN]:
            judged = ": ".join(part for part in (one.kind, one.why) if part)
            entry = f"entry {one.entry}{f', {judged}' if judged else ''}"
            why = {"merged": entry, "running": one.by}.get(state) or judged
            when = one.since[:16].replace("T", " ")
            table.add_row(state, escape(one.task), one.content[:12], when, escape(one.reference), escape(why))
        if len(some) > _SHOWN:
            table.add_row(state, f"and {len(some) - _SHOWN} more", "", "", "", "")
    if submissions:
        console.print(table)


def _lasted(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
