"""`deltaworks line open`: a line before there is anything to merge into it, so that a queue can fill it."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.terminal import called, console, errors_explained, open_workplace


def line_open(
    name: Annotated[str, typer.Argument(help="Name of the new line, such as support.")],
    base: Annotated[str, typer.Argument(help="What will be fine-tuned: a folder, a hub id, or a checkpoint's ref.")],
    merger: Annotated[str, typer.Option(metavar="NAME", help="How updates are merged: see `deltaworks mergers`.")],
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the merger. May be repeated.")
    ] = None,
    codec: Annotated[
        str | None, typer.Option(metavar='"NAME KEY=VALUE ..."', help="How updates are written. [default: ternary]")
    ] = None,
) -> None:
    """Begin a line. What is submitted afterwards must have been tuned from its base.

    The same again does nothing; a line never changes its base.

    Examples:  deltaworks line open support ./models/base --merger opcm --codec "ternary density=0.2"
    """
    with errors_explained():
        from configs.codec_words import codec_from_words
        from configs.recipe_words import recipe_from_words

        recipe = recipe_from_words(merger, settings=setting or [])  # before anything slow: a typo is answered at once
        words = (codec or "").split()
        chosen = codec_from_words(words[0], words[1:]) if words else None
        place = open_workplace()
        from storage.lines import Line
        from storage.queue import Queue
        from storage.refs import CheckpointRef, parse_ref, short
        from tasks.ingest import Checkpoint, ingest
        from tasks.intake import Intake

        intake = Intake(codec=chosen) if chosen else Intake()
        place.store.objects.ready()
        if base.startswith("checkpoint/"):
            ref = CheckpointRef(parse_ref(place.store.resolve(base), "checkpoint"))
        else:
            ref = ingest(Checkpoint(source=base), place.store)
        Line(place.store.objects, name).open(ref, recipe.spec())
        queue = Queue(place.store.objects, name)
        kept = queue.keep_policy(intake.spec())
        if chosen is not None and kept != intake.spec():
            queue.set_policy(intake.spec())
        console.print(f"line {name}: {short(ref)}, merged by {recipe.merger.name}, written by {intake.codec.name}")
        console.print(f"next: {called()} submit ./tuned --line {name}", soft_wrap=True)
