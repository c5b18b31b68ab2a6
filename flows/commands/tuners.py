"""`deltaworks tuners`: how a model can be trained on a task."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.terminal import console, errors_explained


def tuners(
    name: Annotated[str | None, typer.Argument(help="A tuner or an optimizer, for all its settings.")] = None,
) -> None:
    """List the tuners, which train a model on a task, and the optimizers; with NAME, all settings of one.

    A tuner says what learns: all weights, or a few numbers beside them. An optimizer says how.

    Both are settings of a chain, for all of its tasks or for one:

      tuner: {name: lora, rank: 16, steps: 500, learning_rate: 2.0e-4, optimizer: {name: muon}}

    Examples:  deltaworks tuners        deltaworks tuners lora        deltaworks tuners galore
    """
    with errors_explained():
        from flows import catalogue

        width = console.width
        for part in catalogue.tuners(width) if name is None else catalogue.about(name, width, catalogue.tuning()):
            console.print(part)
