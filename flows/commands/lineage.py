"""`deltaworks lineage`: where a version of a line comes from, as a tree, a page, a picture, or data."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.terminal import Memory, Workers, console, errors, errors_explained, open_workplace
from storage.errors import InvalidInput, Missing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.tree import Tree

    from flows.workplace import Workplace
    from storage.lines import Entry
    from tasks.lineage.nodes import Lineage, Node


def lineage(
    version: Annotated[
        str,
        typer.Argument(
            metavar="NAME[@VERSION]",
            help="A line, and a version of its model: a number, or an alias like champion; without one, head.",
        ),
    ],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the page: one file, no network.")] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the graph as a picture.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, and nothing else.")] = False,
    as_mermaid: Annotated[
        bool, typer.Option("--mermaid", help="Print the graph for Markdown, in Mermaid's language, and nothing else.")
    ] = False,
    open_it: Annotated[bool, typer.Option("--open", help="Write the page and open it in a browser.")] = False,
    memory: Memory = None,
    workers: Workers = None,
) -> None:
    """Show what a merged model was made from: base, data, fine-tuned models, updates, states, and every version before.

    Without options, a tree. The page adds scores, forgetting, how alike the updates are, layers, bytes and seconds.

    Every version in MLflow has its page too, as it was when the version was made: lineage.html of its run.

    A line that MLflow does not know is read from the store alone; VERSION is then the number of a journal entry.

    Examples:  deltaworks lineage demo-opcm

               deltaworks lineage demo-opcm@champion --open

               deltaworks lineage demo-opcm@4 --html lineage.html --svg lineage.svg

               deltaworks lineage demo-opcm --mermaid >> NOTES.md
    """
    with errors_explained():
        if as_json and as_mermaid:
            raise InvalidInput("--json and --mermaid both print", remedy="Give one of them")
        place = open_workplace(memory=memory, workers=workers)
        found, described = _found(version, place)
        if open_it and html is None:
            stem = found.title.replace(", entry ", "-").replace("/", "-")
            html = place.settings.home / "reports" / f"lineage-{stem}.html"
        for path in (html, svg):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
        _write(found, described, place, html, svg, as_json)
        if as_mermaid:
            from tasks.lineage.mermaid import mermaid

            typer.echo(mermaid(found), nl=False)
        elif not as_json and html is None and svg is None:
            console.print(tree(found))
        for path in (html, svg):
            if path is not None and not (as_json or as_mermaid):
                console.print(f"written: {path}", soft_wrap=True, markup=False)
        if open_it and html is not None and not webbrowser.open(html.absolute().as_uri()):
            console.print("no browser was found here: open the file in one")


def _write(
    found: Lineage, described: str, place: Workplace, html: Path | None, svg: Path | None, as_json: bool
) -> None:
    from tasks.lineage import picture
    from tasks.lineage.measures import measure
    from tasks.lineage.page import as_json as data
    from tasks.lineage.page import page

    if svg is not None:
        svg.write_text(picture.svg(found), encoding="utf-8")
    if html is None and not as_json:
        return
    measures = measure(found, place.store, budget=place.settings.budget)
    if html is not None:
        html.write_text(page(found, measures, described), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(data(found, measures), indent=2))


def _found(text: str, place: Workplace) -> tuple[Lineage, str]:
    """The lineage of what was named, and the sentences that the registry has of it."""
    from storage.lines import Line
    from storage.registry_lines import LineVersions, named_version
    from tasks.lineage.versions import MEASURED, registered_scores, version_lineage

    name, which = named_version(text)
    store = place.store
    known = name in Line.names(store.objects)
    journal = list(Line(store.objects, name).entries()) if known else []
    try:
        versions = LineVersions(place.registry, name)
        all_of_it = versions.all()
    except Missing:
        if not journal:
            raise
        return _unregistered(name, which, journal, place), ""
    if not all_of_it and journal:
        return _unregistered(name, which, journal, place), ""
    one = versions.one(which)
    made_in = one.tags.get("store", store.url)
    if made_in.rstrip("/") != store.url.rstrip("/"):
        errors.print(f"note: {one} was made in {made_in}, which is not this store, {store.url}", markup=False)
    pages: Mapping[int, Mapping[str, str]] = {each.number: versions.stage_pages(each) for each in all_of_it}
    # versions that were registered before they said where the scores beside them are
    scored = registered_scores(all_of_it, store, everything=not all(MEASURED in each.tags for each in all_of_it))
    return version_lineage(one, all_of_it, journal, store, pages, scored), one.description


def _unregistered(name: str, which: str | None, journal: Sequence[Entry], place: Workplace) -> Lineage:
    from tasks.lineage.scored import Scored
    from tasks.lineage.versions import entries_at, entry_lineage

    _, entries = entries_at(name, which, journal)
    return entry_lineage(name, entries, place.store, Scored.everything(place.store))


def tree(found: Lineage) -> Tree:
    """Base and merges as branches; under each merge its version, and what it was made from."""
    from rich.markup import escape
    from rich.text import Text
    from rich.tree import Tree

    from tasks.lineage import words

    def line(node: Node) -> Text:
        text = Text(f"{words.NAMES[node.kind]:<12} ", "dim")
        text.append(node.title, "bold" if node.kind == "model" else "")
        for badge in node.badges:
            text.append(f" [{badge}]", "green" if badge not in ("left out", "refused") else "red")
        told = [f"{name} {value}" for name, value in words.figures(node)]
        text.append(f"  {', '.join(told)}" if told else "")
        if node.ref:
            kind, _, digits = node.ref.partition("/")
            text.append(f"  {kind}/{digits[:8]}", "cyan")
        for note in node.notes:
            text.append(f"  ({note})", "yellow")
        return text

    whole = Tree(f"[bold]{escape(found.title)}[/]{''.join(f' [green]{escape(one)}[/]' for one in found.aliases)}")
    for node in found.of_kind("base"):
        whole.add(line(node))
    for row in sorted({node.row for node in found.nodes if node.row}):
        inside = [node for node in found.nodes if node.row == row]
        head = next((node for node in reversed(inside) if node.kind == "model"), inside[-1])
        branch = whole.add(line(head))
        for node in reversed([one for one in inside if one is not head]):
            branch.add(line(node))
    return whole
