"""Tables of an inspection: what `deltaworks inspect` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from storage.artifacts import Artifact
from storage.refs import short
from tasks.inspection.findings import Group, Inspection
from tasks.inspection.verdict import percent, verdict

_WIDE = 100  # columns that running text takes at most


def tables(found: Inspection, artifact: Artifact, width: int) -> Iterator[str | Table]:
    """For a terminal of `width` columns; everything fits into 80."""
    width = min(width, _WIDE)
    lineage, task = artifact.manifest.lineage, artifact.manifest.facts.get("task")
    how = f"as {lineage.spec.get('name')} wrote it" if lineage.step == "compress" else "as it was extracted"
    counted = f"{found.total.elements:,} numbers in {len(found.tensors)} tensors"
    yield f"{escape(', '.join(filter(None, (short(found.update), task, how))))}: {counted}\n"
    yield _by_kind(found)
    yield ""
    yield _by_layer(found)
    yield _legend(found, width)
    if found.costs:
        yield _by_codec(found)
    yield from _bounds(found.total, width)
    for one in found.costs:
        if one.bytes is None:
            yield escape(textwrap.fill(f"{one.codec} cannot write it: {one.why}", width, subsequent_indent="  "))
    for note in found.notes:
        yield escape(textwrap.fill(f"note: {note}", width, subsequent_indent="  "))
    said = verdict(found)
    yield f"\nfits: [bold]{said.fits or 'any codec'}[/]"
    for line in said.lines:
        yield escape(textwrap.fill(f"- {line}", width, subsequent_indent="  "))


def _by_kind(found: Inspection) -> Table:
    tolerances = [f">{one:g}" for one in found.tolerances]
    table = _table("by kind", "numbers", "changed", *tolerances, "norm", "/ base", "kurtosis", "rank")
    for one in (*found.kinds, found.total):
        beyond = [_percent(one.beyond(place)) for place in range(len(tolerances))]
        style = "bold" if one.label == "all" else None
        table.add_row(one.label, _count(one.elements), _percent(one.changed), *beyond, *_size(one), style=style)
    return table


def _by_layer(found: Inspection) -> Table:
    table = _table("by layer", "attention", "mlp", "others", "all", "norm", "/ base", "kurtosis", "rank")
    for one in found.layers:
        attention, mlp = one.only("attention"), one.only("mlp")
        others = one.without("attention", "mlp")
        shares = [_percent(part.changed) if part.members else "" for part in (attention, mlp, others, one)]
        table.add_row(one.label, *shares, *_size(one))
    return table


def _size(one: Group) -> list[str]:
    kurtosis = one.moments.kurtosis
    return [
        f"{one.norm:.3g}",
        "-" if one.relative is None else _percent(one.relative),
        "-" if kurtosis is None else f"{kurtosis:z.1f}",
        "-" if one.effective is None else _percent(one.effective),
    ]


def _legend(found: Inspection, width: int) -> str:
    total = found.total
    compared = "in a bit" if found.by_bits else "not zero in the update"
    said = f"changed: {compared}; by layer, of the modules named. kurtosis: 0 for a normal distribution."
    if total.effective is not None and total.rank is not None and total.stable is not None:
        said += f" rank: the effective one, of the smaller side; numerical {_percent(total.rank)}"
        said += f" of it, stable {total.stable:.1f}."
    return textwrap.fill(said, width) + "\n"


def _by_codec(found: Inspection) -> Table:
    table = _table("by codec", "bytes", "bits each", "times smaller", "error")
    for one in sorted(found.costs, key=lambda one: one.bytes if one.bytes is not None else found.bf16**2):
        if one.bytes is None:
            continue
        error = "none" if one.lossless else _percent(one.error or 0.0)
        table.add_row(one.codec, f"{one.bytes:,}", f"{one.bits or 0.0:.2f}", f"{one.ratio or 0.0:.2f}", error)
    ratio = found.bf16 / found.stored if found.stored else 0.0
    table.add_row(
        "as it is", f"{found.stored:,}", f"{16 / ratio if ratio else 0.0:.2f}", f"{ratio:.2f}", "", style="dim"
    )
    return table


def _bounds(total: Group, width: int) -> Iterator[str]:
    """What no codec of its kind gets below."""
    if total.ternary_bits:
        said = f"bounds: places and signs of what changed {total.ternary_bits:.2f} bits each"
        if total.step_bits is not None:
            said += f"; steps between floats, given the exponents of the base, {total.step_bits:.2f}"
        yield textwrap.fill(said, width, subsequent_indent="  ")


def _table(title: str, *columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column(title, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _count(number: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number / size:.0f}{unit}"
    return str(number)


def _percent(share: float) -> str:
    return percent(share).replace(" ", "")
