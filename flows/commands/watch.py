"""`deltaworks watch`: an inbox that is looked at again and again, in a process of its own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from flows.terminal import called, console, errors_explained, open_workplace
from flows.words import interval
from storage.errors import InvalidInput

if TYPE_CHECKING:
    from flows.watch import Bell


def watch(
    source: Annotated[
        str,
        typer.Argument(help="The inbox: s3://bucket/inbox, a folder, or models:/NAME, a registered model of MLflow."),
    ],
    line: Annotated[str, typer.Option("--line", metavar="NAME", help="The line that checkpoints are queued for.")],
    every: Annotated[str, typer.Option(metavar="TIME", help="From one look to the next: 5s, 500ms, 2m.")] = "5s",
    once: Annotated[bool, typer.Option("--once", help="End when nothing is left that changes.")] = False,
    sqs: Annotated[
        str | None, typer.Option(metavar="URL", help="A queue (SQS) that the bucket writes to: look when it says so.")
    ] = None,
) -> None:
    """Watch an inbox, and queue each complete new checkpoint once.

    Complete is what looks the same at two looks and lacks none of the files that its index names, or has a file
    _SUCCESS that is as new as the others. The same content again, or a restart, queues nothing twice.

    Of a registered model, every new version is copied into the store; those of Deltaworks itself are left out.

    With PREFECT_API_URL, the event deltaworks.checkpoint.created is sent for each, until Prefect has taken it.

    Examples:  deltaworks watch s3://models/inbox --line support        deltaworks watch ./inbox --line support --once

               deltaworks watch models:/support-tuned --line support
    """
    with errors_explained():
        pause = interval(every)
        open_workplace()
        from flows.watch import keep_watching

        bell = _bell(sqs, once)

        if not os.environ.get("PREFECT_API_URL") and not once:
            console.print(f"PREFECT_API_URL is not set: merge with {called()} merge-pending --line {line}")
        console.print(f"watching {source} for line {line}, every {pause:g} s")

        def say(text: str) -> None:
            console.print(text, markup=False, soft_wrap=True)

        try:
            count = keep_watching(source, line, pause, say, lasting=None, once=once, bell=bell)
        except KeyboardInterrupt:
            console.print("stopped")
            return
        console.print(f"{count} queued")


def _bell(sqs: str | None, once: bool) -> Bell | None:
    if sqs is None:
        return None
    if once:
        raise InvalidInput("--sqs waits for notices, and --once does not wait", remedy="Leave one of them out")
    from storage.s3_queue import S3Queue

    return S3Queue(sqs)
