"""`deltaworks line policy`: how what is submitted to a line becomes an update of it, and what each merge is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.queues import Name
from flows.terminal import console, errors_explained, open_workplace
from storage.errors import InvalidInput

if TYPE_CHECKING:
    from configs.exam import Exam
    from storage.artifacts import ArtifactStore
    from storage.refs import CheckpointRef
    from tasks.retry import OtherRecipe


def line_policy(
    name: Name,
    codec: Annotated[
        str | None, typer.Option(metavar='"NAME KEY=VALUE ..."', help="Write the updates of submissions by this codec.")
    ] = None,
    heads: Annotated[str | None, typer.Option(help="refuse or keep tensors that only the submission has.")] = None,
    exam: Annotated[
        str | None,
        typer.Option(metavar="FILE|none", help="Suites that every merge is asked, and a gate: YAML, or a chain's."),
    ] = None,
) -> None:
    """Print, or set, how what is submitted to a line becomes an update of it. It is kept for all that come after.

    With an exam, every merge is evaluated before it enters the line. Its gate moves the champion, or leaves the merge
    out (on_failure: leave_out) and puts the submission aside with the reason:

    suites: [{name: sums, suite: {name: causal_lm, data: ..., prompt: question, answer: answer}}]
    gate: {name: gate, average_drop: 0.01, on_failure: leave_out}

    Examples:  deltaworks line policy support        deltaworks line policy support --codec "ternary density=0.2"

               deltaworks line policy support --exam exam.yaml
    """
    with errors_explained():
        if heads not in (None, "refuse", "keep"):
            raise InvalidInput(f"--heads must be refuse or keep, found {heads!r}")
        from dataclasses import replace

        from configs.codec_words import codec_from_words
        from configs.exam import exam_of, load_exam
        from storage.lines import Line
        from storage.queue import Queue
        from tasks.extract import Extract
        from tasks.intake import intake_of

        words = codec.split() if codec is not None else []
        chosen = codec_from_words(words[0] if words else "", words[1:]) if codec is not None else None
        asked = load_exam(exam, name) if exam not in (None, "none") else None
        store = open_workplace().store
        line, queue = Line(store.objects, name), Queue(store.objects, name)
        base = line.head().base
        intake = intake_of(queue, line, store)
        wanted = replace(intake, codec=chosen or intake.codec)
        wanted = replace(wanted, extract=Extract(heads=heads) if heads else wanted.extract)  # type: ignore[arg-type]
        kept = asked or (None if exam == "none" else exam_of(queue.policy(), name))
        if asked is not None:
            _try(asked, base, store)
        queue.set_policy({**wanted.spec(), **({"exam": kept.spec()} if kept else {})})
        for text in (*_intake_lines(wanted.spec()), *_exam_lines(kept)):
            console.print(text, soft_wrap=True, markup=False)


def _try(exam: Exam, base: CheckpointRef, store: ArtifactStore) -> None:
    """Find out now whether the suites can be asked, and not at the first submission."""
    source = store.open(base, "checkpoint")
    for one in (*exam.suites, *exam.retained):
        try:
            one.suite.open(source).rows("test")
        except InvalidInput as error:
            raise InvalidInput(f"suite {one.name!r}: {error}") from error


def _intake_lines(spec: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for part, one in spec.items():
        settings = ", ".join(f"{key} {value}" for key, value in one.items() if key not in ("name", "version"))
        yield f"{part:<8} {one['name']} {settings}".rstrip()


def _exam_lines(exam: Exam | None) -> Iterator[str]:
    from tasks.retry import OtherRecipe
    from tasks.suites import source_of

    if exam is None:
        yield "exam     none: merges are not evaluated, and nobody is the champion"
        return
    for one in exam.suites:
        yield f"exam     {one.name}: {one.suite.name}, {source_of(one.suite)}"
    for one in exam.retained:
        yield f"retained {one.name}: {one.suite.name}, {source_of(one.suite)}"
    gate = exam.gate.spec() if exam.gate else {}
    rules = ", ".join(
        f"{key} {value}" for key, value in gate.items() if key not in ("name", "version", "retry") and value
    )
    yield f"gate     {rules or 'none: nobody is the champion'}"
    for other in exam.gate.retry if exam.gate else ():
        yield f"retry    {_named(other) if isinstance(other, OtherRecipe) else f'factor {other:g}'}"


def _named(recipe: OtherRecipe) -> str:
    from flows.tables import recipe_text

    kinds = {"merger": recipe.merger, "sparsify": recipe.sparsify, "scaling": recipe.scaling}
    return "; ".join(f"{kind} {recipe_text(one.spec())}" for kind, one in kinds.items() if one is not None)
