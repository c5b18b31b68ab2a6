"""The catalogue: what `deltaworks mergers`, `codecs` and `tuners` print. Read from the choices themselves, so that it
lists whatever there is."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from storage.errors import InvalidInput
from tasks.choice import Choice
from tasks.codecs import CODECS
from tasks.mergers import MERGERS, Joint
from tasks.scalings import SCALINGS
from tasks.sparsifiers import SPARSIFIERS

_WIDE = 100  # columns that running text takes at most
_SENTENCE = re.compile(r"(?<!\bal)(?<!\be\.g)(?<!\bi\.e)\.(?=\s|$)")
_ARXIV = re.compile(r"arXiv \d{4}\.\d{4,5}")
_SETTING = re.compile(r"\s*\w+(, \w+)*: ")
_ENTRY = re.compile(r"\s*\S+( \S+)*?\s{2,}(?=\S)")  # the word that an indented line explains, and the gap after it

Families = Mapping[str, Mapping[str, Any]]  # the key of a config, and the choices there
MERGING: Families = {"merger": MERGERS, "sparsify": SPARSIFIERS, "scaling": SCALINGS}
CODING: Families = {"codec": CODECS}

_SEQUENTIAL = "sequential mergers: updates are folded in one by one, in constant memory"
_JOINT = "joint mergers: the updates are read together when the model is written"


def overview(width: int) -> Iterator[str | Table]:
    """All mergers, sparsifiers and scalings, for a terminal of `width` columns."""
    for title, joint in ((_SEQUENTIAL, False), (_JOINT, True)):
        table = _table(title, "name", "state", "weights", "source", "what it does")
        for name, kind in MERGERS.items():
            if issubclass(kind, Joint) == joint:
                about = (_state(kind), "yes" if kind.weighted else "no", _source(kind), _summary(kind))
                table.add_row(name, *map(escape, about))
        if table.row_count:
            yield table
    for title, family in (
        ("sparsify: what thins an update before it is merged", SPARSIFIERS),
        ("scaling: what sets the size of the merged delta", SCALINGS),
    ):
        table = _table(title, "name", "source", "what it does")
        for name, choice in family.items():
            table.add_row(name, escape(_source(choice)), escape(_summary(choice)))
        yield table
    notes = (
        "All work without data. state: numbers kept per parameter; weights: whether a task's `weight` counts.",
        "Settings of one: `deltaworks mergers NAME`. In the lines of a config:",
        "  {name: my-line, merger: {name: NAME}, sparsify: {name: NAME}, scaling: {name: NAME}}",
    )
    yield "\n".join(textwrap.fill(note, min(width, _WIDE)) for note in notes)


def codecs(width: int) -> Iterator[str | Table]:
    """All codecs, for a terminal of `width` columns."""
    table = _table("codecs: how the numbers of an update are written", "name", "keeps", "source", "what it does")
    for name, kind in CODECS.items():
        keeps = "every bit" if kind.lossless else "the numbers" if name == "dense" else "about"
        table.add_row(name, keeps, escape(_source(kind)), escape(_summary(kind)))
    yield table
    notes = (
        "Settings of one: `deltaworks codecs NAME`. What each would make of an update: `deltaworks inspect UPDATE`.",
        "In a config:  codec: {name: NAME}.  For one update:  deltaworks compress UPDATE NAME",
    )
    yield "\n".join(textwrap.fill(note, min(width, _WIDE)) for note in notes)


def tuning() -> Families:
    """Imported when asked for: tuners bring transformers, which takes seconds."""
    from tasks.optimizers import OPTIMIZERS
    from tasks.tuners import TUNERS

    return {"tuner": TUNERS, "optimizer": OPTIMIZERS}


def tuners(width: int) -> Iterator[str | Table]:
    """All tuners and optimizers, for a terminal of `width` columns."""
    families = tuning()
    table = _table("tuners: what learns of a model", "name", "source", "library", "trains", "own settings")
    for name, kind in families["tuner"].items():
        table.add_row(name, *map(escape, (_source(kind), kind.library, kind.trains, _names(kind))))
    yield table
    table = _table("optimizers: how it learns, with any tuner", "name", "source", "library", "state", "for", "settings")
    for name, kind in families["optimizer"].items():
        table.add_row(name, *map(escape, (_source(kind), kind.library, kind.state, kind.steps, _names(kind))))
    yield table
    notes = (
        "state: numbers kept of a matrix with the sides s <= l. What an optimizer is not for is left to AdamW.",
        "Settings of one, and those that all tuners share: `deltaworks tuners NAME`. In a config, of a chain or of a "
        "task:",
        "  tuner: {name: NAME, steps: 500, learning_rate: 1.0e-4, optimizer: {name: NAME}}",
    )
    yield "\n".join(textwrap.fill(note, min(width, _WIDE)) for note in notes)


def about(name: str, width: int, families: Families = MERGING) -> Iterator[str | Table]:
    """Everything about one choice of these families."""
    role = next((role for role, family in families.items() if name in family), None)
    if role is None:
        known = [one for family in families.values() for one in family]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise InvalidInput(f"there is no {name!r}", remedy=f"{hint}Choices: {', '.join(known)}")
    kind = families[role][name]
    yield f"[bold]{name}[/], version {kind.version}: {escape(_nature(role, kind))}\n"
    module = inspect.getmodule(kind)
    for text in (module.__doc__ if module else None, kind.__doc__):
        yield escape(_reflowed(inspect.cleandoc(text or ""), min(width, _WIDE))) + "\n"
    settings = _own(kind)
    if settings:
        yield _settings("settings", kind, settings)
    if role == "tuner":
        from tasks.tuners import Training

        yield escape(_reflowed(inspect.cleandoc(Training.__doc__ or ""), min(width, _WIDE))) + "\n"
        shared = [
            one for one in dataclasses.fields(kind) if one.name not in ("name", "version") and one not in settings
        ]
        yield _settings("settings that all tuners share, with the defaults of this one", kind, shared)
    for line in _company(role):
        yield escape(textwrap.fill(line, min(width, _WIDE), subsequent_indent="  "))
    example = ", ".join([f"name: {name}", *(f"{one.name}: {_default(one)}" for one in settings[:1])])
    whole = f"{role}: {{{example}}}"
    yield f"\nin a config:     {f'tuner: {{name: full, {whole}}}' if role == 'optimizer' else whole}"
    if role == "codec":
        yield f"for an update:   deltaworks compress UPDATE {name}"
    elif role in MERGING:
        yield f"for a line:      deltaworks line rebuild LINE --{role} {name}"


def _nature(role: str, kind: Any) -> str:
    source = getattr(kind, "source", "") or _source(kind)
    if role == "codec":
        return f"a {'lossless' if kind.lossless else 'lossy'} codec, {source}"
    if role in ("tuner", "optimizer"):
        nature = f"{'a tuner' if role == 'tuner' else 'an optimizer'}, {source}; library: {kind.library}"
        if role == "tuner":
            return f"{nature}\ntrains: {kind.trains}\nstored of an update: {kind.stored}"
        return f"{nature}\nfor {kind.steps}; state of a matrix [s, l]: {kind.state}"
    if role != "merger":
        return ", ".join(text for text in ("a sparsifier" if role == "sparsify" else "a scaling", source) if text)
    nature = "a joint merger" if issubclass(kind, Joint) else "a sequential merger"
    weights = "weights count" if kind.weighted else "all updates count the same"
    return f"{nature}, {source}\nstate per parameter: {kind.state_size}; {weights}; needs no data"


def _company(role: str) -> Iterator[str]:
    """What a choice can be put together with: in a recipe everything goes with everything."""
    if role == "merger":
        yield from (f"goes with {key}: {', '.join(MERGING[key])}" for key in ("sparsify", "scaling"))
    elif role in MERGING:
        yield f"goes with mergers: {', '.join(MERGERS)}"


def _summary(kind: Any) -> str:
    """The first sentence of the choice's file, without the name that it begins with."""
    module = inspect.getmodule(kind)
    text = " ".join(((module.__doc__ if module else "") or kind.__doc__ or "").split())
    sentence = _SENTENCE.split(text, maxsplit=1)[0]
    return sentence.partition(": ")[2] or sentence


