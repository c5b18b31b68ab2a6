"""The graph as SVG: a column for each kind of node, a row for each merge, so that it reads like the journal.

Laid out by hand, because the order is known: a general layout would move everything with each new version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tasks.lineage import words
from tasks.lineage.nodes import KINDS, LEFT_OUT, REFUSED, Edge, Kind, Lineage, Node

WIDTH, GAP, HEIGHT, ROW = 140, 38, 66, 94
_TOP, _LEFT = 40, 8
_LANE = 16  # of the base's line below the top of a node
_TITLE, _LINE = 20, 23  # characters that fit


@dataclass(frozen=True)
class Badge:
    """An alias of a version, or that its gate refused it."""

    text: str
    x: int
    width: int
    failed: bool


@dataclass(frozen=True)
class Box:
    """A node and where it lies, in pixels."""

    node: Node
    number: int
    x: int
    y: int
    height: int = HEIGHT

    @property
    def right(self) -> int:
        return self.x + WIDTH

    @property
    def middle(self) -> int:
        return self.y + self.height // 2

    @property
    def bottom(self) -> int:
        return self.y + self.height

    @property
    def centre(self) -> int:
        return self.x + WIDTH // 2

    @property
    def title(self) -> str:
        return words.cut(self.node.title, _TITLE)

    @property
    def lines(self) -> list[str]:
        return [words.cut(line, _LINE) for line in words.shown(self.node)]

    @property
    def badges(self) -> list[Badge]:
        """Beside each other on the upper edge, from the right."""
        found: list[Badge] = []
        edge = self.right - 6
        for text in reversed(self.node.badges):
            width = 14 + round(6.5 * len(text))
            found.append(Badge(text, edge - width, width, text in (LEFT_OUT, REFUSED)))
            edge -= width + 4
        return found

    @property
    def said(self) -> str:
        """For a screen reader, and as a tooltip."""
        about = [f"{name} {value}" for name, value in words.figures(self.node)]
        return "; ".join([f"{words.NAMES[self.node.kind]} {self.node.title}", *about, *self.node.notes])


@dataclass(frozen=True)
class Path_:
    """A line between two nodes, as SVG draws it."""

    d: str
    source: int
    target: int
    role: str
    aside: bool


@dataclass(frozen=True)
class Drawing:
    width: int
    height: int
    columns: Sequence[tuple[str, int]]
    boxes: Sequence[Box]
    paths: Sequence[Path_]


def drawn(lineage: Lineage) -> Drawing:
    """Where everything lies."""
    kinds: list[Kind] = [kind for kind in KINDS if lineage.of_kind(kind)]
    places = {kind: _LEFT + number * (WIDTH + GAP) for number, kind in enumerate(kinds)}
    boxes: dict[str, Box] = {}
    for number, node in enumerate(lineage.nodes):
        y = _TOP + ROW * max(node.row - 1, 0)
        box = Box(node, number, places[node.kind], y)
        if node.kind == "data":  # leaves room for the line of the base above it
            box = Box(node, number, places[node.kind], y + 24, HEIGHT - 24)
        boxes[node.id] = box
    rows = max((node.row for node in lineage.nodes), default=1)
    paths = [_path(edge, boxes[edge.source], boxes[edge.target]) for edge in lineage.edges]
    return Drawing(
        2 * _LEFT + len(kinds) * (WIDTH + GAP) - GAP,
        _TOP + rows * ROW - (ROW - HEIGHT) + 10,
        [(words.NAMES[kind], places[kind] + WIDTH // 2) for kind in kinds],
        list(boxes.values()),
        paths,
    )


def _path(edge: Edge, source: Box, target: Box) -> Path_:
    """Straight and square lines: along the lane of a row, or down between the columns."""
    aside = target.node.aside
    if edge.role == "base":
        lane = target.y + _LANE
        if source.y + _LANE == lane:
            d = f"M{source.right} {lane}H{target.x}"
        else:
            bus = source.right + GAP // 2
            d = f"M{source.right} {source.y + _LANE}H{bus - 8}q8 0 8 8V{lane - 8}q0 8 8 8H{target.x}"
    elif edge.role == "start":
        gap = target.y - (ROW - HEIGHT) // 2
        d = f"M{source.centre} {source.bottom}V{gap - 6}q0 6 -6 6H{target.centre + 6}q-6 0 -6 6V{target.y}"
    elif edge.role == "state" and source.node.kind == "state" and target.node.kind == "state":
        if target.node.row == source.node.row + 1:
            d = f"M{source.centre} {source.bottom}V{target.y}"
        else:
            out = source.right + 12
            d = f"M{source.right} {source.y + 14}H{out - 6}q6 0 6 6V{target.y + 8}q0 6 -6 6H{target.right}"
    elif source.middle == target.middle or edge.role == "data":
        d = f"M{source.right} {source.middle}H{target.x}"
    else:  # an update that was met in an earlier row
        half = source.right + GAP // 2
        d = f"M{source.right} {source.middle}C{half} {source.middle} {half} {target.middle} {target.x} {target.middle}"
    return Path_(d, source.number, target.number, edge.role, aside)


def svg(lineage: Lineage, alone: bool = True) -> Markup:
    """The picture. `alone`: as a file of its own, whose nodes are links; else as a part of the page."""
    text = templates().get_template("graph.svg").render(drawing=drawn(lineage), lineage=lineage, alone=alone)
    return Markup(text)  # the template has escaped every name in it


@cache
def templates() -> Environment:
    """Every template escapes whatever it is given: names of tasks and lines are anybody's."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"page": lambda node: next(iter(links(node).values()), None), "links": links}
    return made


def web_address(address: str | None) -> str | None:
    """An address that a browser may be sent to, or None."""
    return address if address and address.startswith(("http://", "https://")) else None


def links(node: Node) -> Mapping[str, str]:
    return {word: page for word, page in node.links.items() if web_address(page)}
