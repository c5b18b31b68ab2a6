"""`deltaworks codecs` and `deltaworks compress`: what the codecs are, and one stored update written by one of them."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.terminal import Memory, Quiet, Workers, console, errors_explained, open_workplace


def codecs(
    name: Annotated[str | None, typer.Argument(help="A codec, for all its settings.")] = None,
) -> None:
    """List the codecs, which write updates smaller; with NAME, all settings of one."""
    with errors_explained():
        from flows import catalogue

        parts = (
            catalogue.codecs(console.width) if name is None else catalogue.about(name, console.width, catalogue.CODING)
        )
        for part in parts:
            console.print(part)


def compress(
    update: Annotated[str, typer.Argument(help="A stored update's ref, or the beginning of one: update/1b2c3d")],
    codec: Annotated[str, typer.Argument(help="The name of a codec; `deltaworks codecs` lists them.")],
    settings: Annotated[list[str] | None, typer.Argument(help="Its settings: density=0.1 alpha=norm")] = None,
    quiet: Quiet = False,
    memory: Memory = None,
    workers: Workers = None,
) -> None:
    """Write a stored update by a codec, as a new update beside the old one, and show what it costs and what it lost.

    Examples:  deltaworks compress update/1b2c ternary density=0.05        deltaworks compress update/1b2c exact
    """
    with errors_explained():
        from configs.codec_words import codec_from_words

        chosen = codec_from_words(codec, settings or [])
        place = open_workplace(memory=memory, workers=workers)
        from flows.board import bar
        from flows.tables import show_artifact
        from storage.refs import UpdateRef
        from tasks.compress import compress_update

        ref = UpdateRef(place.store.resolve(update))
        with bar(console, f"coding by {chosen.name}", quiet) as report:
            small = compress_update(
                ref,
                chosen,
                place.store,
                place.settings.device,
                budget=place.settings.budget,
                report=lambda done, total, note: report(done, total),
            )
        for part in show_artifact(place.store.open(small)):
            console.print(part)
