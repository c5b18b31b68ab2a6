"""The `deltaworks` command. Thin: it reads arguments, calls the flows, and shows what came of it.

Heavy imports wait until a command needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from storage.errors import DeltaworksError

if TYPE_CHECKING:
    from flows.servers import Server
    from flows.workplace import Workplace
    from storage.refs import Ref

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""
A works for model updates: fine-tune, extract the task vector, compress it, merge it sequentially, evaluate, register.

[bold]Try it[/]

  deltaworks run demo                   six tasks on real data, no account, no download, about a minute

  deltaworks line log demo-opcm         how the merged model came to be

  deltaworks export demo-opcm ./model   its newest version as a folder for from_pretrained

  deltaworks ui                         the versions in MLflow, the runs in Prefect

[bold]Where things are[/] (environment variables; a local .deltaworks folder if none is set)

  DELTAWORKS_HOME      folder of the embedded store and databases

  DELTAWORKS_STORE     file:///path or s3://bucket/prefix (with AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...)

  MLFLOW_TRACKING_URI  an MLflow server, instead of the embedded database

  PREFECT_API_URL      a Prefect server, instead of one that each run starts

  DELTAWORKS_DEVICE    cpu or cuda; DELTAWORKS_THREADS: CPU threads of torch (1)
""",
)
line_app = typer.Typer(no_args_is_help=True, help="Lines: the merged models and their histories.")
app.add_typer(line_app, name="line")

_WIDE = 160  # for files and pipes, where nothing should be cut or wrapped

console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
errors = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _WIDE)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only what was asked for, no progress.")]


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a preset: demo, smoke ...")],
    quiet: Quiet = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's log and full tracebacks.")] = False,
) -> None:
    """Run a chain: fine-tune, extract, compress, merge, evaluate, register.

    What was done before is not done again: after an interruption, or when tasks were added, run the same command.

    Examples:  deltaworks run demo        deltaworks run chains/support-models.yaml
    """
    with _errors_explained(verbose):
        from configs.chain import load_chain

        chosen = load_chain(config)  # before anything slow: a typo is answered at once
        place = _open_workplace(verbose)
        server = _embedded_prefect(place)
        from flows.launch import launch  # imports prefect, which reads where its server is

        if server:
            server.await_answer()
        launch(chosen, place, console, quiet)


@line_app.command("log")
def line_log(name: Annotated[str, typer.Argument(help="Name of the line, such as demo-opcm.")]) -> None:
    """Print the journal of a line: every merge and rollback, oldest first."""
    with _errors_explained():
        from flows.tables import journal_table
        from storage.lines import Line

        line = Line(_open_workplace().store.objects, name)
        line.head()
        console.print(journal_table(name, list(line.entries())))


@line_app.command("show")
def line_show(name: Annotated[str, typer.Argument(help="Name of the line, such as demo-opcm.")]) -> None:
    """Print what a line is made of now: its base, merger, and the updates in its head."""
    with _errors_explained():
        from storage.lines import Line

        line = Line(_open_workplace().store.objects, name)
        head = line.head()
        settings = ", ".join(f"{key} {value}" for key, value in head.merger.items() if key not in ("name", "version"))
        console.print(f"line    {name}\nmerger  {head.merger['name']} {settings}", soft_wrap=True)
        console.print(f"base    {head.base}\nstate   {head.state or 'nothing merged yet'}", soft_wrap=True)
        for entry in line.history():
            console.print(f"{entry.step:>4}  {entry.task:<16} {entry.update}", soft_wrap=True)


@app.command()
def show(ref: Annotated[str, typer.Argument(help="A ref, or the beginning of one: update/1b2c3d")]) -> None:
    """Print an artifact: what it is made of, where it came from, what it costs."""
    with _errors_explained():
        from flows.tables import show_artifact

        store = _open_workplace().store
        for part in show_artifact(store.open(store.resolve(ref))):
            console.print(part)


