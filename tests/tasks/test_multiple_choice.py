"""Multiple choice and the harness's tasks, on a tiny random Llama: ours says what lm-evaluation-harness says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from configs.chain import parse_chain
from configs.exam import load_exam
from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput, Mismatch
from storage.objects import MemoryObjects
from storage.refs import CheckpointRef
from tasks.checkpoints import load_model
from tasks.data import Jsonl
from tasks.evaluate import evaluate, outcomes_of, read_scores
from tasks.fine_tune import fine_tune
from tasks.ingest import Checkpoint, ingest
from tasks.suites import LmEval, MultipleChoice
from tasks.suites.answers import IGNORED
from tasks.suites.base import Score
from tasks.tuners import Full
from tests.tasks.tiny_tokenizer import BOS, IDS, ids, quiet, save_tokenizer

DATA = {"name": "jsonl", "train": ["a.jsonl"], "test": ["a.jsonl"]}
QUESTIONS = [
    {"question": f"{i} plus {j} is", "choices": [str(i + j), f"a {(i * j) % 20}", "cat dog"], "answer": (i + j) % 3}
    for i in range(6)
    for j in range(6)
]
TASK = {
    "task": "tiny_sums",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions as JSON lines, and the same as tasks of the harness."""
    found = tmp_path_factory.mktemp("questions")
    lines = write_lines(found / "test.jsonl", QUESTIONS)
    (found / "tasks").mkdir()
    whole = {**TASK, "dataset_kwargs": {"data_files": {"test": str(lines)}}}
    (found / "tasks" / "sums.yaml").write_text(yaml.safe_dump(whole))
    worse: dict[str, Any] = {**whole, "task": "tiny_loss", "output_type": "loglikelihood_rolling", "doc_to_text": ""}
    worse |= {"doc_to_target": "{{question}}", "metric_list": [{"metric": "word_perplexity"}]}
    del worse["doc_to_choice"]
    (found / "tasks" / "loss.yaml").write_text(yaml.safe_dump(worse))
    gone = {**whole, "task": "tiny_gone", "dataset_kwargs": {"data_files": {"test": str(found / "gone.jsonl")}}}
    (found / "tasks" / "gone.yaml").write_text(yaml.safe_dump(gone))
    return found


@pytest.fixture(scope="module")
def store() -> ArtifactStore:
    return ArtifactStore(MemoryObjects())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, store: ArtifactStore) -> CheckpointRef:
    place = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(IDS), max_position_embeddings=64, initializer_range=0.2, **sizes)
    LlamaForCausalLM(config).save_pretrained(place)
    save_tokenizer(place)
    return ingest(Checkpoint(source=str(place)), store)


def questions(folder: Path, **more: Any) -> MultipleChoice:
    lines = (str(folder / "test.jsonl"),)
    return MultipleChoice(Jsonl(train=lines, test=lines), **more)


def scored(suite: MultipleChoice | LmEval, model: CheckpointRef, store: ArtifactStore, **more: Any) -> list[Score]:
    artifact = store.open(model)
    return suite.open(artifact).score(load_model(artifact, "cpu"), "cpu", quiet, **more)


def test_it_says_what_the_harness_says(llama: CheckpointRef, store: ArtifactStore, folder: Path) -> None:
    ours = scored(questions(folder), llama, store)
    theirs = scored(LmEval("tiny_sums", include=str(folder / "tasks")), llama, store)
    assert [one.metric for one in ours] == ["accuracy", "accuracy_normalised"]
    assert [one.metric for one in theirs] == ["acc", "acc_norm"]
    assert 0.1 < ours[0].value < 0.9
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.outcomes == other.outcomes
        assert (mine.value, mine.samples, mine.low, mine.high) == (other.value, other.samples, other.low, other.high)


def test_likelihoods_are_those_of_the_tokens_after_the_prompt(
    llama: CheckpointRef, store: ArtifactStore, folder: Path
) -> None:
    """Written down a second time, a choice at a time, without padding; in several batches it is the same."""
    artifact = store.open(llama)
    model = load_model(artifact, "cpu").eval()
    expected = []
    for row in QUESTIONS:
        likely = []
        for choice in row["choices"]:
            tokens = torch.tensor([[BOS, *ids(row["question"]), *ids(choice)]])
            with torch.no_grad():
                steps = model(tokens).logits[0, :-1].log_softmax(-1)
            count = len(ids(choice))
            likely.append(float(steps[-count:].gather(1, tokens[0, -count:].unsqueeze(1)).sum()))
        expected.append(float(likely.index(max(likely)) == row["answer"]))
    for batch in (1, 2, 16):
        (accuracy, _) = scored(questions(folder, batch=batch), llama, store)
        assert list(accuracy.outcomes) == expected
    assert scored(questions(folder), llama, store, limit=7)[0].samples == 7


