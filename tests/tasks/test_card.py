"""Model cards: what the hub's own reader finds in them, and that no name that people wrote can break one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.index import indexed
from storage.lines import Line
from storage.manifest import Lineage
from storage.refs import CheckpointRef, StateRef, UpdateRef
from storage.roots import read_journals
from storage.tables import write_rows
from tasks.card import Known, card_of_model, card_of_update
from tasks.evaluate import OUTCOMES, TABLE, ScoreRow
from tasks.export import export
from tasks.ingest import Checkpoint, ingest
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.mergers import TaskArithmetic
from tasks.recipe import Recipe
from tests.builders import ingested, tiny_model, update_of

HOSTILE = 'a|b --- license: mit <script>alert(1)</script> [x](y) `z` "q": {w}'


class Place:
    """A line of two updates of a tiny base, and its written model."""

    def __init__(self, folder: Path, tasks: tuple[str, str] = ("sums", "words")) -> None:
        self.folder = folder
        self.store = ArtifactStore(DirectoryObjects(folder / "store"))
        self.base: CheckpointRef = ingested(tiny_model("LlamaForCausalLM"), folder / "base", self.store)
        self.recipe = Recipe(TaskArithmetic(scale=0.5))
        self.line = Line(self.store.objects, "support")
        self.line.open(self.base, self.recipe.spec())
        self.updates: list[UpdateRef] = []
        state: StateRef | None = None
        for seed, task in enumerate(tasks, 1):
            self.updates.append(self.update(seed))
            state = fold_update(self.base, state, self.updates[-1], self.recipe, self.store, weight=float(seed))
            self.line.fold(self.line.head(), task, self.updates[-1], state, float(seed))
        assert state is not None
        self.model = materialize(self.base, state, self.store)

    def update(self, seed: int) -> UpdateRef:
        torch.manual_seed(seed)
        base = self.store.open(self.base)
        deltas = {one.name: 0.01 * torch.randn(one.shape) for one in base.manifest.tensors}
        return update_of(deltas, self.base, self.store)

    def scored(self, model: CheckpointRef, rows: list[ScoreRow], suites: dict[str, Any]) -> None:
        draft = self.store.draft("scores", Lineage("evaluate", {"model": model}, {"tasks": suites}))
        draft.add_asset(TABLE, write_rows([row.__dict__ for row in rows]))
        draft.add_asset(
            OUTCOMES, write_rows([{"task": row.task, "metric": row.metric, "outcome": 1.0} for row in rows])
        )
        draft.commit()

    def known(self, base_model: str | None = None) -> Known:
        rows = indexed(self.store, self.folder / "index.jsonl").rows
        return Known(rows, read_journals(self.store.objects).lines, base_model)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def suite(name: str, data: str) -> dict[str, Any]:
    return {"suite": {"name": name, "data": {"name": data}}, "data": "0" * 64}


def test_the_hub_reads_what_was_merged_and_what_it_reaches(place: Place) -> None:
    rows = [
        ScoreRow("sums", "token_accuracy", 0.75, 40, 0.6, 0.86),
        ScoreRow("words", "token_accuracy", 0.5, 30, 0.3, 0.7),
        ScoreRow("words", "perplexity", 3.25, 30),
    ]
    suites = {"sums": suite("causal_lm", "jsonl"), "words": suite("multiple_choice", "parquet")}
    place.scored(place.model, rows, suites)
    place.scored(place.base, [ScoreRow("sums", "token_accuracy", 0.1, 40)], {"sums": suite("causal_lm", "jsonl")})
    card = ModelCard(card_of_model(place.model, place.store, place.known("meta/base-1b")))
    data = card.data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("meta/base-1b", "merge", "transformers")
    assert data.tags == ["deltaworks", "merge", "task_arithmetic"]
    found = [(one.dataset_name, one.task_type, one.metric_type, one.metric_value) for one in data.eval_results]
    assert found == [
        ("sums", "text-generation", "token_accuracy", 0.75),
        ("words", "multiple-choice", "token_accuracy", 0.5),
        ("words", "multiple-choice", "perplexity", 3.25),
    ]
    text = card.text
    assert "2 updates of one base, merged by `task_arithmetic` (scale 0.5)." in text
    assert f"| 2 | words | 2 | `{place.updates[1][:19]}` | dense@1 |" in text
    assert "| sums | token_accuracy | 0.7500 | 0.6000 to 0.8600 | 40 |" in text
    assert "| words | perplexity | 3.2500 |  | 30 |" in text
    assert f"- model: `{place.model}`" in text and f"- base: `{place.base}`" in text
    assert "deltaworks line rollback support --entry 1 --why" in text


def test_an_exported_card_is_no_part_of_the_checkpoint(place: Place, tmp_path: Path) -> None:
    card = card_of_model(place.model, place.store, place.known())
    export(place.model, tmp_path / "out", place.store, card=card)
    assert (tmp_path / "out" / "README.md").read_text() == card
    again = ingest(Checkpoint(source=str(tmp_path / "out")), place.store)
    (tmp_path / "out" / "README.md").unlink()
    assert ingest(Checkpoint(source=str(tmp_path / "out")), place.store) == again


def test_without_a_name_on_the_hub_none_is_made_up(place: Place) -> None:
    data = ModelCard(card_of_model(place.model, place.store, place.known())).data
    assert data.base_model is None
    assert "base_model_relation" not in data.to_dict()
    assert "None are stored." in card_of_model(place.base, place.store, place.known())


def test_names_that_people_wrote_stay_text(tmp_path: Path) -> None:
    place = Place(tmp_path, ("sums", HOSTILE))
    place.scored(place.model, [ScoreRow(HOSTILE, HOSTILE, 0.5, 1, 0.1, 0.9)], {HOSTILE: suite("causal_lm", HOSTILE)})
    card = ModelCard(card_of_model(place.model, place.store, place.known()))
    assert (card.data.license, card.data.tags) == (None, ["deltaworks", "merge", "task_arithmetic"])
    assert card.data.eval_results[0].dataset_name == HOSTILE
    assert "<script>" not in card.text
    tables = [line for line in card.text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in tables} == {6}


@pytest.mark.parametrize(
    ("form", "library", "relation"),
    [("checkpoint", "transformers", "finetune"), ("lora", "peft", "adapter"), ("delta", "transformers", "finetune")],
)
def test_of_an_update(place: Place, form: str, library: str, relation: str) -> None:
    update = place.updates[0]
    card = ModelCard(card_of_update(update, place.base, place.store, place.known("meta/base-1b"), form))
    assert (card.data.library_name, card.data.base_model_relation) == (library, relation)
    assert f"- update: `{update}`" in card.text and "Stored as dense@1." in card.text


def test_a_model_of_no_line_says_what_it_is(place: Place) -> None:
    alone = fold_update(place.base, None, place.updates[1], place.recipe, place.store)
    model = materialize(place.base, alone, place.store)
    card = ModelCard(card_of_model(model, place.store, place.known()))
    assert "A checkpoint from a Deltaworks store." in card.text
    assert card.data.tags == ["deltaworks"]
