"""`deltaworks merge`: several checkpoints into one folder in one go, without a store, a line or Prefect."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from flows.terminal import Memory, Quiet, Workers, console, errors_explained
from storage.errors import InvalidInput

if TYPE_CHECKING:
    import torch

    from tasks.folders.merge import MergedFolder
    from tasks.parallel import Budget, Report


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # names of settings in glibc's malloc.h


def merge(
    base: Annotated[Path, typer.Argument(help="Folder of the base model, with safetensors.")],
    tuned: Annotated[list[Path], typer.Argument(help="Folders of models tuned from it.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    merger: Annotated[str, typer.Option(help="How updates are merged: average, ties, opcm ...")] = "average",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting; also sparsify.KEY=..., scaling.KEY=..."),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="How much each counts, such as 0.7,0.3.")] = None,
    sparsify: Annotated[str | None, typer.Option(help="Thin each update first: dare, della.")] = None,
    scaling: Annotated[str | None, typer.Option(help="Set the size of what is merged: match_norm, lines.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the new folder: bfloat16, float16, float32.")] = None,
    memory: Memory = None,
    workers: Workers = None,
    hashes: Annotated[bool, typer.Option("--hash", help="Record the sha256 of every input file.")] = False,
    quiet: Quiet = False,
) -> None:
    """Merge models of folders into a new folder, in one go.

    The base's config, tokenizer, names and dtypes are kept; deltaworks.json in the new folder says how it was made.
    To merge one more model next month, use a line instead: deltaworks run.

    Example:  deltaworks merge ./base ./tuned-a ./tuned-b ./merged --merger ties --set density=0.2
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch is imported
    _keep_freed_memory()
    with errors_explained(), _stopped_like_ctrl_c():
        from configs.recipe_words import recipe_from_words
        from tasks.folders.merge import Options, merge_folders

        recipe = recipe_from_words(merger, sparsify, scaling, settings or [])
        start = time.perf_counter()
        with _bars(quiet) as report:
            merged = merge_folders(
                base,
                tuned,
                out,
                recipe,
                weights=_numbers(weights),
                options=Options(_dtype(dtype), hashes),
                budget=_budget(memory, workers),
                report=report,
            )
        if not quiet:
            console.print(_table(merged, merger, len(tuned), time.perf_counter() - start))
            for note in merged.notes:
                console.print(f"note: {note}", markup=False)


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(one) for one in text.split(",")]
    except ValueError:
        raise InvalidInput(f"--weights {text!r} are no numbers", remedy="Write them like 0.7,0.3") from None


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
    if name is not None and name not in known:
        raise InvalidInput(f"--dtype {name!r} is not one of {', '.join(known)}")
    return None if name is None else known[name]


def _budget(memory: str | None, workers: int | None) -> Budget:
    from tasks.parallel import Budget, parse_bytes

    usual = Budget()
    return Budget(workers or usual.workers, usual.memory if memory is None else parse_bytes(memory))


def _table(merged: MergedFolder, merger: str, count: int, seconds: float) -> Table:
    table = Table(title=f"{merged.folder}", title_justify="left", box=SIMPLE, show_header=False)
    rate = (merged.read + merged.written) / 1e9 / seconds
    rows = {
        "merged": f"{count} models with {merger}",
        "tensors": f"{merged.tensors:,} of {merged.parameters:,} parameters",
        "files": ", ".join(merged.files) if len(merged.files) < 4 else f"{len(merged.files)} shards",
        "size": f"{merged.written / 1e9:.2f} GB, from {merged.read / 1e9:.2f} GB",
        "time": f"{seconds:.1f} s, {rate:.2f} GB/s read and written",
    }
    for row in rows.items():
        table.add_row(*row)
    return table


@contextmanager
def _bars(quiet: bool) -> Iterator[Callable[[str], Report | None]]:
    """A bar per pass, on terminals only."""
    columns = TextColumn("{task.description}"), BarColumn(bar_width=32), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as shown:

        def begin(label: str) -> Report:
            row = shown.add_task(label, total=None)
            return lambda done, total, note: shown.update(row, completed=done, total=total)

        yield begin


def _keep_freed_memory() -> None:
    """Ask the C library to reuse what tensors gave back instead of returning it to the system, which would fill every
    new tensor's pages with zeros first: a third of the time of a merge. Other libraries than glibc do not have it."""
    with suppress(AttributeError, OSError):
        tune = ctypes.CDLL(None).mallopt
        tune(_TRIM_THRESHOLD, 256 << 20)
        tune(_MMAP_THRESHOLD, 32 << 20)  # the largest that it takes
        tune(_ARENA_MAX, 1)  # one pool for all threads: what one gave back, the other takes


@contextmanager
def _stopped_like_ctrl_c() -> Iterator[None]:
    """A supervisor's SIGTERM unwinds as Ctrl-C does, so that the unfinished folder goes."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
