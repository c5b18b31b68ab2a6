"""The graph in Mermaid's language, which GitHub and GitLab draw in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from urllib.parse import quote

from tasks.lineage import words
from tasks.lineage.nodes import KINDS, Kind, Lineage, Node
from tasks.lineage.picture import links

_COLOURS: Mapping[Kind, str] = {
    "base": "#57606a",
    "data": "#8a6100",
    "tuned": "#b3471d",
    "update": "#8a3fa0",
    "compressed": "#5a4fcf",
    "state": "#1767b5",
    "model": "#1a7f4b",
}


def mermaid(lineage: Lineage) -> str:
    """A flowchart from left to right; a dashed border is what is no longer in the store, or was left out."""
    return "\n".join(_lines(lineage)) + "\n"


def _lines(lineage: Lineage) -> Iterator[str]:
    yield "flowchart LR"
    names = {node.id: f"n{number}" for number, node in enumerate(lineage.nodes)}
    for node in lineage.nodes:
        about = [f"{words.NAMES[node.kind]}: {node.title}", *words.shown(node), *node.badges]
        text = "<br/>".join(_quoted(one) for one in about)
        yield f'  {names[node.id]}["{text}"]:::{node.kind}'
    for edge in lineage.edges:
        arrow = "-.->" if edge.role == "start" else "-->"
        yield f"  {names[edge.source]} {arrow} {names[edge.target]}"
    for node in lineage.nodes:
        page = next(iter(links(node).values()), None)
        if page:
            yield f'  click {names[node.id]} href "{_address(page)}" _blank'
    for kind in KINDS:
        if lineage.of_kind(kind):
            yield f"  classDef {kind} stroke:{_COLOURS[kind]},stroke-width:2px"
    faint = [names[node.id] for node in lineage.nodes if _faint(node)]
    if faint:
        yield "  classDef faint stroke-dasharray:4 3"
        yield f"  class {','.join(faint)} faint"


def _faint(node: Node) -> bool:
    return node.aside or (node.ref is not None and not node.stored)


def _quoted(text: str) -> str:
    """Inside double quotes Mermaid knows numbered entities, and nothing else ends the text or is read as HTML."""
    plain = " ".join(text.split())
    return "".join(one if one.isalnum() or one in " .,:/%@+-_()=×…" else f"#{ord(one)};" for one in plain)


def _address(page: str) -> str:
    """Inside the quotes of a link Mermaid decodes no entities: what could end them is written as addresses write it."""
    return quote(page, safe=":/?#[]@!$&'()*+,=%~")
