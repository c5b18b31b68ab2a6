"""`deltaworks inspect`: what a stored update is like, and which codec fits it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.terminal import Memory, Quiet, Workers, console, errors_explained, open_workplace
from storage.errors import InvalidInput

if TYPE_CHECKING:
    from tasks.codecs import Codec
    from tasks.inspection.findings import Group, Inspection

_PICTURES = (".png", ".pdf", ".svg")


def inspect(
    update: Annotated[str, typer.Argument(help="A stored update's ref, or the beginning of one: update/1b2c3d")],
    codecs: Annotated[
        str | None, typer.Option(metavar="A,B", help="Try these codecs only, at their defaults.", show_default="all")
    ] = None,
    no_codecs: Annotated[bool, typer.Option("--no-codecs", help="Try none: measure the update alone.")] = False,
    tolerance: Annotated[
        list[float] | None,
        typer.Option(
            help="Count numbers that changed by more than this too; may be given again.", show_default="1e-8 and 1e-5"
        ),
    ] = None,
    ranks_up_to: Annotated[
        int, typer.Option(min=0, metavar="SIDE", help="Take ranks of matrices whose smaller side is at most this.")
    ] = 2048,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON, tensor by tensor, and nothing else.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw changes, norms and codecs: png, pdf, svg.")
    ] = None,
    memory: Memory = None,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Look into one stored update: how much it changes and where, and which codec fits it.

    Changes are counted bit by bit where both checkpoints are there. Every codec writes the update into a place that
    goes away, so its bytes are those of real files. Nothing is kept.

    Examples:  deltaworks inspect update/1b2c

               deltaworks inspect update/1b2c --no-codecs --tolerance 1e-6

               deltaworks inspect update/1b2c --codecs exact,ternary --plot update.png
    """
    with errors_explained():
        if plot is not None and plot.suffix.lower() not in _PICTURES:
            raise InvalidInput(f"--plot {plot}: a picture's name ends in one of {', '.join(_PICTURES)}")
        if codecs is not None and no_codecs:
            raise InvalidInput("--codecs and --no-codecs exclude each other")
        chosen = [] if no_codecs else None if codecs is None else _named(codecs)
        place = open_workplace(memory=memory, workers=workers)
        from flows.board import bar
        from storage.refs import UpdateRef, parse_ref
        from tasks.inspect_update import TOLERANCES, inspect_update

        ref = UpdateRef(parse_ref(place.store.resolve(update), "update"))
        with bar(console, "inspecting", quiet or as_json) as report:
            found = inspect_update(
                ref,
                place.store,
                place.settings.device,
                codecs=chosen,
                tolerances=tolerance or TOLERANCES,
                ranks_up_to=ranks_up_to,
                budget=place.settings.budget,
                report=lambda done, total, note: report(done, total),
            )
        if plot is not None:
            from flows.commands.inspect_picture import draw

            draw(found, plot)
        if as_json:
            typer.echo(json.dumps(_as_json(found), indent=2))
            return
        from flows.commands.inspect_tables import tables

        for part in tables(found, place.store.open(ref), console.width):
            console.print(part)
        if plot is not None:
            console.print(f"\npicture in {plot}", markup=False, soft_wrap=True)


def _named(words: str) -> list[Codec]:
    from configs.codec_words import codec_from_words

    names = [word.strip() for word in words.split(",") if word.strip()]
    if not names:
        raise InvalidInput("--codecs names none", remedy="Like: --codecs exact,ternary; for none: --no-codecs")
    return [codec_from_words(name, []) for name in dict.fromkeys(names)]


def _as_json(found: Inspection) -> dict[str, Any]:
    from dataclasses import asdict

    from tasks.inspection.verdict import verdict

    said = verdict(found)
    return {
        "update": found.update,
        "compared": "bits" if found.by_bits else "numbers",
        "lossy": found.lossy,
        "tolerances": list(found.tolerances),
        "total": _group(found.total, found),
        "kinds": [_group(one, found) for one in found.kinds],
        "layers": [{**_group(one, found), "kinds": [_group(its, found) for its in one.kinds]} for one in found.layers],
        "stored": {"bytes": found.stored, "bf16_bytes": found.bf16},
        "codecs": [asdict(one) for one in found.costs],
        "fits": said.fits,
        "verdict": list(said.lines),
        "notes": list(found.notes),
        "tensors": [asdict(one) | {"kurtosis": one.moments.kurtosis} for one in found.tensors],
    }


def _group(one: Group, found: Inspection) -> dict[str, Any]:
    return {
        "label": one.label,
        "tensors": len(one.members),
        "numbers": one.elements,
        "changed": one.changed,
        "beyond": [one.beyond(place) for place in range(len(found.tolerances))],
        "norm": one.norm,
        "norm_over_base": one.relative,
        "kurtosis": one.moments.kurtosis,
        "rank": one.rank,
        "effective_rank": one.effective,
        "stable_rank": one.stable,
        "ternary_bits": one.ternary_bits,
        "step_bits": one.step_bits,
    }