def test_training_learns_the_right_choices(llama: CheckpointRef, store: ArtifactStore, folder: Path) -> None:
    suite = questions(folder)
    problem = suite.open(store.open(llama))
    batch = problem.collate([QUESTIONS[0], QUESTIONS[1]])
    no = IGNORED
    assert batch["labels"].tolist() == [[no] * 5 + [*ids("0"), no], [no] * 5 + ids("a 0")]
    tuned = fine_tune(llama, "sums", suite, Full(steps=60, batch=12, learning_rate=3e-3), store)
    assert scored(suite, tuned, store)[0].value > scored(suite, llama, store)[0].value + 0.2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": 3}, r"column 'question' of row 0 of the test split: expected text, found 3"),
        ({"choices": ["cat"]}, r"column 'choices' .*expected a list of two or more texts, found \['cat'\]"),
        ({"choices": "cat dog"}, r"column 'choices' .*expected a list of two or more texts, found 'cat dog'"),
        ({"answer": 3}, r"column 'answer' .*expected 0 to 2, or one of the choices, found 3"),
        ({"answer": "red"}, r"column 'answer' .*expected 0 to 2, or one of the choices, found 'red'"),
    ],
)
def test_bad_questions_are_named(
    row: dict[str, Any], message: str, llama: CheckpointRef, store: ArtifactStore, tmp_path: Path
) -> None:
    good = {"question": "1 plus 1 is", "choices": ["2", "3", "4"], "answer": "2"}
    path = (str(write_lines(tmp_path / "rows.jsonl", [{**good, **row}, good])),)
    problem = MultipleChoice(Jsonl(train=path, test=path)).open(store.open(llama))
    with pytest.raises(Mismatch, match=message):
        problem.check(problem.rows("test"), "test")


def test_an_empty_choice_and_one_that_is_too_long_are_refused(
    llama: CheckpointRef, store: ArtifactStore, folder: Path
) -> None:
    problem = questions(folder, max_tokens=4).open(store.open(llama))
    with pytest.raises(InvalidInput, match="the choice '0 plus 0 is': expected 1 to 3 tokens, found 4"):
        problem.collate([{"question": "a", "choices": ["0 plus 0 is", "cat"], "answer": 0}])


class TestHarness:
    def test_it_is_an_evaluation_like_any_other(self, llama: CheckpointRef, store: ArtifactStore, folder: Path) -> None:
        chain = {
            "name": "measured",
            "base": {"name": "checkpoint", "source": "."},
            "tasks": [{"name": "sums", "suite": {"name": "causal_lm", "data": DATA}}],
            "lines": [{"name": "line", "merger": {"name": "average"}}],
            "retained": [
                {"name": "able", "suite": {"name": "lm_eval", "task": "tiny_sums", "include": str(folder / "tasks")}}
            ],
        }
        (ability,) = parse_chain(chain).retained
        scores = store.open(evaluate(llama, [ability], store))
        assert [(row.task, row.metric, row.samples) for row in read_scores(scores)] == [
            ("able", "acc", 36),
            ("able", "acc_norm", 36),
        ]
        assert len(outcomes_of(scores)["able"]) == 36
        assert evaluate(llama, [ability], store) == scores.ref

    def test_the_fingerprint_is_that_of_the_questions(self, folder: Path, tmp_path: Path) -> None:
        suite = LmEval("tiny_sums", include=str(folder / "tasks"))
        assert suite.fingerprint() == suite.fingerprint()
        lines = write_lines(tmp_path / "other.jsonl", QUESTIONS[1:])
        other = {**TASK, "dataset_kwargs": {"data_files": {"test": str(lines)}}}
        (tmp_path / "sums.yaml").write_text(yaml.safe_dump(other))
        assert LmEval("tiny_sums", include=str(tmp_path)).fingerprint() != suite.fingerprint()

    @pytest.mark.parametrize(
        ("task", "message"),
        [
            ("tiny_sum", "'tiny_sum' is no task of lm_eval .*`lm_eval ls tasks` lists them"),
            ("mmlu", "'mmlu' is a group of tasks, not a task"),
            ("tiny_gone", "the data of the lm_eval task 'tiny_gone' cannot be had"),
        ],
    )
    def test_what_it_cannot_do_is_said(self, task: str, message: str, folder: Path) -> None:
        with pytest.raises(InvalidInput, match=message):
            LmEval(task, include=str(folder / "tasks")).fingerprint()

    def test_metrics_must_say_more_is_better(self, llama: CheckpointRef, store: ArtifactStore, folder: Path) -> None:
        with pytest.raises(InvalidInput, match="no metric of which more is better, found word_perplexity"):
            scored(LmEval("tiny_loss", include=str(folder / "tasks")), llama, store)

    def test_it_only_measures(self, llama: CheckpointRef, store: ArtifactStore, folder: Path) -> None:
        suite = LmEval("tiny_sums", include=str(folder / "tasks"))
        with pytest.raises(InvalidInput, match="it gives no validation split to choose by"):
            scored(suite, llama, store, split="validation")
        with pytest.raises(InvalidInput, match="such tasks only measure a finished model"):
            suite.open(store.open(llama)).rows("train")
        chain: dict[str, Any] = {
            "name": "trained",
            "base": {"name": "checkpoint", "source": "."},
            "tasks": [{"name": "sums", "suite": {"name": "lm_eval", "task": "tiny_sums"}}],
            "lines": [{"name": "line", "merger": {"name": "average"}, "search": {"name": "search"}}],
        }
        with pytest.raises(InvalidInput, match="task 'sums' would be trained on the lm_eval task 'tiny_sums'"):
            parse_chain(chain)
        chain["tasks"][0]["checkpoint"] = {"name": "checkpoint", "source": "./tuned"}
        with pytest.raises(InvalidInput, match="search of line 'line' needs examples to choose by"):
            parse_chain(chain)

    def test_an_exam_keeps_the_whole_path_of_its_tasks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "exam.yaml").write_text("suites: [{name: a, suite: {name: lm_eval, task: b, include: tasks}}]")
        (asked,) = load_exam("exam.yaml", "line").suites
        assert isinstance(asked.suite, LmEval)
        assert asked.suite.include == str(tmp_path / "tasks")
