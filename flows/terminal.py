"""The terminal: what all commands share. Where they print, how they say what is wrong, how a process is set up."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from storage.errors import DeltaworksError

if TYPE_CHECKING:
    from flows.servers import Server
    from flows.workplace import Workplace

_WIDE = 160  # for files and pipes, where nothing should be cut or wrapped

console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
errors = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _WIDE)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only what was asked for, no progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's log and full tracebacks.")]
Memory = Annotated[
    str | None,
    typer.Option(help="What the tensors in work may take together, like 4GiB or 500MB. Results do not depend on it."),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="How many tensors are worked on at once. Results do not depend on it."),
]


@contextmanager
def errors_explained(verbose: bool = False) -> Iterator[None]:
    """Our own errors as one message and exit code 1; anything else is a bug and keeps its traceback."""
    try:
        yield
    except DeltaworksError as error:
        if verbose:
            raise
        errors.print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        errors.print(str(error), markup=False)
        raise typer.Exit(1) from None


def open_workplace(verbose: bool = False, memory: str | None = None, workers: int | None = None) -> Workplace:
    """Set the process up. Prefect reads its settings when it is imported, so this comes first.

    `memory` and `workers` go before what the environment says.
    """
    for variable, value in (("DELTAWORKS_MEMORY", memory), ("DELTAWORKS_WORKERS", workers)):
        if value is not None:
            os.environ[variable] = str(value)
    from configs.settings import Settings

    settings = Settings.from_environment()
    (settings.home / "prefect").mkdir(parents=True, exist_ok=True)  # Prefect creates only the last folder of a path
    defaults = {
        "PREFECT_HOME": str(settings.home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",  # the same for Prefect's client
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO" if verbose else "CRITICAL",
        "PREFECT_CLI_PROMPT": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "0" if verbose else "1",
        **({} if verbose else {"TQDM_DISABLE": "1"}),  # libraries' own bars: the board shows how far a step is
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, default in defaults.items():
        os.environ.setdefault(name, default)
    if not verbose:
        warnings.filterwarnings("ignore", category=UserWarning, module=r"prefect|transformers|torch")
        logging.getLogger("transformers").setLevel(logging.ERROR)
    from flows.workplace import here

    return here()


def embedded_prefect(place: Workplace) -> Server | None:
    """Start a Prefect server for this run, unless PREFECT_API_URL names one. It starts while prefect is imported."""
    if os.environ.get("PREFECT_API_URL"):
        return None
    from flows.servers import LOOPBACK, free_port, start_prefect

    port = free_port()
    server = start_prefect(place.settings, LOOPBACK, port, ui=False)
    atexit.register(server.stop)  # before prefect is imported, so that its last events are sent first
    os.environ["PREFECT_API_URL"] = f"http://{LOOPBACK}:{port}/api"
    return server


def called() -> str:
    """How this command was called, if its plain name would not be found."""
    return "deltaworks" if shutil.which("deltaworks") else os.path.relpath(sys.argv[0])
