"""Text classification on a tiny BERT and short texts: heads, pooling, labels, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer, BertModel

from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput, Mismatch
from storage.objects import MemoryObjects
from storage.refs import CheckpointRef
from tasks.checkpoints import HISTORY, load_model
from tasks.data import Jsonl
from tasks.evaluate import evaluate, leading
from tasks.fine_tune import fine_tune
from tasks.ingest import Checkpoint, ingest
from tasks.suites import TextClassification
from tasks.suites.heads import ClassMeans, LabelText, Orthonormal
from tasks.tuners import Full, Lora
from tests.tasks.tiny_bert import save_bert
from tests.tasks.tiny_tokenizer import quiet

SUBJECTS = ("the soup", "our room", "this film", "the bread", "her song", "the trip", "that book", "the play")
GOOD = ("was lovely", "made us happy", "is a delight", "was worth every minute", "could not be better")
BAD = ("was awful", "made us angry", "is a bore", "was a waste of time", "could not be worse")
NAMES = ("bad", "good")
ROWS = [
    {"text": f"{subject} {words}", "label": NAMES[value], "number": value}
    for subject in SUBJECTS
    for value, phrases in enumerate((BAD, GOOD))
    for words in phrases
]
TEXTS = [*(str(row["text"]) for row in ROWS), *NAMES, "it is"]
TUNER = Full(steps=120, batch=16, learning_rate=3e-3, weights="all")


@pytest.fixture(scope="module")
def store() -> ArtifactStore:
    return ArtifactStore(MemoryObjects())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"), TEXTS)


@pytest.fixture(scope="module")
def bert(folder: Path, store: ArtifactStore) -> CheckpointRef:
    return ingest(Checkpoint(source=str(folder)), store)


def source(path: Path, rows: list[dict[str, Any]], **settings: Any) -> Jsonl:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Jsonl(train=(str(path),), **{"holdout": 0.2, **settings})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Jsonl:
    return source(tmp_path_factory.mktemp("texts") / "texts.jsonl", ROWS)


@pytest.fixture(scope="module")
def suite(data: Jsonl) -> TextClassification:
    return TextClassification(data, LabelText(template="it is {}"), labels=NAMES)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_logits_equal_an_independent_computation(
    bert: CheckpointRef, folder: Path, suite: TextClassification, store: ArtifactStore, pooling: str
) -> None:
    problem = replace(suite, pooling=pooling).open(store.open(bert))  # type: ignore[arg-type]
    rows = [ROWS[0], ROWS[13], ROWS[77]]  # of different lengths, so that there is padding
    found = problem.wrap(load_model(store.open(bert)))(**problem.collate(rows))
    reference, tokenizer = BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def feature(text: str) -> torch.Tensor:
        with torch.no_grad():
            hidden = reference(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return functional.normalize(hidden[0] if pooling == "cls" else hidden.mean(dim=0), dim=0)

    classes = torch.stack([feature(f"it is {name}") for name in NAMES])
    expected = torch.stack([20 * classes @ feature(str(row["text"])) for row in rows])
    torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-4)
    labels = torch.tensor([row["number"] for row in rows])
    torch.testing.assert_close(found["loss"], functional.cross_entropy(expected, labels), rtol=1e-4, atol=1e-4)


def test_the_head_is_the_bases_whichever_model_is_scored(
    bert: CheckpointRef, suite: TextClassification, store: ArtifactStore
) -> None:
    tuned = fine_tune(bert, "mood", suite, replace(TUNER, steps=10), store)
    of_base = suite.open(store.open(bert)).wrap(load_model(store.open(bert)))
    of_tuned = suite.open(store.open(bert)).wrap(load_model(store.open(tuned)))
    assert torch.equal(of_base.head.weight, of_tuned.head.weight)  # type: ignore[union-attr, arg-type]
    changed = [name for name in store.open(bert).names if "embed" in name]
    assert any(store.open(bert).record(n).blob != store.open(tuned).record(n).blob for n in changed)


class Mood:
    name = "mood"
    suite: TextClassification


@pytest.mark.parametrize(
    "head",
    [LabelText(), Orthonormal(classes=2), ClassMeans(classes=2)],
    ids=["label_text", "orthonormal", "class_means"],
)
@pytest.mark.parametrize("tuner", [TUNER, Lora(steps=60, batch=16, learning_rate=1e-2, rank=4)], ids=["full", "lora"])
def test_it_learns(bert: CheckpointRef, suite: TextClassification, store: ArtifactStore, head: Any, tuner: Any) -> None:
    Mood.suite = replace(suite, head=head)
    refs = [fine_tune(bert, "mood", Mood.suite, tuner, store) for _ in range(2)]
    assert refs[0] == refs[1]
    base, tuned = (leading(store.open(evaluate(ref, [Mood()], store, base=bert)))["mood"] for ref in (bert, refs[0]))
    assert base < 0.8
    assert tuned > 0.9
    facts = store.open(refs[0]).manifest.facts
    assert (facts["examples"], facts["cut"]) == (len(suite.data.rows("train")), 0)


def test_names_and_numbers_are_the_same_labels(
    bert: CheckpointRef, suite: TextClassification, store: ArtifactStore
) -> None:
    named, numbered = (replace(suite, label=label).open(store.open(bert)) for label in ("label", "number"))
    assert named.collate(ROWS)["labels"].tolist() == numbered.collate(ROWS)["labels"].tolist()


def test_pairs_of_texts(bert: CheckpointRef, store: ArtifactStore, tmp_path: Path) -> None:
    rows = [{"a": str(ROWS[0]["text"]), "b": str(ROWS[n]["text"]), "same": n % 2} for n in range(20)]
    suite = TextClassification(
        source(tmp_path / "p.jsonl", rows), Orthonormal(classes=2), text="a", pair="b", label="same"
    )
    batch = suite.open(store.open(bert)).collate(rows[:3])
    assert batch["token_type_ids"].max() == 1
    assert suite.open(store.open(bert)).score(load_model(store.open(bert)), "cpu", quiet)[0].samples > 0


def refused(
    suite: TextClassification, bert: CheckpointRef, store: ArtifactStore, message: str, kind: type = InvalidInput
) -> None:
    """Refused before a step is done, with nothing left in the store."""
    before = list(store.objects.list(""))

    def report(done: int, total: int, note: str) -> None:
        raise AssertionError("it has begun")

    with pytest.raises(kind, match=message):
        fine_tune(bert, "mood", suite, TUNER, store, report=report)
    assert list(store.objects.list("")) == before


def test_bad_input_is_refused_early(
    bert: CheckpointRef, suite: TextClassification, store: ArtifactStore, tmp_path: Path
) -> None:
    refused(replace(suite, text="txt"), bert, store, "expected txt, label, found label, number, text", Mismatch)
    unknown = [*ROWS, {"text": "meh", "label": "neutral", "number": 2}] * 3
    data = source(tmp_path / "u.jsonl", unknown, test=(suite.data.train[0],), holdout=0)  # type: ignore[union-attr]
    refused(
        replace(suite, data=data),
        bert,
        store,
        r"row 80: expected 0 to 1 or one of bad, good, found 'neutral'",
        Mismatch,
    )
    refused(replace(suite, data=data, label="number"), bert, store, "row 80: expected 0 to 1.*, found 2", Mismatch)
    numbers = replace(suite, data=data, labels=(), head=Orthonormal(classes=2))
    refused(numbers, bert, store, "expected 0 to 1, found 'bad'. List the classes in order", Mismatch)
    refused(replace(suite, labels=()), bert, store, "needs the names of two classes.*List them")
    refused(replace(suite, max_tokens=5, too_long="refuse"), bert, store, r"expected at most 5 tokens, found \d+")
    void = [{"text": " ", "label": "bad"}, *ROWS]
    data = source(tmp_path / "v.jsonl", void, test=(suite.data.train[0],), holdout=0)  # type: ignore[union-attr]
    refused(replace(suite, data=data), bert, store, "a text without words")


def test_bases_that_cannot_do_it_are_refused(suite: TextClassification, tmp_path: Path) -> None:
    store = ArtifactStore(MemoryObjects())
    bare = ingest(Checkpoint(source=str(save_bert(tmp_path / "a", TEXTS, pad=False))), store)
    refused(suite, bare, store, "no padding token")
    small = ingest(Checkpoint(source=str(save_bert(tmp_path / "b", TEXTS, words=20))), store)
    refused(suite, small, store, "expected at most 20, its embeddings", Mismatch)


def test_long_texts_are_cut_to_what_the_base_reads(suite: TextClassification, tmp_path: Path) -> None:
    store = ArtifactStore(MemoryObjects())
    short = ingest(Checkpoint(source=str(save_bert(tmp_path / "a", TEXTS, positions=6))), store)
    problem = suite.open(store.open(short))
    assert problem.check(ROWS, "train")["cut"] == sum(len(str(row["text"]).split()) > 4 for row in ROWS) > 0
    assert problem.collate(ROWS)["input_ids"].shape[1] == 6
    problem.score(load_model(store.open(short)), "cpu", quiet)


def test_accumulated_batches_are_averaged(bert: CheckpointRef, suite: TextClassification, store: ArtifactStore) -> None:
    """The Trainer takes a module with free arguments for one that divides its loss itself."""
    losses = []
    for batch, accumulate in ((16, 1), (4, 4)):
        tuner = Full(steps=3, batch=batch, accumulate=accumulate, learning_rate=1e-3)
        history = json.loads(store.open(fine_tune(bert, "subject", suite, tuner, store)).asset(HISTORY))
        losses.append([point["loss"] for point in history])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)  # dropout is drawn otherwise
