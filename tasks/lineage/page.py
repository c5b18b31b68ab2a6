"""The page: a version's lineage, scores and costs as one HTML file that needs no network and no other file.

The picture is SVG and the script is ours, a hundred lines: plotly would add 4.8 MB to the page of every version. What
is a table by nature, the accuracy matrix or the cosines, is a table whose cells are coloured, so that nothing is in a
picture alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from markupsafe import Markup

from tasks.lineage import words
from tasks.lineage.curves import Chart, Curve, chart
from tasks.lineage.measures import Measures
from tasks.lineage.nodes import Kind, Lineage, Node
from tasks.lineage.picture import links, svg, templates, web_address
from tasks.lineage.scored import Row
from tasks.lineage.trajectory import plane, trajectory
from tasks.sizes import size


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map. `share`: how strong its colour is, from 0 to 1; `sign`: which of two colours."""

    text: str
    share: float | None = None
    sign: str = ""
    about: str = ""


@dataclass(frozen=True)
class Heat:
    """A heat map, which is a table."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    kind: str = "scores"


@dataclass(frozen=True)
class Bar:
    """Bytes and seconds of all nodes of one kind. `share` of the longest bar."""

    name: str
    kind: Kind
    count: int
    size: str
    share: float
    took: str
    devices: str


def page(lineage: Lineage, measures: Measures, description: str = "") -> str:
    """The page as HTML."""
    found = templates().get_template("page.html")
    accuracy, alike, layers = accuracy_heat(lineage), alike_heat(measures), layer_heat(measures)
    places = trajectory(lineage)
    return found.render(
        lineage=lineage,
        description=[said.replace("`", "") for said in description.split("\n\n") if said not in ("", words.WHERE_FROM)],
        graph=svg(lineage, alone=False),
        data=embedded([_detail(number, node) for number, node in enumerate(lineage.nodes)]),
        head=list(_head(lineage)),
        merger=_settings(lineage.merger),
        page=web_address(lineage.page),
        accuracy=accuracy,
        chart=score_chart(lineage),
        places=places,
        trajectory=plane(places) if places else None,
        alike=alike,
        conflicts=conflict_heat(measures),
        layers=layers,
        bars=stages(lineage),
        missing=measures.missing,
        nodes=[(number, node, _detail(number, node)) for number, node in enumerate(lineage.nodes)],
    )


def as_json(lineage: Lineage, measures: Measures) -> dict[str, Any]:
    """The same data for programs."""
    kinds = [one.kind for one in stages(lineage) if one.name == words.NAMES[one.kind]]
    bars = [{"kind": kind, "count": len(found := lineage.of_kind(kind)), **_totals(found)} for kind in kinds]
    told = asdict(measures)
    measured = {"similarity": told["alike"], "layers": told["layers"], "missing": dict(measures.missing)}
    return {**lineage.as_json(), "stages": bars, **measured}


def embedded(value: Any) -> Markup:
    """JSON inside a script element: nothing in it can end the element, whatever names hold."""
    text = json.dumps(value, ensure_ascii=True)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def accuracy_heat(lineage: Lineage) -> Heat | None:
    """R: a row per task, a column per step, with the base and each task's own model before them."""
    accuracy = lineage.accuracy
    if not accuracy.rows or not accuracy.columns:
        return None
    rows: list[tuple[str, Sequence[Cell]]] = []
    for task in accuracy.columns:
        cells = [_score(accuracy.base.get(task)), _score(accuracy.alone.get(task))]
        for row in accuracy.rows:
            found = row.scores.get(task)
            if found is None:
                cells.append(Cell(""))
                continue
            about = f"{found.metric}, {found.samples:,} samples"
            if found.low is not None and found.high is not None:
                about += f", {100 * found.low:.1f} to {100 * found.high:.1f} at 95 %"
            cells.append(_score(found.value, about))
        rows.append((task, cells))
    columns = ["base", "alone", *(f"+ {row.merged}" for row in accuracy.rows)]
    return Heat("Score in % on each task, after each merge", columns, rows)


def alike_heat(measures: Measures) -> Heat | None:
    """Cosines: red together, blue against each other."""
    if measures.alike is None:
        return None
    caption = "Cosine between the updates, those alike beside each other"
    square = measures.alike.cosines
    reach = _reach(square, 0.0)
    return _square(
        caption,
        measures.alike.updates,
        [[_signed(f"{value:.2f}".replace("-0.00", "0.00"), value / reach) for value in row] for row in square],
    )


def conflict_heat(measures: Measures) -> Heat | None:
    """Sign conflicts: half is chance, more is against each other."""
    if measures.alike is None:
        return None
    caption = "Sign conflicts: of the numbers that both change, the share that they change in opposite directions"
    square = measures.alike.conflicts
    reach = _reach(square, 0.5)
    return _square(
        caption,
        measures.alike.updates,
        [[_signed(f"{100 * value:.0f} %", (0.5 - value) / reach) for value in row] for row in square],
    )


def _square(caption: str, names: Sequence[str], cells: list[list[Cell]]) -> Heat:
    for place, row in enumerate(cells):
        row[place] = Cell("·")
    return Heat(caption, names, list(zip(names, cells, strict=True)), "signed")


