"""The report of mergeability: its numbers are those of the rooms that it calls, and it can be begun again."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml

from configs.study import StudyConfig, chosen, dump_study, load_study, studies
from flows.study import Cell, Merged
from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput
from storage.objects import MemoryObjects
from tasks.compress import compress_update
from tasks.digits_base import DigitsBase, train_digits_base
from tasks.evaluate import Summary, evaluate, leading
from tasks.extract import extract_update
from tasks.fine_tune import fine_tune
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.recipe import Recipe
from tests.flows.test_cli import COMMAND


def task(view: str, head: dict[str, Any]) -> dict[str, Any]:
    data = {"name": "digits", "view": view, "limit": 100}
    return {"name": view, "suite": {"name": "image_classification", "data": data, "head": head}}


STUDY: dict[str, Any] = {
    "name": "small",
    "base": {"name": "digits_base", "width": 32, "steps": 60},
    "seeds": [0],
    "tuners": {
        "all": {"name": "full", "weights": "all", "steps": 12, "learning_rate": 1e-3},
        "adapter": {"name": "lora", "rank": 4, "steps": 12, "learning_rate": 2e-3},
    },
    "mergers": {"opcm": {"name": "opcm"}, "average": {"name": "average"}},
    "retained": [task("id", {"name": "class_means"})],
    "tasks": [task(view, {"name": "orthonormal", "index": n}) for n, view in enumerate(("rot90", "invert"))],
}


def report(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DELTAWORKS_HOME": str(home)}
    command = [*COMMAND, "report", "mergeability", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def test_the_report(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(STUDY))
    found = report(tmp_path / "home", str(file), "--to", str(tmp_path / "out"), "--json")
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    rows = {row["tuner"]: row for row in told["tuners"]}
    config = load_study(file)
    by_hand = expected(config, "all", 0)
    assert (rows["all"]["alone"], rows["all"]["bytes"]) == pytest.approx((by_hand["alone"], by_hand["bytes"]))
    for name in ("average", "forgetting", "retained"):
        assert rows["all"]["cells"]["opcm"][name] == pytest.approx(by_hand[name]), name
    assert rows["all"]["seconds"] > 0
    assert pyarrow.parquet.read_table(tmp_path / "out" / "small.parquet").num_rows == 4
    assert (tmp_path / "out" / "small.png").stat().st_size > 10_000
    page = (tmp_path / "out" / "small.md").read_text()
    again = report(tmp_path / "home", str(file), "--to", str(tmp_path / "out"), "--seeds", "1")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out" / "small.md").read_text() == page  # times too: nothing was trained again
    for word in ("all", "adapter", "opcm", "forgotten", "kept", "train s", "seed 0"):
        assert word in again.stdout


def expected(config: StudyConfig, tuner: str, seed: int) -> dict[str, float]:
    """One tuner with OPCM, by hand."""
    store = ArtifactStore(MemoryObjects())
    spec = config.base_of(seed)
    assert isinstance(spec, DigitsBase)
    base = train_digits_base(spec, store)
    state, alone, rows, size = None, [], [], 0
    for number, task in enumerate(config.tasks, 1):
        tuned = fine_tune(base, task.name, task.suite, config.tuner_of(tuner, seed), store)
        update = compress_update(extract_update(base, tuned, config.extract, store), config.codec, store)
        size += store.open(update).manifest.tensor_bytes
        alone.append(scores(tuned, [task], base, store)[task.name])
        state = fold_update(base, state, update, Recipe(config.mergers["opcm"]), store)
        model = materialize(base, state, store)
        rows.append(scores(model, config.tasks[:number], base, store))
    before, after = (scores(ref, config.retained, base, store)["id"] for ref in (base, model))
    return {
        "alone": sum(alone) / 2,
        "average": sum(rows[1].values()) / 2,
        "forgetting": rows[0]["rot90"] - rows[1]["rot90"],
        "retained": after / before,
        "bytes": size,
    }


def scores(ref: Any, tasks: Any, base: Any, store: ArtifactStore) -> dict[str, float]:
    return leading(store.open(evaluate(ref, tasks, store, base=base)))


def test_means_over_seeds() -> None:
    def run(seed: int, share: float) -> Merged:
        return Merged("full", "opcm", seed, Summary(share, share / 2, None, 0.1, 1.0), None)

    cell = Cell.of([run(0, 0.5), run(1, 0.7)])
    assert (cell.average, cell.worst) == pytest.approx((0.6, 0.3))
    assert cell.spread == pytest.approx(0.2 / 2**0.5)
    assert (Cell.of([run(0, 0.5)]).spread, cell.retained) == (None, None)


def test_studies_are_complete_and_survive_a_round_trip(tmp_path: Path) -> None:
    for name in studies():
        config = load_study(name)
        again = tmp_path / f"{name}.yaml"
        again.write_text(yaml.safe_dump(dump_study(config)))
        assert load_study(again) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tuners": {}}, "tuners is empty"),
        ({"seeds": []}, "seeds is empty"),
        ({"tuners": {"x": {"name": "fulll"}}}, "did you mean full"),
        ({"mergers": {"x": {"name": "opcm", "alfa": 1}}}, "did you mean alpha"),
        ({"retained": STUDY["tasks"][:1]}, "'rot90' is used twice"),
        ({"colour": "red"}, "no such field"),
    ],
)
def test_wrong_studies_are_explained(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump({**STUDY, **change}))
    with pytest.raises(InvalidInput, match=words):
        load_study(file)


def test_a_task_that_says_how_it_is_trained_and_a_tuner_that_is_not_there(tmp_path: Path) -> None:
    first, *others = STUDY["tasks"]
    values = {**STUDY, "tasks": [{**first, "tuner": {"name": "full"}}, *others]}
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(InvalidInput, match="'rot90' says how it is trained"):
        load_study(file)
    with pytest.raises(InvalidInput, match="no tuner 'lora'") as caught:
        chosen(load_study("mergeability"), ["lora"])
    assert "'LoRA r8'" in str(caught.value)
    with pytest.raises(InvalidInput, match="there is no file 'mergability'") as caught:
        load_study("mergability")
    assert "Did you mean mergeability?" in str(caught.value)
