"""Text embedding on a tiny BERT: the loss and the scores against formulas written down a second time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer, BertModel

from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput, Mismatch
from storage.objects import MemoryObjects
from storage.refs import CheckpointRef
from tasks.checkpoints import load_model
from tasks.data import Jsonl
from tasks.fine_tune import fine_tune
from tasks.ingest import Checkpoint, ingest
from tasks.suites import TextEmbedding
from tasks.tuners import Full
from tests.tasks.tiny_bert import save_bert
from tests.tasks.tiny_tokenizer import quiet

CAPITALS = {
    "france": "paris", "spain": "madrid", "italy": "rome", "norway": "oslo", "peru": "lima", "cuba": "havana",
    "egypt": "cairo", "kenya": "nairobi", "japan": "tokyo", "chile": "santiago", "poland": "warsaw", "greece": "athens",
}  # fmt: skip
QUESTIONS = (
    "capital of {}",
    "which city governs {}",
    "name the capital city of {}",
    "{} has which capital",
    "from which city is {} governed",
    "the capital of {} is",
    "the leaders of {} meet in",
    "first city of {}",
)
ROWS = [
    {"query": question.format(country), "positive": city}
    for country, city in CAPITALS.items()
    for question in QUESTIONS
]


@pytest.fixture(scope="module")
def store() -> ArtifactStore:
    return ArtifactStore(MemoryObjects())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"), [text for row in ROWS for text in row.values()], std=0.02)


@pytest.fixture(scope="module")
def bert(folder: Path, store: ArtifactStore) -> CheckpointRef:
    return ingest(Checkpoint(source=str(folder)), store)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> TextEmbedding:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return TextEmbedding(Jsonl(train=(str(path),), holdout=0.15), batch=7)


def test_loss_and_scores_equal_an_independent_computation(
    bert: CheckpointRef, folder: Path, suite: TextEmbedding, store: ArtifactStore
) -> None:
    reference, tokenizer = BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def unit(text: str) -> torch.Tensor:
        with torch.no_grad():
            return functional.normalize(
                reference(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0), dim=0
            )

    problem = suite.open(store.open(bert))
    backbone = load_model(store.open(bert))
    rows = [ROWS[0], ROWS[2], ROWS[9]]  # the first two share their answer
    found = problem.wrap(backbone)(**problem.collate(rows))
    answers = [ROWS[0]["positive"], ROWS[9]["positive"]]
    logits = torch.stack([torch.stack([20 * unit(row["query"]) @ unit(text) for text in answers]) for row in rows])
    torch.testing.assert_close(found["logits"], logits, rtol=1e-4, atol=1e-4)
    expected = functional.cross_entropy(logits, torch.tensor([0, 0, 1]))
    torch.testing.assert_close(found["loss"], expected, rtol=1e-4, atol=1e-4)

    test = list(suite.data.rows("test"))
    texts = sorted({row["positive"] for row in test})
    ranks = []
    for row in test:
        cosines = {text: float(unit(row["query"]) @ unit(text)) for text in texts}
        ranks.append(1 + sum(cosine > cosines[row["positive"]] for cosine in cosines.values()))
    accuracy, reciprocal = problem.score(backbone, "cpu", quiet)
    assert accuracy.value == sum(rank == 1 for rank in ranks) / len(ranks)
    assert reciprocal.value == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))
    assert accuracy.samples == len(test)


def test_it_learns_to_find_the_text(bert: CheckpointRef, suite: TextEmbedding, store: ArtifactStore) -> None:
    tuner = Full(steps=100, batch=16, learning_rate=2e-3, weights="all")
    tuned = fine_tune(bert, "capitals", suite, tuner, store)
    problem = suite.open(store.open(bert))
    before, after = (problem.score(load_model(store.open(ref)), "cpu", quiet)[0].value for ref in (bert, tuned))
    assert before < 0.4
    assert after > 0.7
    assert store.open(tuned).manifest.facts["cut"] == 0


def test_wrong_columns_and_empty_texts_are_refused(
    bert: CheckpointRef, suite: TextEmbedding, store: ArtifactStore, tmp_path: Path
) -> None:
    with pytest.raises(Mismatch, match="expected question, positive, found positive, query"):
        TextEmbedding(suite.data, query="question").open(store.open(bert)).rows("train")
    with pytest.raises(Mismatch, match="column 'positive' of the data: expected a text with words, found ' '"):
        suite.open(store.open(bert)).check([{"query": "x", "positive": " "}], "train")


def test_a_split_without_pairs_has_no_score(bert: CheckpointRef, suite: TextEmbedding, store: ArtifactStore) -> None:
    problem = suite.open(store.open(bert))
    with pytest.raises(InvalidInput, match="test split is empty"):
        problem.score(load_model(store.open(bert)), "cpu", quiet, limit=0)
