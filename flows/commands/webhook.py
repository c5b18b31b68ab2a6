"""`deltaworks webhook`: watchers of inboxes, and an endpoint that lets them look as soon as something has come."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.deploy import chosen
from flows.terminal import console, errors_explained, open_workplace
from flows.words import interval
from storage.errors import InvalidInput

if TYPE_CHECKING:
    from flows.webhook import Ringing

SecretFile = Annotated[
    str | None,
    typer.Option("--secret-file", metavar="FILE", help="What signatures are checked with, one secret a line."),
]


def webhook(
    inbox: Annotated[
        list[str],
        typer.Option(
            "--inbox", metavar="LINE=ADDRESS", help="s3://bucket/inbox, models:/NAME or a folder. Repeatable."
        ),
    ],
    secret_file: SecretFile = None,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8090,
    host: Annotated[
        str, typer.Option(help="Address to listen on: keep loopback, and put TLS before it.")
    ] = "127.0.0.1",
    every: Annotated[str, typer.Option(metavar="TIME", help="Look at least so often: messages get lost.")] = "1m",
) -> None:
    """Watch inboxes, and look at once when a signed message says that something has come.

    POST /s3 takes the event notifications of buckets, POST /mlflow the webhooks of MLflow's registry. Both must be
    signed with HMAC-SHA256 (Standard Webhooks; MLflow does it by itself), five minutes old at most, and new.

    The secret is in a file, or in DELTAWORKS_WEBHOOK_SECRET.

    Examples:  deltaworks webhook --inbox support=s3://models/inbox --secret-file webhook.secret
    """
    with errors_explained():
        from flows.deliveries import Deliveries, secrets_of

        secrets = secrets_of(secret_file, os.environ.get("DELTAWORKS_WEBHOOK_SECRET"))
        pause = interval(every)
        place = open_workplace()
        _, inboxes = chosen(place, [], inbox)
        from flows.webhook import Ringing, endpoint

        bells = {address: Ringing() for address in inboxes.values()}
        if len(bells) < len(inbox):
            raise InvalidInput("an inbox or a line is named twice", remedy="Each line has one inbox of its own here")
        application = endpoint(bells, Deliveries(secrets), _say)
        for line, address in inboxes.items():
            _start_watching(line, address, pause, bells[address])
        import uvicorn

        config = uvicorn.Config(
            application, host=host, port=port, log_level="warning", access_log=False, server_header=False,
            limit_concurrency=64, timeout_keep_alive=5,
        )  # fmt: skip
        console.print(f"webhook  http://{host}:{port}/s3 and /mlflow", soft_wrap=True)
        uvicorn.Server(config).run()
        console.print("stopped")


def _start_watching(line: str, address: str, pause: float, bell: Ringing) -> None:
    """A thread that watches. If it ends, the process does: whoever started it starts it again."""
    from flows.watch import keep_watching

    def watch() -> None:
        try:
            with errors_explained():
                keep_watching(address, line, pause, _say, lasting=None, once=False, bell=bell)
        finally:
            os._exit(1)

    _say(f"watching {address} for line {line}, at least every {pause:g} s")
    threading.Thread(target=watch, name=f"watch-{line}", daemon=True).start()


def _say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
