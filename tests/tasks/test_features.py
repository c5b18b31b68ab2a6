"""The encoder runs once for the heads of several suites over the same rows, and no score is another for that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import BertModel, ViTModel

from storage.artifacts import ArtifactStore
from storage.measured import Measured
from storage.objects import MemoryObjects
from storage.refs import CheckpointRef
from tasks.data import Digits, Jsonl
from tasks.digits_base import DigitsBase, train_digits_base
from tasks.evaluate import evaluate, outcomes_of, read_scores
from tasks.ingest import Checkpoint, ingest
from tasks.suites import AnySuite, ImageClassification, TextClassification, TextEmbedding
from tasks.suites.features import Features
from tasks.suites.heads import ClassMeans, Orthonormal
from tests.tasks.tiny_bert import save_bert


@dataclass(frozen=True)
class Task:
    name: str
    suite: AnySuite


def store() -> ArtifactStore:
    return ArtifactStore(MemoryObjects())


@contextmanager
def passes(kind: type[nn.Module]) -> Iterator[list[int]]:
    """The rows of every forward pass of an encoder."""
    seen: list[int] = []

    def note(module: nn.Module, given: Any) -> None:
        if isinstance(module, kind):
            seen.append(1)

    hook = register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def vit() -> tuple[CheckpointRef, ArtifactStore]:
    place = store()
    return train_digits_base(DigitsBase(width=16, steps=20), place), place


def copy(place: ArtifactStore) -> ArtifactStore:
    """The artifacts, and nothing that was measured of them."""
    new = store()
    for key in place.objects.list(""):
        if not key.startswith(("measured/", "scores/")):
            new.objects.put(key, place.objects.get(key))
    return new


def test_two_heads_over_the_same_rows_take_one_pass(vit: tuple[CheckpointRef, ArtifactStore]) -> None:
    model, place = vit
    data = Digits(view="rot90", limit=100)
    suites = [ImageClassification(data, Orthonormal(index=index), batch=32) for index in range(3)]
    tasks = [Task(f"head {number}", suite) for number, suite in enumerate(suites)]
    with passes(ViTModel) as seen:
        together = copy(place)
        found = together.open(evaluate(model, tasks, together))
    assert len(seen) == 4, "a hundred rows in batches of 32"
    for task in tasks:
        alone = copy(place)
        one = alone.open(evaluate(model, [task], alone))
        assert read_scores(one) == [row for row in read_scores(found) if row.task == task.name]
        assert outcomes_of(one)[task.name] == outcomes_of(found)[task.name]
    assert len({row.value for row in read_scores(found) if row.metric == "accuracy"}) > 1, "the heads differ"


def test_what_an_encoder_sees_otherwise_is_seen_again(vit: tuple[CheckpointRef, ArtifactStore]) -> None:
    model, place = vit
    first = ImageClassification(Digits(view="rot90", limit=40), Orthonormal(), batch=40)
    others: list[ImageClassification] = [
        replace(first, data=Digits(view="rot180", limit=40)),
        replace(first, data=Digits(view="rot90", limit=40, seed=1)),
        replace(first, data=Digits(view="rot90", limit=30)),
        replace(first, batch=20),
    ]
    for other in others:
        with passes(ViTModel) as seen:
            evaluate(model, [Task("a", first), Task("b", other)], copy(place))
        assert len(seen) == 1 + 40 // other.batch


def test_means_of_classes_are_of_features_that_are_made_once(vit: tuple[CheckpointRef, ArtifactStore]) -> None:
    model, place = vit
    first = ImageClassification(Digits(limit=60), ClassMeans(), batch=60)
    with passes(ViTModel) as seen:
        evaluate(model, [Task("a", first), Task("b", replace(first, head=ClassMeans(scale=3.0)))], copy(place))
    assert len(seen) == 2, "the rows to train on, and those to test on"


def test_means_of_classes_are_made_once_of_a_base(vit: tuple[CheckpointRef, ArtifactStore]) -> None:
    """Another model is asked with those that were made for the first, bit by bit, and damaged ones are made again."""
    base, place = vit[0], copy(vit[1])
    other = train_digits_base(DigitsBase(width=16, steps=2, seed=1), place)
    task = Task("a", ImageClassification(Digits(limit=60), ClassMeans(), batch=60))
    fresh = copy(place)
    wanted = evaluate(other, [task], fresh, base=base)
    evaluate(base, [task], place)
    with passes(ViTModel) as seen:
        assert evaluate(other, [task], place, base=base) == wanted
    assert len(seen) == 1, "the rows to test on"
    kept = Measured(fresh.objects)
    keys = [key for key in fresh.objects.list("measured/") if key.split("/")[1] == base.partition("/")[2]]
    (key,) = (key.rpartition("/")[2] for key in keys)
    for entry in (None, {"means": [[1.0]]}, {"means": "x"}, {"means": [[float("nan")] * 16] * 10}):
        kept.write(base, key, entry)
        for one in list(fresh.objects.list("measured/")):
            if one not in keys:
                fresh.objects.delete(one)
        assert evaluate(other, [task], fresh, base=base) == wanted


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Jsonl, CheckpointRef, ArtifactStore]:
    """Forty rows of two texts of many lengths, under two labels."""
    folder, words = tmp_path_factory.mktemp("texts"), [f"w{number}" for number in range(20)]
    generator = torch.Generator().manual_seed(0)

    def drawn(most: int) -> str:
        length = int(torch.randint(1, most, (), generator=generator))
        return " ".join(words[at] for at in torch.randint(20, (length,), generator=generator))

    rows = [{"text": drawn(12), "other": drawn(5), "label": at % 3, "second": at % 2} for at in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    place = store()
    bert = ingest(Checkpoint(source=str(save_bert(folder / "bert", words))), place)
    file = (str(folder / "rows.jsonl"),)
    return Jsonl(train=file, test=file), bert, place


def test_texts_are_read_once_for_all_that_ask_about_them(
    texts: tuple[Jsonl, CheckpointRef, ArtifactStore],
) -> None:
    data, model, place = texts
    moods = TextClassification(data, Orthonormal(classes=3), batch=16)
    tasks = [
        Task("three", moods),
        Task("two", replace(moods, head=Orthonormal(classes=2), label="second")),
        Task("search", TextEmbedding(data, query="text", positive="other", batch=16)),
    ]
    with passes(BertModel) as seen:
        together = copy(place)
        found = together.open(evaluate(model, tasks, together))
    other = -(-len({row["other"] for row in data.rows("test")}) // 16)
    assert len(seen) == 3 + other, "each text once, in batches of 16"
    for task in tasks:
        alone = copy(place)
        one = alone.open(evaluate(model, [task], alone))
        assert read_scores(one) == [row for row in read_scores(found) if row.task == task.name]


def test_means_of_classes_of_texts_are_made_once_of_a_base(
    texts: tuple[Jsonl, CheckpointRef, ArtifactStore],
) -> None:
    data, model, whole = texts
    place = copy(whole)
    moods = TextClassification(data, ClassMeans(classes=3), batch=20)
    evaluate(model, [Task("a", moods)], place)
    for change, rows in (({"head": ClassMeans(classes=3, scale=2.0)}, 2), ({"pooling": "cls"}, 4)):
        task, fresh = Task("a", replace(moods, **change)), copy(whole)
        with passes(BertModel) as seen:
            assert evaluate(model, [task], place) == evaluate(model, [task], fresh)
        assert len(seen) == rows + 4, (
            "rows to test on, and to train on where they are seen otherwise; and all of it anew"
        )


@pytest.mark.parametrize(
    "change",
    [
        {"text": "other"},
        {"pair": "other"},
        {"pooling": "cls"},
        {"max_tokens": 6},
        {"batch": 15},
    ],
)
def test_texts_that_are_read_otherwise_are_read_again(
    texts: tuple[Jsonl, CheckpointRef, ArtifactStore], change: dict[str, Any]
) -> None:
    data, model, place = texts
    moods = TextClassification(data, Orthonormal(classes=3), batch=20)
    other = replace(moods, **change)
    with passes(BertModel) as seen:
        evaluate(model, [Task("a", moods), Task("b", other)], copy(place))
    assert len(seen) == 2 + -(-40 // other.batch)


def made(value: float, counted: list[float], rows: int = 4) -> Iterator[Tensor]:
    for number in range(2):
        counted.append(value)
        yield torch.full((rows, 3, 8), value + number)[:, 0]


def test_numbers_and_layout_come_back() -> None:
    features, counted = Features(1000), list[float]()
    first = list(features.of({"a": 1}, made(0.5, counted)))
    again = list(features.of({"a": 1}, made(9.0, counted)))
    assert counted == [0.5, 0.5]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride() != (8, 1)
    again[0].zero_()
    assert torch.equal(next(features.of({"a": 1}, made(9.0, counted))), first[0]), "nobody writes into what is kept"


def test_memory_is_bounded() -> None:
    """Two batches of 4 rows of 8 float32 are 256 bytes."""
    features, counted = Features(600), list[float]()
    for value in (1.0, 2.0, 3.0):
        list(features.of({"value": value}, made(value, counted)))
    counted.clear()
    for value in (3.0, 2.0):
        list(features.of({"value": value}, made(value, counted)))
    assert not counted
    list(features.of({"value": 1.0}, made(1.0, counted)))
    assert counted == [1.0, 1.0], "the oldest made room"

    counted.clear()
    for _ in range(2):
        list(features.of({"value": "large"}, made(4.0, counted, rows=10)))
        list(Features().of({"value": 5.0}, made(5.0, counted)))
    assert counted == [4.0, 4.0, 5.0, 5.0] * 2, "what does not fit is not kept, nor anything without room"
    assert sum(one.nbytes for lot in features._kept.values() for one, _ in lot) <= 600


def test_what_was_not_read_to_its_end_is_not_kept() -> None:
    features, counted = Features(1000), list[float]()
    next(features.of({"a": 1}, made(1.0, counted)))
    assert len(list(features.of({"a": 1}, made(2.0, counted)))) == 2
    assert counted == [1.0, 2.0, 2.0]
