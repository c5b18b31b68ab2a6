"""The graph of a line against what was put in, what is written of it, and what happens when parts are gone."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.errors import Missing
from storage.lines import Line
from storage.registry_lines import LineVersion
from tasks.lineage import measures as measures_room
from tasks.lineage.curves import Curve, chart
from tasks.lineage.measures import clustered, layer_of, measure
from tasks.lineage.mermaid import mermaid
from tasks.lineage.nodes import KINDS, Lineage
from tasks.lineage.page import as_json, page
from tasks.lineage.picture import drawn, svg
from tasks.lineage.scored import Scored
from tasks.lineage.trajectory import plane, trajectory
from tasks.lineage.versions import entries_of, entry_lineage, version_lineage
from tasks.similarity import similarity
from tasks.tensors import read_delta, read_tensor
from tests.builders import memory_store
from tests.tasks.lineage_case import Grown

HOSTILE = '</script><script>alert("1")</script>'
SVG = "{http://www.w3.org/2000/svg}"


def lineage(grown: Grown) -> Lineage:
    return entry_lineage(grown.name, grown.entries, grown.store, Scored.everything(grown.store))


def version(grown: Grown, step: int) -> LineVersion:
    """A step, counted from 0, as the registry tells of it."""
    entry = grown.entries[step]
    tags = {"task": entry.task, "step": str(entry.step), "base": grown.base, "merger": json.dumps(dict(entry.merger))}
    tags |= {"update": str(entry.update), "state": str(entry.state), "model": grown.models[step]}
    tags |= {"scores": grown.scored[step], "parent_version": str(step) if step else "none"}
    tags |= {"measured": " ".join(grown.measured[step]), "able": f"{grown.held[0]} {grown.held[step + 1]}"}
    return LineVersion(grown.name, step + 1, (), "run", "", tags)


@pytest.fixture(scope="module")
def grown() -> Grown:
    return Grown(memory_store())


@pytest.fixture(scope="module")
def found(grown: Grown) -> Lineage:
    return lineage(grown)


def test_every_merge_has_its_way_from_the_base_to_the_model(grown: Grown, found: Lineage) -> None:
    assert [len(found.of_kind(kind)) for kind in KINDS] == [1, 3, 3, 3, 3, 3, 3]
    edges = {(one.source, one.target) for one in found.edges}
    for row, entry in enumerate(grown.entries, 1):
        data, tuned, update, small, state, model = (node.id for node in found.nodes if node.row == row)
        assert (small, state, model) == (entry.update, entry.state, grown.models[row - 1])
        way = [(grown.base, tuned), (data, tuned), (tuned, update), (update, small), (small, state), (state, model)]
        assert set(way) <= edges
        assert (grown.entries[row - 2].state, state) in edges or row == 1
    assert found.title == "tiny, entry 3"
    assert all(node.stored for node in found.nodes if node.kind != "data")


def test_nodes_have_the_figures_of_their_artifacts(grown: Grown, found: Lineage) -> None:
    store = grown.store
    (tuned, *_), (update, *_), (small, *_) = (found.of_kind(kind) for kind in ("tuned", "update", "compressed"))
    assert tuned.figures["score"] == 0.95 and tuned.figures["tuner"] == "full"
    assert update.figures["norm"] == store.open(update.id).manifest.facts["norm"]
    assert small.figures["bytes"] == store.open(small.id).manifest.tensor_bytes < update.figures["bytes"]
    assert (small.figures["codec"], small.figures["density"]) == ("ternary", 0.5)
    assert small.address == f"{store.url.rstrip('/')}/{small.id}"
    assert found.of_kind("data")[1].figures["fingerprint"] == "2" * 12


def test_the_matrix_and_what_it_says(grown: Grown, found: Lineage) -> None:
    matrix = [[row.scores[task].value for task in row.scores] for row in found.accuracy.rows]
    assert matrix == [list(row) for row in grown.matrix]
    assert list(found.accuracy.alone.values()) == list(grown.alone)
    last = found.of_kind("model")[-1].figures
    assert last["average"] == pytest.approx((0.6 + 0.75 + 0.5) / 3)
    assert last["worst"] == 0.5
    assert last["forgetting"] == pytest.approx(((0.9 - 0.6) + (0.7 - 0.75)) / 2)
    assert found.of_kind("base")[0].figures["average"] == pytest.approx(0.1)
    assert last["forward transfer"] == pytest.approx(((0.3 - 0.1) + (0.2 - 0.1)) / 2)
    assert "trade-off" not in last, "no registry says which scores are of the base's abilities"


def registered(grown: Grown, newest: int | None = None) -> Lineage:
    return version_lineage(
        version(grown, 2), [version(grown, step) for step in range(3)], [], grown.store, newest=newest
    )


def test_the_way_between_what_is_gained_and_what_is_held(grown: Grown) -> None:
    found = registered(grown)
    averages, held = [0.1, 0.9, 0.75, (0.6 + 0.75 + 0.5) / 3], [0.96, 0.8, 0.72, 0.6]
    places = trajectory(found)
    assert [one.name for one in places] == ["base", "+ sums", "+ dates", "+ names"]
    assert [one.gained for one in places] == pytest.approx(averages)
    assert [one.held for one in places] == pytest.approx(held)
    assert [one.tradeoff for one in places] == pytest.approx(
        [(a * h) ** 0.5 for a, h in zip(averages, held, strict=True)]
    )
    assert [one.retained for one in places] == pytest.approx([1.0, *(share / 0.96 for share in held[1:])])
    last = found.of_kind("model")[-1].figures
    assert last["trade-off"] == pytest.approx((averages[3] * 0.6) ** 0.5) and last["held out"] == pytest.approx(0.6)
    drawing = plane(places)
    for one, x in zip(drawing.marks, averages, strict=True):  # 10 to 90 % lie between the first tick and the last
        first, final = drawing.across[0][0], drawing.across[-1][0]
        assert one.x == pytest.approx(first + (x - 0.1) / 0.8 * (final - first), abs=0.2)
    text = page(found, measure(found, grown.store))
    checked_page(text)
    assert "+ names: 61.7 % on the tasks, 60.0 % on what the base can do" in text
    assert "FoMo-in-Flux" in text and f"<td>{100 * (averages[3] * 0.6) ** 0.5:.1f}</td>" in text


def test_versions_that_are_older_have_no_such_way(grown: Grown) -> None:
    """They say nothing of abilities, nor of scores before a merge."""
    old = [
        replace(one, tags={k: v for k, v in one.tags.items() if k not in ("able", "measured")})
        for one in (version(grown, step) for step in range(3))
    ]
    found = version_lineage(old[2], old, [], grown.store)
    assert not trajectory(found)
    assert not {"forward transfer", "held out", "trade-off"} & found.of_kind("model")[-1].figures.keys()
    assert "FoMo-in-Flux" not in page(found, measure(found, grown.store))


def test_measures_against_their_formulas(grown: Grown, found: Lineage) -> None:
    measures = measure(found, grown.store)
    assert measures.alike is not None and measures.layers is not None and not measures.missing
    updates = [entry.update for entry in grown.entries if entry.update]
    order = [list(grown.tasks).index(name) for name in measures.alike.updates]
    assert sorted(order) == [0, 1, 2]
    wanted = similarity(updates, grown.store).cosines[np.ix_(order, order)]
    np.testing.assert_array_equal(np.array(measures.alike.cosines), wanted)

    layers = measures.layers
    assert layers.layers == ("embed", "layers.0", "layers.1", "norm")
    assert layers.columns == (*grown.tasks, "merged")
    delta = read_delta(grown.store.open(updates[1]), "layers.1.fc.weight")
    assert layers.norms[2][1] == pytest.approx(float(delta.norm()), rel=1e-6)
    model, base = (grown.store.open(ref) for ref in (grown.models[-1], grown.base))
    moved = read_tensor(model, "embed.weight") - read_tensor(base, "embed.weight")
    assert layers.norms[0][3] == pytest.approx(float(moved.norm()), rel=1e-6)
    assert layers.base[3] == pytest.approx(float(read_tensor(base, "norm.bias").norm()), rel=1e-6)


def test_too_much_is_not_measured_but_said(grown: Grown, found: Lineage) -> None:
    numbers = 3 * sum(math.prod(one.shape) for one in grown.store.open(grown.base).manifest.tensors)
    assert not measure(found, grown.store, limit=numbers).missing
    measures = measure(found, grown.store, limit=numbers - 1)
    assert measures.alike is None and f"{numbers:,} numbers are too many" in measures.missing["layers"]
    assert f"{numbers:,} numbers are too many" in page(found, measures)


def test_many_tensors_are_not_compared_for_every_version(
    grown: Grown, found: Lineage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures_room, "_PAIRS", 11)
    measures = measure(found, grown.store, limit=10**6)
    assert measures.alike is None and measures.layers is not None
    assert "3 updates of 12 tensors are too many to compare" in measures.missing["similarity"]
    assert measure(found, grown.store).alike is not None, "who asks gets it"


def test_of_a_long_line_the_newest_merges_are_drawn(grown: Grown, found: Lineage) -> None:
    """With what the scores say of all of it."""
    cut = registered(grown, newest=2)
    assert cut.earlier == 1
    assert [len(cut.of_kind(kind)) for kind in KINDS] == [1, 2, 2, 2, 2, 2, 2]
    names = {node.id for node in cut.nodes}
    assert all({edge.source, edge.target} <= names for edge in cut.edges)
    assert cut.of_kind("model")[-1].figures["forgetting"] == found.of_kind("model")[-1].figures["forgetting"]
    assert cut.of_kind("model")[-1].figures["forward transfer"] == pytest.approx(((0.3 - 0.1) + (0.2 - 0.1)) / 2)
    assert [row.merged for row in cut.accuracy.rows] == ["dates", "names"] == list(cut.accuracy.tasks)
    text = page(cut, measure(cut, grown.store))
    assert "1 before them are left out" in text and "<dt>updates</dt><dd>3</dd>" in text


def test_a_version_inside_a_rebuild_has_its_merges(grown: Grown) -> None:
    """The journal says so in one entry."""
    folds = [entry.fold for entry in grown.entries]
    opened, journal = next(grown.line.entries()), Line(grown.store.objects, "rebuilt")
    journal.open(grown.base, opened.merger)
    journal.rebuild(journal.head(), opened.merger, folds)
    held = entries_of(version(grown, 1), [], list(journal.entries()))
    assert [one.fold for one in held] == folds[:2]
    with pytest.raises(Missing, match="tiny@2 holds 2 updates, which the journal of line 'tiny' does not list"):
        entries_of(version(grown, 1), [], [])


def test_those_alike_are_neighbours() -> None:
    """Two pairs, given crosswise."""
    cosines = np.array([[1, 0, 0.9, 0], [0, 1, 0, 0.8], [0.9, 0, 1, 0], [0, 0.8, 0, 1]], dtype=float)
    order = clustered(cosines)
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset((0, 2)), frozenset((1, 3))}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layers.3.mlp.fc1.weight", "layers.3"),
        ("text.encoder.layers.10.fc.weight", "text.encoder.layers.10"),
        ("embed.weight", "embed"),
        ("class_token", "class_token"),
    ],
)
def test_the_layer_of_a_parameter(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_json_is_whole(grown: Grown, found: Lineage) -> None:
    told = json.loads(json.dumps(as_json(found, measure(found, grown.store)), allow_nan=False))
    assert told["format"] == "deltaworks/lineage@1"
    names = {node["id"] for node in told["nodes"]}
    assert all({edge["source"], edge["target"]} <= names for edge in told["edges"])
    assert {node["kind"] for node in told["nodes"]} == set(KINDS)
    assert told["accuracy"]["rows"][2]["scores"]["dates"]["value"] == 0.75
    assert told["accuracy"]["rows"][2]["scores"]["dates"]["samples"] == 100
    assert [one["kind"] for one in told["stages"]] == ["base", "tuned", "update", "compressed", "state", "model"]
    assert told["similarity"]["updates"] and told["layers"]["layers"] and told["missing"] == {}


class Tags(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def checked_page(text: str) -> Tags:
    """No element loads anything, ids are unique, and the policy forbids what was forgotten."""
    tags = Tags(text)
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in tags.found:
        assert tag not in ("img", "iframe", "object", "embed", "form", "base"), tag
        assert not attributes.keys() & {"src", "srcset", "action", "onclick", "onload", "onerror"}, (tag, attributes)
        if tag == "link":
            assert attributes["href"] == "data:,"
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", text)
    assert "default-src 'none'" in text
    return tags


def test_the_page_stands_alone(grown: Grown, found: Lineage) -> None:
    text = page(found, measure(found, grown.store), "what it is")
    tags = checked_page(text)
    nodes = [attributes for _, attributes in tags.found if "node" in str(attributes.get("class", "")).split()]
    assert len(nodes) == len(found.nodes)
    assert all(one["tabindex"] == "0" and one["aria-label"] for one in nodes)
    assert text.count("<tr id=") == len(found.nodes)
    assert "prefers-color-scheme: dark" in text
    for words in ("61.7 %", "what it is", "12.5 points", "75.0", "sums", "Cosine", "layers.1", "ternary", "at 95 %"):
        assert words in text, words
    assert len(text) < 80_000


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    grown = Grown(memory_store(), tasks=(HOSTILE, "a&b <i>", "ünï/日本"))
    found = lineage(grown)
    found = replace(found, verdict="failed", reasons=HOSTILE, aliases=(HOSTILE,), page="javascript:alert(1)")
    text = page(found, measure(found, grown.store), HOSTILE)
    tags = checked_page(text)
    assert "alert(" not in "".join(tags.scripts[1:]), "the script is ours alone"
    assert [tag for tag, _ in tags.found].count("script") == 2
    assert "javascript:" not in text
    assert HOSTILE in {node["title"] for node in json.loads(tags.scripts[0])}

    picture = ElementTree.fromstring(svg(found))
    assert not [one for one in picture.iter() if one.tag.endswith("script")]
    assert any(HOSTILE in str(one.text) for one in picture.iter(f"{SVG}title"))

    chart = mermaid(found)
    assert "<script" not in chart and "日本" in chart and "ünï" in chart


def test_the_picture_is_svg_of_its_own(grown: Grown, found: Lineage) -> None:
    picture = ElementTree.fromstring(svg(found))
    groups = [one for one in picture.iter(f"{SVG}g") if one.get("class", "").startswith("node")]
    assert len(groups) == len(found.nodes)
    assert len(list(picture.iter(f"{SVG}path"))) == len(found.edges)
    drawing = drawn(found)
    assert all(box.right <= drawing.width and box.bottom <= drawing.height for box in drawing.boxes)
    places = [(box.x, box.y) for box in drawing.boxes]
    assert len(places) == len(set(places)), "no two nodes lie on each other"


def test_mermaid_has_every_node_and_edge(found: Lineage) -> None:
    first, *lines = mermaid(found).splitlines()
    assert first == "flowchart LR"
    nodes = [re.fullmatch(r'  (n\d+)\["([^"<>]|<br/>)*"\]:::(\w+)', line) for line in lines]
    names = [one[1] for one in nodes if one]
    assert len(names) == len(found.nodes) == len(set(names))
    edges = [re.fullmatch(r"  (n\d+) --> (n\d+)", line) for line in lines]
    assert {(one[1], one[2]) for one in edges if one} <= {(a, b) for a in names for b in names}
    assert sum(one is not None for one in edges) == len(found.edges)
    assert {one[3] for one in nodes if one} == set(re.findall(r"classDef (\w+) stroke:", "\n".join(lines)))
    linked = replace(found, nodes=(replace(found.nodes[0], links={"run": 'http://mlflow/#/runs/a"; b'}),))
    assert '  click n0 href "http://mlflow/#/runs/a%22%3B%20b" _blank' in mermaid(replace(linked, edges=()))


def stored(tmp_path: Path) -> tuple[Grown, Path]:
    return Grown(ArtifactStore(DirectoryObjects(tmp_path))), tmp_path


def test_what_was_pruned_says_so(tmp_path: Path) -> None:
    grown, folder = stored(tmp_path)
    whole = lineage(grown)
    gone = [whole.of_kind("tuned")[0], whole.of_kind("update")[1], whole.of_kind("state")[0]]
    for node in gone:
        (folder / node.id).unlink()
    found = lineage(grown)
    notes = {node.id: node.notes for node in found.nodes if not node.stored and node.ref}
    assert notes.keys() == {node.id for node in gone}
    assert all("no longer in the store: pruned" in one for one in notes.values())
    assert len(found.of_kind("data")) == 2, "what a model was trained on went with it"
    text = page(found, measure(found, grown.store))
    checked_page(text)
    assert text.count("no longer in the store: pruned.") == 3
    assert 'class="node tuned gone"' in svg(found)


def test_an_update_without_its_bytes_is_in_the_graph_but_not_measured(tmp_path: Path) -> None:
    grown, folder = stored(tmp_path)
    update = grown.store.open(str(grown.entries[1].update))
    (folder / "blob" / update.manifest.tensors[0].blob).unlink()
    found = lineage(grown)
    measures = measure(found, grown.store)
    assert set(measures.missing) == {"similarity", "layers"}
    told: dict[str, Any] = as_json(found, measures)
    assert told["similarity"] is None and "is not in" in told["missing"]["similarity"]
    assert "Not measured" in page(found, measures)


def test_an_update_that_is_gone_leaves_the_rest(tmp_path: Path) -> None:
    grown, folder = stored(tmp_path)
    (folder / str(grown.entries[1].update)).unlink()
    found = lineage(grown)
    assert [len(found.of_kind(kind)) for kind in KINDS] == [1, 2, 2, 2, 3, 3, 3]
    checked_page(page(found, measure(found, grown.store)))


def test_labels_of_curves_do_not_cover_each_other() -> None:
    drawn = chart([Curve(f"c{n}", "average", [(1, 0.01 * n), (2, 0.01 * n)]) for n in range(5)], [(1, "a"), (2, "b")])
    places = sorted(one.label_y for one in drawn.curves)
    assert all(upper - lower >= 14.9 for lower, upper in pairwise(places))
    assert places[-1] <= drawn.bottom + 1
