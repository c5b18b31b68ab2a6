"""`deltaworks similarity`: how alike stored updates are, before or after they are merged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.terminal import Memory, Quiet, Workers, console, errors_explained, open_workplace
from storage.errors import InvalidInput

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.table import Table
    from rich.text import Text

    from storage.artifacts import ArtifactStore
    from storage.refs import UpdateRef
    from tasks.similarity import Similarity

_PICTURES = (".png", ".pdf", ".svg")
_WIDTH = 7  # of a cell
_ANY = 1 << 14  # columns of a table of very many updates
_LEAST_REACH = 0.05
_WARM, _COLD = (178, 24, 43), (33, 102, 172)  # the ends of the picture's colours


def similarity(
    updates: Annotated[
        list[str] | None,
        typer.Argument(metavar="UPDATE", help="Stored updates' refs, or the beginnings of them: update/1b2c3d"),
    ] = None,
    line: Annotated[
        str | None,
        typer.Option("--line", metavar="NAME", help="All updates that a line is made of now, before those named."),
    ] = None,
    conflicts: Annotated[bool, typer.Option("--conflicts", help="Print the sign conflicts of all pairs too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, and nothing else.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw cosines and sign conflicts as heat maps: png, pdf, svg.")
    ] = None,
    memory: Memory = None,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Compare updates of one base, pair by pair: which help each other when merged, and which get in the way.

    The cosine is 1 for updates in the same direction, 0 for unrelated ones, less than 0 where one undoes the other.

    Sign conflicts: of the numbers that both change, how many they change in opposite directions; half is chance.

    Examples:  deltaworks similarity --line demo-opcm

               deltaworks similarity --line demo-opcm update/1b2c --plot alike.png

               deltaworks similarity update/1b2c update/77aa --conflicts
    """
    with errors_explained():
        if plot is not None and plot.suffix.lower() not in _PICTURES:
            raise InvalidInput(f"--plot {plot}: a picture's name ends in one of {', '.join(_PICTURES)}")
        if line is None and not updates:
            raise InvalidInput("name two updates or more, or a line", remedy="Like: deltaworks similarity --line NAME")
        place = open_workplace(memory=memory, workers=workers)
        named = _named(place.store, line, updates or [])
        from flows.board import bar
        from tasks.similarity import similarity as compare

        refs = [ref for _, ref in named]
        with bar(console, "comparing tensors", quiet or as_json) as report:
            found = compare(
                refs, place.store, place.settings.budget, report=lambda done, total, note: report(done, total)
            )
        labels = [label for label, _ in named]
        if plot is not None:
            from flows.commands.similarity_picture import draw

            draw(found, labels, plot)
        if as_json:
            typer.echo(json.dumps(_as_json(found, labels, refs), indent=2))
            return
        for part in _tables(found, labels, conflicts):
            _print_whole(part)
            console.print()
        if plot is not None:
            console.print(f"picture in {plot}", markup=False, soft_wrap=True)


def _named(store: ArtifactStore, line: str | None, words: Sequence[str]) -> list[tuple[str, UpdateRef]]:
    """The updates, with names to tell them apart: their tasks; where several have the same, their refs as well."""
    from storage.lines import Line
    from storage.refs import UpdateRef, parse_ref, short

    found: list[tuple[str, UpdateRef]] = []
    if line is not None:
        journal = Line(store.objects, line)
        journal.head()  # says so if there is no such line
        found += [(entry.task, entry.fold.update) for entry in journal.history()]
        if len(found) + len(words) < 2:
            raise InvalidInput(
                f"line {line!r} has {len(found)} updates: there is nothing to compare",
                remedy="Name other updates beside it, or let its chain merge more",
            )
    for word in words:
        ref = UpdateRef(parse_ref(store.resolve(word), "update"))
        found.append((str(store.open(ref).manifest.facts.get("task", "")), ref))
    tasks = [task for task, _ in found]
    return [
        (task if task and tasks.count(task) == 1 else f"{task} {short(ref, 8)}".strip(), ref) for task, ref in found
    ]


