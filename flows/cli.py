"""The `deltaworks` command. Thin: it reads arguments, calls the flows, and shows what came of it.

Heavy imports wait until a command needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import signal
import sys
import time
from typing import Annotated

import typer

from flows.commands.champions import champions, promote, rollback
from flows.commands.codecs import codecs, compress
from flows.commands.compare import compare
from flows.commands.deploy import deploy
from flows.commands.export import export
from flows.commands.inspect_update import inspect
from flows.commands.line_fold import line_fold
from flows.commands.line_open import line_open
from flows.commands.lineage import lineage
from flows.commands.lines import line_app
from flows.commands.merge import merge
from flows.commands.policy import line_policy
from flows.commands.questions import contains, diff, reproduce
from flows.commands.queues import line_discard, line_requeue, line_status
from flows.commands.reports import report_app
from flows.commands.rooms import du, pin, pins, prune, unpin
from flows.commands.series import series_app
from flows.commands.similarity import similarity
from flows.commands.store import store_app
from flows.commands.submit import merge_pending, submit
from flows.commands.table import table
from flows.commands.transfer import copy, line_export, line_import, mirror
from flows.commands.tuners import tuners
from flows.commands.up import up
from flows.commands.verify import verify
from flows.commands.watch import watch
from flows.commands.webhook import webhook
from flows.commands.why import why
from flows.terminal import (
    Memory,
    Quiet,
    Verbose,
    Workers,
    console,
    embedded_prefect,
    errors_explained,
    open_workplace,
)

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""
A works for model updates: fine-tune, extract the task vector, compress it, merge it sequentially, evaluate, register.

[bold]Try it[/]

  deltaworks run demo                   six tasks on real data, about a minute

  deltaworks line log demo-opcm         how the merged model came to be

  deltaworks lineage demo-opcm --open   the same as a page, from base to version

  deltaworks line rebuild --help        the same updates, merged otherwise

  deltaworks tuners                     every way to train, and its settings

  deltaworks mergers                    every way to merge, and its settings

  deltaworks codecs                     every way to write an update smaller

  deltaworks inspect UPDATE             which of them fits an update

  deltaworks report mergeability        which tuner to take when the aim is merging

  deltaworks merge BASE TUNED... OUT    folders into a folder, without a store

  deltaworks export demo-opcm ./model   a folder for from_pretrained

  deltaworks submit ./tuned --line NAME  into a line's queue; merge-pending

  deltaworks up --inbox NAME=./inbox    servers, worker, watcher, in one command

  deltaworks ui                         versions in MLflow, runs in Prefect

  deltaworks du                         what takes the room, and prune

  deltaworks mirror s3://backup/store   a whole store beside another

[bold]Where things are[/] (environment; a local .deltaworks folder if none is set)

  DELTAWORKS_HOME      folder of the embedded store and databases

  DELTAWORKS_STORE     file:///path, or s3://bucket/prefix and AWS_ variables

  DELTAWORKS_CACHE     a folder for copies of what is read from s3://

  MLFLOW_TRACKING_URI  an MLflow server, instead of the embedded database

  PREFECT_API_URL      a Prefect server, instead of one that each run starts

  DELTAWORKS_DEVICE    cpu or cuda

  DELTAWORKS_THREADS   CPU threads of torch in training and evaluation (1)

  DELTAWORKS_WORKERS   tensors worked on at once (a core each, up to 16)

  DELTAWORKS_MEMORY    what they may take together (4GiB)
""",
)
# panels of --help; what runs things has its own, the first
_UPDATES, _STORE, _SERVICE = "Lines, updates and models", "The store", "As a service"
app.add_typer(line_app, name="line", rich_help_panel=_UPDATES)
app.add_typer(series_app, name="series", rich_help_panel=_UPDATES)
app.command()(compare)
app.add_typer(report_app, name="report")
app.add_typer(store_app, name="store", rich_help_panel=_STORE)
for _command in (tuners, codecs, compress, inspect, similarity, merge, export, promote, rollback, champions):
    app.command(rich_help_panel=_UPDATES)(_command)
