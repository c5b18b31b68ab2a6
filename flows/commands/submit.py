"""`deltaworks submit` and `deltaworks merge-pending`: into a line's queue by hand or from CI, and out of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.terminal import (
    Memory,
    Quiet,
    Verbose,
    Workers,
    called,
    console,
    embedded_prefect,
    errors_explained,
    open_workplace,
)
from storage.errors import InvalidInput, Mismatch, Unavailable

if TYPE_CHECKING:
    from flows.workplace import Workplace
    from storage.events import Submission
    from storage.queue import Queue
    from storage.refs import CheckpointRef

OnLine = Annotated[str, typer.Option("--line", metavar="NAME", help="The line that it is to be merged into.")]


def submit(
    path: Annotated[
        str,
        typer.Argument(
            help="A fine-tuned checkpoint: a folder (safetensors, or an adapter of peft), s3://bucket/folder, "
            "a hub id, or a ref of the store.",
        ),
    ],
    line: OnLine,
    task: Annotated[
        str | None, typer.Option(help="What the line's journal calls it. [default: the folder's name]")
    ] = None,
    weight: Annotated[float, typer.Option(help="How much it counts, in mergers that have weights.")] = 1.0,
    base: Annotated[
        str | None, typer.Option(metavar="REF", help="What it was tuned from; refused if that is not the line's base.")
    ] = None,
) -> None:
    """Put a checkpoint into the queue of a line. The same content a second time does nothing.

    A folder is copied into the store at once and may go away afterwards; s3:// is read when it is merged.

    With PREFECT_API_URL, the event is sent that starts the deployments; without, run `deltaworks merge-pending`.

    Examples:  deltaworks submit ./tuned --line support        deltaworks submit s3://inbox/run-7 --line support
    """
    with errors_explained():
        place = open_workplace()
        from storage.lines import Line
        from storage.queue import Queue
        from storage.refs import CheckpointRef, parse_ref, short
        from tasks.inbox import task_name
        from tasks.intake import intake_of

        journal, queue = Line(place.store.objects, line), Queue(place.store.objects, line)
        head = journal.head()
        if base is not None and (found := place.store.resolve(base)) != head.base:
            raise Mismatch(f"the base of line {line!r}", expected=short(parse_ref(found)), found=short(head.base))
        intake_of(queue, journal, place.store)
        name = task_name(task or Path(path.rstrip("/")).name)
        one, is_new = _submitted(place, queue, path, CheckpointRef(head.base), name, weight)
        if not is_new:
            console.print(f"nothing to do: line {line} has this content already, as {one.task!r}, {one.state}")
            if one.state == "quarantined":
                console.print(f"{one.kind}: {one.why}", markup=False, soft_wrap=True)
                console.print(f"next: {called()} line requeue {line} {one.content[:12]}", soft_wrap=True)
            return
        ahead = sum(other.state in ("pending", "running") for other in queue.submissions()) - 1
        console.print(f"queued {one.task} for line {line}, after {ahead} others: content {one.content[:12]}")
        console.print(f"from {one.reference}", soft_wrap=True)
        if not _told(queue):
            console.print(f"next: {called()} merge-pending --line {line}", soft_wrap=True)


def merge_pending(
    line: Annotated[str, typer.Option("--line", metavar="NAME", help="The line whose queue is merged.")],
    at_most: Annotated[int | None, typer.Option(min=1, help="End after so many submissions.")] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    memory: Memory = None,
    workers: Workers = None,
) -> None:
    """Merge everything that waits for a line, one after the other, and register a version for each.

    With an exam (`line policy --exam`), each merge is evaluated, and the line's gate decides.

    What can never be merged is put aside with a reason, and does not stop the others. Killed anywhere, the same command
    goes on where it stopped. Returns 0 also if something was put aside: `deltaworks line status` tells.

    Examples:  deltaworks merge-pending --line support
    """
    with errors_explained(verbose):
        place = open_workplace(verbose, memory, workers)
        from storage.lines import Line

        place.store.objects.ready()
        Line(place.store.objects, line).head()
        server = embedded_prefect(place)
        from flows import progress
        from flows.board import Board
        from flows.service import merge_pending as flow
        from flows.tables import journal_table
        from storage.queue import Queue

        if server:
            server.await_answer()
        queue = Queue(place.store.objects, line)
        ahead = sum(one.state in ("pending", "running") for one in queue.submissions())
        each = 8 if "exam" in queue.policy() else 7  # receive to register
        with Board(console, quiet, each * ahead) as board:
            progress.watch(board)
            found = flow(line, at_most)
        for one in found.quarantined:
            console.print(f"put aside: {one.task} from {one.reference}: {one.kind}: {one.why}", markup=False)
        if not (found.merged or found.quarantined or found.versions):
            console.print(f"nothing to do: nothing waits for line {line}")
        elif found.merged:
            console.print(journal_table(f"line {line}", list(found.merged)))
        if found.versions:
            console.print(f"versions of {line} in MLflow: {', '.join(str(one) for one in found.versions)}")


def _submitted(
    place: Workplace, queue: Queue, path: str, base: CheckpointRef, task: str, weight: float
) -> tuple[Submission, bool]:
    """Find out what it is, and put it into the queue; a folder of this machine by way of the store."""
    from storage.address import open_objects
    from storage.refs import parse_ref
    from tasks.inbox import fingerprint, lacking, offer_at
    from tasks.receive import receive

    if path.startswith("checkpoint/"):
        ref = parse_ref(place.store.resolve(path), "checkpoint")
        return queue.submit(ref.partition("/")[2], ref, base, task, weight)
    address = path if path.startswith("s3://") else str(_folder(path))
    source = open_objects(address)
    offer = offer_at(source)
    if missing := lacking(source, offer):
        raise InvalidInput(f"{path} is not complete: it lacks {missing}", remedy="Submit it when everything is there")
    content = fingerprint(source, offer)
    if (held := queue.find(content)) is not None:
        return held, False
    reference = address if address.startswith("s3://") else receive(content, address, base, place.store)
    return queue.submit(content, reference.rstrip("/"), base, task, weight)


def _folder(path: str) -> Path:
    from tasks.ingest import Checkpoint, locate

    return locate(Checkpoint(source=path)).absolute()


def _told(queue: Queue) -> bool:
    """Send the events that wait to be sent, if there is a server to send them to."""
    if not os.environ.get("PREFECT_API_URL"):
        return False
    from flows.notices import announce_waiting

    try:
        count = announce_waiting(queue)
    except Unavailable as error:
        console.print(f"{error}", markup=False, soft_wrap=True)
        return False
    console.print(f"told Prefect at {os.environ['PREFECT_API_URL']} of {count}", soft_wrap=True)
    return True