def _as_json(found: Similarity, labels: Sequence[str], refs: Sequence[UpdateRef]) -> dict[str, object]:
    rows = zip(labels, refs, found.norms.tolist(), found.changed.tolist(), strict=True)
    return {
        "updates": [
            {"label": label, "ref": ref, "norm": norm, "changed": changed} for label, ref, norm, changed in rows
        ],
        "cosines": found.cosines.tolist(),
        "sign_conflicts": found.conflicts.tolist(),
        "numbers": found.numbers,
        "tensors": found.tensors,
    }


def _print_whole(part: Text | Table) -> None:
    """Print a table as wide as it is: the terminal may wrap its lines, but no number is cut."""
    usual = console.width
    console.width = max(usual, console.measure(part, options=console.options.update(max_width=_ANY)).maximum)
    try:
        console.print(part)
    finally:
        console.width = usual


def _tables(found: Similarity, labels: Sequence[str], conflicts: bool) -> Iterator[Text | Table]:
    from rich.text import Text

    facts = [
        [f"{norm:#.3g}", f"{share:.1%}"]
        for norm, share in zip(found.norms.tolist(), found.changed.tolist(), strict=True)
    ]
    about = f"{found.numbers:,} numbers in {found.tensors} tensors"
    reach = colour_reach(found.cosines, 0.0)
    yield _square(f"cosine, over {about}", labels, found.cosines, "{:.3f}", lambda value: value / reach, facts)
    if conflicts:
        spread = colour_reach(found.conflicts, 0.5)
        title = "sign conflicts, of the numbers that both change"
        yield _square(title, labels, found.conflicts, "{:.0%}", lambda value: (0.5 - value) / spread)
    pairs = _pairs(found.cosines)
    (most, *high), (least, *low) = max(pairs), min(pairs)
    mean = sum(value for value, _, _ in pairs) / len(pairs)
    said = [f"most alike   {_pair(labels, high)}, {most:.3f}"]
    if len(pairs) > 1:
        said += [f"least alike  {_pair(labels, low)}, {least:.3f}", f"mean of {len(pairs)} pairs: {mean:.3f}"]
    silent = [label for label, norm in zip(labels, found.norms, strict=True) if norm == 0]
    if silent:
        said.append(f"zeros, without a direction: {', '.join(silent)}")
    yield Text("\n".join(said))


def colour_reach(square: NDArray[np.float64], middle: float) -> float:
    """How far from `middle` the colours of a heat map reach: as far as the pairs do, so that they are told apart, but
    not so close that noise is glaring."""
    return max(_LEAST_REACH, *(abs(value - middle) for value, _, _ in _pairs(square)))


def _pairs(square: NDArray[np.float64]) -> list[tuple[float, int, int]]:
    """What is above the diagonal, with row and column."""
    size = len(square)
    return [(float(square[row, column]), row, column) for row in range(size) for column in range(row + 1, size)]


def _pair(labels: Sequence[str], places: Sequence[int]) -> str:
    return " and ".join(labels[place] for place in places)


def _square(
    title: str,
    labels: Sequence[str],
    square: NDArray[np.float64],
    form: str,
    strength: Callable[[float], float],
    facts: Sequence[Sequence[str]] = (),
) -> Table:
    """Rows are named, columns numbered: many updates fit. `strength`: of a number's colour, see `_cell`."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=0)
    table.add_column("", no_wrap=True)
    for number in range(1, len(labels) + 1):
        table.add_column(str(number), justify="right", no_wrap=True, width=_WIDTH)
    for name in ("norm", "changes") if facts else ():
        table.add_column(f"  {name}", justify="right", no_wrap=True)
    digits = len(str(len(labels)))
    for row, label in enumerate(labels):
        cells = [
            Text("·", "dim") if row == column else _cell(form.format(value), strength(value))
            for column, value in enumerate(square[row].tolist())
        ]
        table.add_row(
            Text(f"{row + 1:>{digits}} {label} "), *cells, *([f"  {text}" for text in facts[row]] if facts else [])
        )
    return table


def _cell(text: str, strength: float) -> Text:
    """From -1, blue: against each other, by 0, white, to 1, red: together."""
    from rich.text import Text

    share = min(abs(strength), 1.0)
    color = ",".join(str(round(255 - share * (255 - end))) for end in (_WARM if strength > 0 else _COLD))
    return Text(text.rjust(_WIDTH), f"{'rgb(255,255,255)' if share > 0.6 else 'rgb(0,0,0)'} on rgb({color})")