@app.command()
def export(
    what: Annotated[
        str, typer.Argument(metavar="REF|LINE", help="A checkpoint's ref, or a line for its newest model.")
    ],
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    quiet: Quiet = False,
) -> None:
    """Write a model as a Hugging Face folder: config, tokenizer, safetensors. `from_pretrained` loads it."""
    with _errors_explained():
        place = _open_workplace()
        from flows.board import bar
        from storage.refs import CheckpointRef
        from tasks.export import export as write

        model = CheckpointRef(_model(place, what))
        with bar(console, "writing tensors", quiet) as report:
            files = write(model, folder, place.store, report=report)
        console.print(f"{len(files)} files in {folder}")
        console.print(f'load it with AutoModel.from_pretrained("{folder}")')


@app.command()
def verify(
    ref: Annotated[str | None, typer.Argument(help="A ref, or the beginning of one.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything in the store.")] = False,
    quiet: Quiet = False,
) -> None:
    """Read stored bytes and hold them against the digests that name them. Exit code 1 if anything is wrong."""
    with _errors_explained():
        if (ref is None) == (not everything):
            raise typer.BadParameter("give either a ref or --all")
        place = _open_workplace()
        from flows.board import bar
        from storage.verify import verify as check
        from storage.verify import verify_lines

        refs = list(place.store.refs()) if ref is None else [place.store.resolve(ref)]
        with bar(console, "checking blobs", quiet) as report:
            verdict = check(place.store, refs, report)
        findings = [*verdict.findings, *(verify_lines(place.store) if everything else [])]
        for finding in findings:
            errors.print(f"[red]bad[/]  {finding.object}\n     {finding.problem}")
            errors.print(f"     needed by {', '.join(finding.needed_by)}")
        counted = f"{verdict.artifacts} artifacts, {verdict.blobs} blobs, {verdict.bytes / 1e6:.1f} MB"
        console.print(f"{counted}: {'all as named' if not findings else f'{len(findings)} bad'}")
        if findings:
            raise typer.Exit(1)


@app.command()
def ui(
    host: Annotated[
        str, typer.Option(help="Address to listen on. The servers have no password: keep loopback.")
    ] = "127.0.0.1",
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow; the next free one if taken.")] = 5000,
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect; the next free one if taken.")] = 4200,
) -> None:
    """Start MLflow and Prefect over the local databases, and print their addresses. Ctrl-C stops both."""
    with _errors_explained():
        settings = _open_workplace().settings
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


def _model(place: Workplace, what: str) -> Ref:
    """The checkpoint that `what` names: a ref, or the newest model of a line."""
    from flows.steps import head_model

    return place.store.resolve(what) if "/" in what else head_model(what)


def _embedded_prefect(place: Workplace) -> Server | None:
    """Start a Prefect server for this run, unless PREFECT_API_URL names one. It starts while prefect is imported."""
    if os.environ.get("PREFECT_API_URL"):
        return None
    from flows.servers import LOOPBACK, free_port, start_prefect

    port = free_port()
    server = start_prefect(place.settings, LOOPBACK, port, ui=False)
    atexit.register(server.stop)  # before prefect is imported, so that its last events are sent first
    os.environ["PREFECT_API_URL"] = f"http://{LOOPBACK}:{port}/api"
    return server


def _open_workplace(verbose: bool = False) -> Workplace:
    """Set the process up. Prefect reads its settings when it is imported, so this comes first."""
    from configs.settings import Settings

    settings = Settings.from_environment()
    (settings.home / "prefect").mkdir(parents=True, exist_ok=True)  # Prefect creates only the last folder of a path
    defaults = {
        "PREFECT_HOME": str(settings.home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO" if verbose else "CRITICAL",
        "PREFECT_CLI_PROMPT": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "0" if verbose else "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if not verbose:
        warnings.filterwarnings("ignore", category=UserWarning, module=r"prefect|transformers|torch")
        logging.getLogger("transformers").setLevel(logging.ERROR)
    from flows.workplace import here

    return here()


@contextmanager
def _errors_explained(verbose: bool = False) -> Iterator[None]:
    """Our own errors as one message and exit code 1; anything else is a bug and keeps its traceback."""
    try:
        yield
    except DeltaworksError as error:
        if verbose:
            raise
        errors.print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        errors.print(str(error), markup=False)
        raise typer.Exit(1) from None


def main() -> None:
    app()
