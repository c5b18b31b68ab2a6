"""The exam of a line: what may be written, what is refused, and that a queue's policy gives it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.exam import exam_of, load_exam
from storage.errors import Damaged, InvalidInput

SUITE = {
    "name": "causal_lm",
    "data": {"name": "jsonl", "train": ["data/*.jsonl"], "test": ["s3://b/test.jsonl"]},
    "prompt": "question",
    "answer": "answer",
}
EXAM = {"suites": [{"name": "sums", "suite": SUITE}], "gate": {"name": "gate", "on_failure": "leave_out"}}


def written(folder: Path, values: Any) -> Path:
    path = folder / "exam.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_an_exam_comes_back_from_the_policy_with_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exam = load_exam(written(tmp_path, EXAM), "support")
    data = exam.suites[0].suite.data
    assert (data.train, data.test) == ((str(tmp_path / "data" / "*.jsonl"),), ("s3://b/test.jsonl",))
    assert exam_of({"exam": json.loads(json.dumps(exam.spec()))}, "support") == exam
    assert exam_of({"codec": {}}, "support") is None
    gate = {**EXAM["gate"], "retry": [0.5, {"merger": {"name": "ties"}, "scaling": {"name": "none"}}]}  # type: ignore[dict-item]
    exam = load_exam(written(tmp_path, {**EXAM, "gate": gate}), "support")
    assert exam_of({"exam": json.loads(json.dumps(exam.spec()))}, "support") == exam


def test_a_chain_lends_its_suites_and_the_gate_of_the_line() -> None:
    exam = load_exam("smoke", "smoke-opcm")
    assert [one.name for one in exam.suites] == ["rot90", "invert", "permute"]
    assert exam.gate is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"suites": []}, "needs at least one"),
        ({"suites": [*EXAM["suites"], *EXAM["suites"]]}, "'sums' is used twice"),  # type: ignore[misc]
        ({"gate": {"name": "gate", "of_alone": 0.9}}, "belong to no submission"),
        ({"gate": {"name": "gate", "on_failure": "stop"}}, "a queue goes on"),
        ({"gate": {"name": "gate", "retained": 0.9}}, "`retained` names none"),
        ({"gate": {"name": "gate", "retry": [{"merger": {"name": "slerp"}}]}}, "a queue has no end"),
        ({"gate": {"name": "gate", "retry": [{"mrger": {}}]}}, "no such field (did you mean merger?)"),
        ({"gates": {}}, "there is no such field (did you mean gate?)"),
        ({"suites": [{"name": "sums", "suit": SUITE}]}, "did you mean suite?"),
        ({"suites": [{"name": "sums", "suite": {**SUITE, "name": "causal"}}]}, "there is no 'causal'"),
    ],
)
def test_wrong_exams_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_exam(written(tmp_path, {**EXAM, **change}), "support")
    assert words in str(caught.value)


def test_a_policy_of_another_version_is_damaged() -> None:
    with pytest.raises(Damaged, match="Set it again: `deltaworks line policy support"):
        exam_of({"exam": {"suites": [{"name": "sums", "suite": {**SUITE, "version": 99}}]}}, "support")
