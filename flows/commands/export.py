"""`deltaworks export`: what the store holds as a folder that other programs read."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.terminal import Memory, Quiet, Workers, console, errors_explained, open_workplace
from storage.errors import InvalidInput

if TYPE_CHECKING:
    import torch

    from flows.workplace import Workplace
    from storage.refs import Ref, UpdateRef
    from tasks.card import Known
    from tasks.exports import Exported, LoraForm

_DTYPES = ("float32", "bfloat16", "float16")


class Form(StrEnum):
    """What the folder holds."""

    MODEL = "model"
    CHECKPOINT = "checkpoint"
    LORA = "lora"
    PATCH = "patch"
    DELTA = "delta"


_WHOLE = (Form.MODEL, Form.CHECKPOINT)  # two words for one thing


def export(
    what: Annotated[
        str,
        typer.Argument(metavar="REF|LINE", help="A checkpoint's or update's ref, or a line for its newest model."),
    ],
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    form: Annotated[
        Form,
        typer.Option(
            "--as",
            help="A whole model (model or checkpoint). Of an update also: lora, an adapter for peft; patch, positions "
            "and new values for servers that take weight updates; delta, the dense task vector.",
        ),
    ] = Form.MODEL,
    rank: Annotated[int | None, typer.Option(help="Of lora: rank of what is not stored as factors (16).")] = None,
    error: Annotated[
        float | None, typer.Option(help="Of lora: the smallest rank per tensor within this relative error, like 0.1.")
    ] = None,
    skip: Annotated[bool, typer.Option("--skip", help="Of lora: leave out what is no linear weight.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help=f"Of lora and delta: {', '.join(_DTYPES)}. [default: float32]")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", metavar="ID", help="The base's name on the hub, for the model card.")
    ] = None,
    memory: Memory = None,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Write a model, or an update, as a folder that other programs read. Nothing is overwritten.

    A model is a Hugging Face folder: config, tokenizer, safetensors. Of an update it is its base with the update added.
    README.md is its model card: what was merged and how, scores, names, the way back.

    Examples:  deltaworks export demo-opcm ./model        deltaworks export update/1b2c ./adapter --as lora --error 0.1
    """
    with errors_explained():
        _check_options(form, {"--rank": rank, "--error": error, "--skip": skip or None, "--dtype": dtype})
        lora = None
        if form is Form.LORA:
            lora = _lora(rank, error, skip, dtype)  # before anything slow: a wrong number is answered at once
        place = open_workplace(memory=memory, workers=workers)
        ref = _named(place, what)
        if ref.startswith("update/"):
            from storage.refs import UpdateRef

            done = _update(place, UpdateRef(ref), folder, form, lora, dtype, quiet, base_model)
            console.print(f"{len(done.files)} files in {folder}")
            for line in done.said:
                console.print(line, markup=False, soft_wrap=True)
        else:
            _model(place, ref, folder, form, quiet, base_model)


def _named(place: Workplace, what: str) -> Ref:
    """What a word stands for: a ref, or the newest model of a line."""
    from flows.steps import head_model

    return place.store.resolve(what) if "/" in what else head_model(what)


def _known(place: Workplace, base_model: str | None) -> Known:
    from storage.index import index_file, indexed
    from storage.roots import read_journals
    from tasks.card import Known

    rows = indexed(place.store, index_file(place.settings.home / "index", place.store.url)).rows
    return Known(rows, read_journals(place.store.objects).lines, base_model)


def _model(place: Workplace, ref: Ref, folder: Path, form: Form, quiet: bool, base_model: str | None) -> None:
    from flows.board import bar
    from storage.refs import CheckpointRef, short
    from tasks.card import card_of_model
    from tasks.export import export as write

    if form not in _WHOLE:
        raise InvalidInput(
            f"{short(ref)} is no update, and only updates are exported as {form}",
            remedy="Name an update; `deltaworks line log` and `deltaworks line show` list those of a line",
        )
    with bar(console, "writing tensors", quiet) as report:
        model = CheckpointRef(ref)
        card = card_of_model(model, place.store, _known(place, base_model))
        files = write(model, folder, place.store, report=report, card=card)
    console.print(f"{len(files)} files in {folder}")
    console.print(f'load it with AutoModel.from_pretrained("{folder}")')


def _update(
    place: Workplace,
    ref: UpdateRef,
    folder: Path,
    form: Form,
    lora: LoraForm | None,
    dtype: str | None,
    quiet: bool,
    base_model: str | None,
) -> Exported:
    from flows.board import bar
    from tasks import exports
    from tasks.card import card_of_update

    applied = exports.open_applied(ref, place.store, place.settings.device)
    kind = "checkpoint" if form in _WHOLE else str(form)
    applied.card = card_of_update(ref, applied.base.ref, place.store, _known(place, base_model), kind)
    with bar(console, "writing tensors", quiet) as report:
        match form:
            case Form.LORA:
                return exports.export_lora(applied, folder, lora, place.settings.budget, report)
            case Form.PATCH:
                return exports.export_patch(applied, folder, report=report)
            case Form.DELTA:
                return exports.export_delta(applied, folder, _dtype(dtype), report=report)
            case _:
                return exports.export_checkpoint(applied, folder, report=report)


def _check_options(form: Form, given: dict[str, object]) -> None:
    """Options that the form does not have are mistakes, and not ignored."""
    known = {Form.LORA: set(given), Form.DELTA: {"--dtype"}}.get(form, set())
    wrong = [name for name, value in given.items() if value is not None and name not in known]
    if wrong:
        fits = "lora or delta" if wrong == ["--dtype"] else "lora"
        raise InvalidInput(f"{', '.join(wrong)} does not go with --as {form}", remedy=f"It belongs to --as {fits}")
    if given["--rank"] is not None and given["--error"] is not None:
        raise InvalidInput("--rank and --error both say how much to cut", remedy="Give one of them")


def _lora(rank: int | None, error: float | None, skip: bool, dtype: str | None) -> LoraForm:
    from tasks.exports import LoraForm

    return LoraForm(LoraForm.rank if rank is None else rank, error, skip, _dtype(dtype))


def _dtype(name: str | None) -> torch.dtype:
    import torch

    if name is not None and name not in _DTYPES:
        raise InvalidInput(f"--dtype {name!r} is not one of {', '.join(_DTYPES)}")
    found: torch.dtype = getattr(torch, name or "float32")
    return found