def _source(kind: Any) -> str:
    """Where a method comes from, in a word or two."""
    module = inspect.getmodule(kind)
    found = getattr(kind, "source", None) or next(iter(_ARXIV.findall((module and module.__doc__) or "")), "")
    return str(found).partition(",")[0]


def _state(kind: Any) -> str:
    """How large the state is, without what explains it: that is among the settings."""
    return re.split("[:;]", str(kind.state_size), maxsplit=1)[0]


def _own(kind: Any) -> list[dataclasses.Field[Any]]:
    """The settings of a choice, of a tuner without those that all tuners have."""
    left_out = {"name", "version"}
    if hasattr(kind, "trains"):
        from tasks.tuners import Training

        left_out |= {one.name for one in dataclasses.fields(Training)}
    return [one for one in dataclasses.fields(kind) if one.name not in left_out]


def _names(kind: Any) -> str:
    return ", ".join(one.name for one in _own(kind))


def _settings(title: str, kind: Any, settings: list[dataclasses.Field[Any]]) -> Table:
    table = _table(title, "name", "default", "type")
    hints = get_type_hints(kind)
    for one in settings:
        table.add_row(one.name, escape(_default(one)), escape(_type(hints[one.name])))
    return table


def _type(hint: Any) -> str:
    """A type as it is written in a config."""
    if isinstance(hint, type) and issubclass(hint, Choice):
        return f"{{name: {hint.name}}}"  # type: ignore[attr-defined]
    if get_origin(hint) is Literal:
        return " | ".join(str(one) for one in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(_type(one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {_type(get_args(hint)[0])}"
    return "none" if hint is NoneType else str(getattr(hint, "__name__", hint))


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, Choice):
        return f"{{name: {value.name}}}"  # type: ignore[attr-defined]
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _reflowed(text: str, width: int) -> str:
    """A docstring at another width: running text is joined, indented entries keep their hanging indent."""
    blocks: list[tuple[int, str]] = []  # where continuation lines begin, and the text
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            blocks.append((0, ""))
        elif blocks and blocks[-1][1] and (_flows_on(line, indent, blocks[-1]) or _continues(line, blocks[-1])):
            blocks[-1] = (indent, f"{blocks[-1][1]} {line.strip()}")
        else:
            entry = _ENTRY.match(line)
            blocks.append((entry.end() if entry else indent, line))
    return "\n".join(textwrap.fill(one, max(width, hang + 30), subsequent_indent=" " * hang) for hang, one in blocks)


def _flows_on(line: str, indent: int, block: tuple[int, str]) -> bool:
    """Whether a line goes on with running text: a setting after a setting does not."""
    return indent == block[0] and not (_SETTING.match(line) and _SETTING.match(block[1]))


def _continues(line: str, block: tuple[int, str]) -> bool:
    """Whether an indented line goes on with a block of the form `setting: what it is`."""
    hang, text = block
    deeper = len(line) - len(line.lstrip()) > hang
    return deeper and bool(_SETTING.match(text)) and not _ENTRY.match(line)


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for column in columns:
        table.add_column(column, no_wrap=column in ("name", "state", "weights", "source", "library"))
    return table