def layer_heat(measures: Measures) -> Heat | None:
    """Where in the model each update lies: its squared norm by layer, as shares of the whole."""
    if measures.layers is None:
        return None
    found = measures.layers
    totals = [sum(row[column] ** 2 for row in found.norms) for column in range(len(found.columns))]
    rows: list[tuple[str, Sequence[Cell]]] = []
    for layer, norms, base in zip(found.layers, found.norms, found.base, strict=True):
        cells = []
        for norm, total in zip(norms, totals, strict=True):
            share = norm**2 / total if total else 0.0
            of_base = f", {norm / base:.1%} of the base's" if base else ""
            cells.append(Cell(f"{100 * share:.1f}", share, about=f"norm {norm:.4g}{of_base}"))
        rows.append((layer, cells))
    return Heat("Share of the squared norm of each update in each layer, in %", found.columns, rows, "share")


def score_chart(lineage: Lineage) -> Chart | None:
    """Average, worst task and forgetting against the number of merges."""
    rows = [row for row in lineage.accuracy.rows if row.scores]
    if len(rows) < 2:
        return None
    curves = [
        Curve(name, style, [(row.step, value(row)) for row in rows])
        for name, style, value in (
            ("average", "average", lambda row: row.average),
            ("worst task", "worst", lambda row: min(one.value for one in row.scores.values())),
            ("alone", "alone", partial(_alone, lineage.accuracy.alone)),
            ("forgetting", "forgetting", lambda row: row.summary.forgetting if row.summary else None),
        )
    ]
    return chart(curves, [(row.step, f"+ {row.merged}") for row in rows])


def _alone(alone: Mapping[str, float], row: Row) -> float | None:
    """The mean of the models that were tuned for the tasks of a row, each on its own."""
    found = [alone[task] for task in row.scores if task in alone]
    return sum(found) / len(found) if found else None


def stages(lineage: Lineage) -> list[Bar]:
    """What each kind of thing takes in the store, and took to make."""
    kinds: list[Kind] = ["base", "tuned", "update", "compressed", "state", "model"]
    totals = {kind: _totals(lineage.of_kind(kind)) for kind in kinds if lineage.of_kind(kind)}
    most = max((one["bytes"] for one in totals.values()), default=0) or 1
    return [
        Bar(
            words.NAMES[kind],
            kind,
            len(lineage.of_kind(kind)),
            size(one["bytes"]),
            one["bytes"] / most,
            words.duration(one["seconds"]) if one["seconds"] is not None else "",
            ", ".join(one["devices"]),
        )
        for kind, one in totals.items()
    ] + _evaluations(lineage)


def _evaluations(lineage: Lineage) -> list[Bar]:
    """What evaluating all of them took; scores take next to nothing in the store."""
    took = [node.figures["evaluation seconds"] for node in lineage.nodes if "evaluation seconds" in node.figures]
    return [Bar("evaluation", "model", len(took), "", 0.0, words.duration(sum(took)), "")] if took else []


def _totals(nodes: Sequence[Node]) -> dict[str, Any]:
    took = [node.figures["seconds"] for node in nodes if "seconds" in node.figures]
    devices = sorted({str(node.figures["device"]) for node in nodes if "device" in node.figures})
    size = sum(node.figures.get("bytes", 0) for node in nodes)
    return {"bytes": size, "seconds": sum(took) if took else None, "devices": devices}


def _head(lineage: Lineage) -> Iterator[tuple[str, str]]:
    """The numbers that people look for first."""
    models = [node for node in lineage.of_kind("model") if not node.aside]
    figures = models[-1].figures if models else {}
    for name in ("average", "worst", "forgetting", "forward transfer", "held out", "trade-off"):
        if name in figures:
            yield words.label(name), words.figure(name, figures[name])
    yield "updates", str(lineage.earlier + len([node for node in lineage.of_kind("state") if not node.aside]))
    small = [node for kind in ("compressed", "update") for node in lineage.of_kind(kind)]
    if small:
        yield "updates take", size(_totals(lineage.of_kind("compressed") or small)["bytes"])
    if "bytes" in figures:
        yield "the model takes", size(figures["bytes"])


def _detail(number: int, node: Node) -> dict[str, Any]:
    return {
        "number": number,
        "kind": words.NAMES[node.kind],
        "title": node.title,
        "ref": node.ref,
        "address": node.address,
        "figures": words.figures(node),
        "notes": list(node.notes),
        "badges": list(node.badges),
        "links": [list(one) for one in links(node).items()],
    }


def _settings(spec: Mapping[str, Any]) -> str:
    rest = ", ".join(f"{key} {value}" for key, value in sorted(spec.items()) if key not in ("name", "version"))
    return f"{spec.get('name', '')}{f' ({rest})' if rest else ''}"


def _score(value: float | None, about: str = "") -> Cell:
    return Cell("") if value is None else Cell(words.percent(value), max(0.0, min(1.0, value)), about=about)


def _signed(text: str, strength: float) -> Cell:
    return Cell(text, min(abs(strength), 1.0), "with" if strength > 0 else "against")


def _reach(square: Sequence[Sequence[float]], middle: float) -> float:
    """How far from the middle the colours reach: as far as the pairs do, but never so close that noise is glaring."""
    pairs = [abs(value - middle) for i, row in enumerate(square) for j, value in enumerate(row) if i != j]
    return max(0.05, *pairs) if pairs else 1.0
