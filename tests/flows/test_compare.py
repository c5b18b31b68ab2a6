"""The comparison: its numbers are those of the rooms that it calls, and a second run only looks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner, Result

from configs.chain import Ability, load_chain
from configs.grid import grid_of
from flows import progress
from flows.cli import app
from flows.compare import compare, count_steps, leaderboard
from flows.compare_report import draw, table
from flows.workplace import here
from storage.errors import InvalidInput
from tasks.codecs import Exact
from tasks.compress import compress_update
from tasks.data import Digits
from tasks.evaluate import evaluate, leading, summarise
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.mergers import TaskArithmetic
from tasks.recipe import Recipe
from tasks.suites import ImageClassification
from tasks.suites.heads import ClassMeans
from tests.flows.test_chain import Count, printed

pytestmark = pytest.mark.usefixtures("prefect_server", "home")


def small() -> list[str]:
    return ["compare", "smoke", "--mergers", "task_arithmetic scale=0.5,average", "--codecs", "exact", "--orders", "2"]


def typed(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments])


def test_cells_are_what_the_rooms_say(tmp_path: Path) -> None:
    found = typed(*small(), "--to", str(tmp_path), "--json")
    assert found.exit_code == 0, found.output
    places = json.loads(found.stdout)
    assert [(one["merger"], one["codec"], one["runs"]) for one in places] == [
        (name, "exact", 2) for name in [one["merger"] for one in places]
    ]
    assert places == sorted(places, key=lambda one: -one["average"])
    rows = pyarrow.parquet.read_table(tmp_path / "smoke-compare.parquet").to_pylist()
    assert (tmp_path / "smoke-compare.png").stat().st_size > 10_000

    # the second order, written down again from the store's own verbs
    store, config = here().store, load_chain("smoke")
    row = next(one for one in rows if one["merger"] == "task_arithmetic scale=0.5" and one["order"] != rows[0]["order"])
    order = row["order"].split()
    assert sorted(order) == ["invert", "permute", "rot90"] != order
    base = store.open(row["model"]).manifest.lineage.inputs["base"]
    made = {
        store.open(ref).manifest.lineage.inputs["tuned"]: ref
        for ref in store.refs("update")
        if store.open(ref).manifest.lineage.step == "extract"
    }
    exact = {
        str(store.open(tuned).manifest.lineage.spec["task"]): compress_update(ref, Exact(), store)
        for tuned, ref in made.items()
    }
    state, matrix, models, tasks = None, [], [], {task.name: task for task in config.tasks}
    for number, name in enumerate(order, 1):
        state = fold_update(base, state, exact[name], Recipe(TaskArithmetic(scale=0.5)), store)
        model = materialize(base, state, store)
        models.append(model)
        scores = evaluate(model, [tasks[one] for one in order[:number]], store, base=base)
        matrix.append(leading(store.open(scores)))
    ahead = {
        name: leading(store.open(evaluate(before, [tasks[name]], store, base=base)))[name]
        for before, name in zip(models, order[1:], strict=False)
    }
    unmet = leading(store.open(evaluate(base, list(tasks.values()), store, base=base)))
    expected = summarise(matrix, {}, ahead, unmet)
    assert row["model"] == model
    assert row["forward_transfer"] == pytest.approx(expected.forward_transfer)
    assert (row["average"], row["worst"], row["forgetting"]) == (
        expected.average,
        expected.worst,
        expected.forgetting,
    )

    client = MlflowClient(here().settings.tracking)
    experiment = client.get_experiment_by_name("smoke-compare")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == len(rows) == 4
    (run,) = [one for one in runs if one.data.tags["ref"] == model]
    assert run.data.params["merger.scale"] == "0.5"
    assert (run.data.params["order"], run.data.params["seed"]) == (row["order"], "0")
    assert run.data.metrics["average"] == pytest.approx(expected.average)
    assert run.data.metrics["forward_transfer"] == pytest.approx(expected.forward_transfer)

    watcher = Count()
    progress.watch(watcher)
    grid = grid_of(config, ["task_arithmetic scale=0.5", "average"], ["exact"], 2, 1)
    again = compare(grid)
    assert not watcher.labels, "everything is found done"
    assert [one.__dict__ for one in leaderboard(again)] == places
    assert typed(*small(), "--quiet").exit_code == 0
    assert len(client.search_runs([experiment.experiment_id])) == 4


def test_the_steps_are_counted_and_seeds_are_other_trainings(tmp_path: Path) -> None:
    config = load_chain("smoke")
    watcher = Count()
    progress.watch(watcher)
    upright = Ability("upright", ImageClassification(Digits(limit=50), ClassMeans()))
    grid = grid_of(replace(config, retained=(upright,)), ["average"], [], 1, 2)
    found = compare(grid)
    assert len(watcher.labels) == count_steps(grid)
    place = leaderboard(found)[0]
    assert place.tradeoff == pytest.approx(sum((one.summary.tradeoff or 0) for one in found) / 2) != 0
    assert draw([place], tmp_path / "board.png").stat().st_size > 10_000
    shown = printed(table([place]))
    assert "trade-off" in shown and f"{100 * (place.tradeoff or 0):.1f}" in shown
    assert [one.seed for one in found] == [0, 1]
    assert found[0].model != found[1].model


def test_orders_are_drawn_always_the_same_and_all_differ() -> None:
    config = load_chain("smoke")
    orders = grid_of(config, [], [], 4, 1).orders
    assert orders[0] == (0, 1, 2)
    assert len(set(orders)) == 4
    assert orders == grid_of(config, [], [], 4, 1).orders
    assert len(grid_of(config, [], [], 100, 1).orders) == 6, "three tasks have no more"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mergers", "opmc"), "there is no 'opmc'"),
        (("--mergers", "opcm alpha=2"), "alpha must be in [0, 1)"),
        (("--codecs", "ternary density=0"), "density"),
        (("--mergers", "slerp"), "merger 'slerp' merges 2 updates, and the chain has 3"),
    ],
)
def test_what_cannot_be_compared_is_said_at_once(words: tuple[str, str], message: str) -> None:
    found = typed("compare", "smoke", *words)
    assert found.exit_code == 1
    assert message in " ".join(found.output.split())


def test_chains_whose_updates_depend_on_merging_are_refused() -> None:
    config = load_chain("smoke")
    with pytest.raises(InvalidInput, match="trains from the head of its line"):
        grid_of(replace(config, start="head", lines=config.lines[:1]), [], [], 1, 1)