for _question in (lineage, why, contains, diff, reproduce):
    app.command(rich_help_panel=_UPDATES)(_question)
for _verb in (verify, du, prune, pin, unpin, pins, copy, mirror, table):
    app.command(rich_help_panel=_STORE)(_verb)
for _called, _work in (
    ("submit", submit),
    ("merge-pending", merge_pending),
    ("watch", watch),
    ("webhook", webhook),
    ("deploy", deploy),
    ("up", up),
):
    app.command(_called, rich_help_panel=_SERVICE)(_work)
for _called, _one in (
    ("open", line_open),
    ("status", line_status),
    ("requeue", line_requeue),
    ("discard", line_discard),
    ("policy", line_policy),
):
    line_app.command(_called)(_one)
line_app.command("fold")(line_fold)
line_app.command("export")(line_export)
line_app.command("import")(line_import)


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a preset: demo, smoke ...")],
    codec: Annotated[
        str | None,
        typer.Option(
            metavar='"NAME KEY=VALUE ..."',
            help="Write the updates by this codec instead of the config's, into lines of their own.",
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    memory: Memory = None,
    workers: Workers = None,
) -> None:
    """Run a chain: fine-tune, extract, compress, merge, evaluate, register.

    What was done before is not done again: after an interruption, or when tasks were added, run the same command.

    Examples:  deltaworks run demo        deltaworks run chains/support-models.yaml

               deltaworks run demo --codec "rtn bits=2"
    """
    with errors_explained(verbose):
        from configs.chain import load_chain
        from configs.codec_words import with_codec

        chosen = load_chain(config)  # before anything slow: a typo is answered at once
        if codec is not None:
            chosen = with_codec(chosen, codec)
        place = open_workplace(verbose, memory, workers)
        server = embedded_prefect(place)
        from flows.launch import launch  # imports prefect, which reads where its server is

        if server:
            server.await_answer()
        launch(chosen, place, console, quiet)


@app.command(rich_help_panel=_UPDATES)
def mergers(
    name: Annotated[str | None, typer.Argument(help="A merger, sparsifier or scaling, for all its settings.")] = None,
) -> None:
    """List the mergers, and the sparsifiers and scalings that go with them; with NAME, all settings of one."""
    with errors_explained():
        from flows.catalogue import about, overview

        for part in overview(console.width) if name is None else about(name, console.width):
            console.print(part)


@app.command(rich_help_panel=_UPDATES)
def show(ref: Annotated[str, typer.Argument(help="A ref, or the beginning of one: update/1b2c3d")]) -> None:
    """Print an artifact: what it is made of, where it came from, what it costs."""
    with errors_explained():
        from flows.tables import show_artifact

        store = open_workplace().store
        for part in show_artifact(store.open(store.resolve(ref))):
            console.print(part)


@app.command()
def ui(
    host: Annotated[
        str, typer.Option(help="Address to listen on. The servers have no password: keep loopback.")
    ] = "127.0.0.1",
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow; the next free one if taken.")] = 5000,
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect; the next free one if taken.")] = 4200,
) -> None:
    """Start MLflow and Prefect over the local databases, and print their addresses. Ctrl-C stops both."""
    with errors_explained():
        settings = open_workplace().settings
        from flows.servers import free_port, start_mlflow, start_prefect

        ports = free_port(host, mlflow_port), free_port(host, prefect_port)
        console.print("starting MLflow and Prefect ...")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a supervisor's stop ends the servers too
        servers = [start_mlflow(settings, host, ports[0]), start_prefect(settings, host, ports[1], ui=True)]
        try:
            for server in servers:
                server.await_answer()
            console.print(f"MLflow   http://{host}:{ports[0]}/#/models?workflowType=machine_learning")
            console.print(f"Prefect  http://{host}:{ports[1]}")
            console.print("Ctrl-C stops both")
            sys.stdout.flush()
            while all(server.running for server in servers):
                time.sleep(0.5)
        except KeyboardInterrupt:
            console.print("stopped")
        finally:
            for server in servers:
                server.stop()


def main() -> None:
    app()


if __name__ == "__main__":
    main()
