"""Multiple choice: which of several continuations of a prompt a language model finds most likely.

A choice's score is the sum of the log-probabilities of its tokens after the prompt. `accuracy` takes the highest,
`accuracy_normalised` the highest per character, so that long choices are not at a disadvantage: `acc` and `acc_norm` of
EleutherAI's lm-evaluation-harness, from which the way of dividing prompt and continuation into tokens is taken too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from storage.artifacts import Artifact
from storage.errors import InvalidInput, Mismatch
from tasks.choice import Choice, require
from tasks.data import AnyData, Rows, Split
from tasks.suites.answers import Encoded, answering, counted_answers, cut_prompt, padded, predictions
from tasks.suites.base import Batch, Score, first
from tasks.suites.intervals import share
from tasks.suites.labels import require_columns
from tasks.suites.texts import SHOWN, context, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class MultipleChoice(Choice):
    """`prompt`: a text column; `choices`: a column of lists of texts; `answer`: the right one, as its number from 0 or
    as its text. `separator` stands between the prompt and each choice. Training learns the right choices.

    Where prompt and choice have more than `max_tokens` tokens, or more than the base can read, the prompt is cut from
    its beginning; a choice never is. `batch`: how many choices are read at once.
    """

    data: AnyData
    name: Literal["multiple_choice"] = "multiple_choice"
    version: Literal[1] = 1
    prompt: str = "question"
    choices: str = "choices"
    answer: str = "answer"
    separator: str = " "
    max_tokens: int = 512
    batch: int = 16

    def __post_init__(self) -> None:
        require(self.max_tokens > 1, "max_tokens", "at least 2", self.max_tokens)
        require(self.batch > 0, "batch", "positive", self.batch)

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.prompt, self.choices, self.answer)

    def fingerprint(self) -> str:
        return self.data.fingerprint()

    def open(self, base: Artifact) -> MultipleChoiceProblem:
        return MultipleChoiceProblem(self, base)


@dataclass(frozen=True)
class _Question:
    prompt: str
    choices: tuple[str, ...]
    right: int


class MultipleChoiceProblem:
    def __init__(self, suite: MultipleChoice, base: Artifact) -> None:
        self._suite = suite
        self._tokenizer: Any = load_tokenizer(base)
        self._most = context(base, self._tokenizer, suite.max_tokens)

    def rows(self, split: Split) -> Rows:
        rows = self._suite.data.rows(split)
        remedy = "Set prompt, choices and answer to the columns that hold them"
        require_columns(rows, self._suite.columns, split, remedy)
        return rows

    def check(self, rows: Rows, split: Split) -> dict[str, int]:
        cut = 0
        for number in range(len(rows)):
            question = self._question(rows[number], f"row {number} of the {split} split")
            cut += any(len(prompt) + len(choice) > self._most for prompt, choice in self._encoded(question))
        return {"examples": len(rows), "cut": cut}

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """The prompts with their right choices, whose tokens are the labels."""
        questions = [self._question(row, "a row of the data") for row in rows]
        return padded([self._fitted(*self._encoded(one)[one.right]) for one in questions], self._pad)

    def counted(self, batch: Batch) -> int:
        return counted_answers(batch)

    def wrap(self, backbone: PreTrainedModel) -> nn.Module:
        return answering(backbone, self._tokenizer)

    @torch.inference_mode()
    def score(
        self,
        backbone: PreTrainedModel,
        device: str,
        report: Callable[[int, int], None],
        split: Split = "test",
        limit: int | None = None,
    ) -> list[Score]:
        model = self.wrap(backbone).to(device).eval()
        rows = first(self.rows(split), limit)
        right: list[bool] = []
        right_normalised: list[bool] = []
        for number in range(len(rows)):
            question = self._question(rows[number], f"row {number} of the {split} split")
            likely_C = self._log_likelihoods(model, question, device)
            lengths_C = torch.tensor([max(1, len(choice)) for choice in question.choices], dtype=likely_C.dtype)
            right.append(int(likely_C.argmax()) == question.right)
            right_normalised.append(int((likely_C / lengths_C).argmax()) == question.right)
            report(number + 1, len(rows))
        return [share("accuracy", right), share("accuracy_normalised", right_normalised)]

    def _log_likelihoods(self, model: nn.Module, question: _Question, device: str) -> torch.Tensor:
        """sum_t log p(token t | all before) of each choice, [number of choices]."""
        encoded = [self._fitted(*one) for one in self._encoded(question)]
        found = []
        for start in range(0, len(encoded), self._suite.batch):
            batch = padded(encoded[start : start + self._suite.batch], self._pad)
            there = {name: value.to(device) for name, value in batch.items()}
            labels_BT = there.pop("labels")
            logits_BTV = model(**there)["logits"]
            for row, labels_T in enumerate(labels_BT):
                logits_NV, labels_N = predictions(logits_BTV[row : row + 1], labels_T.unsqueeze(0))
                found.append(logits_NV.log_softmax(-1).gather(1, labels_N.unsqueeze(1)).sum().cpu())
        return torch.stack(found)

    @property
    def _pad(self) -> int:
        found = self._tokenizer.pad_token_id
        return int(found if found is not None else self._tokenizer.eos_token_id or 0)

    def _question(self, row: dict[str, Any], where: str) -> _Question:
        suite = self._suite
        prompt, choices, answer = (row.get(name) for name in suite.columns)
        if not isinstance(prompt, str):
            raise Mismatch(f"column {suite.prompt!r} of {where}", expected="text", found=repr(prompt)[:SHOWN])
        texts = choices if isinstance(choices, (list, tuple)) else []
        if len(texts) < 2 or not all(isinstance(one, str) and one for one in texts):
            expected = "a list of two or more texts"
            raise Mismatch(f"column {suite.choices!r} of {where}", expected=expected, found=repr(choices)[:SHOWN])
        if isinstance(answer, str) and texts.count(answer) == 1:
            answer = texts.index(answer)
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(texts):
            expected = f"0 to {len(texts) - 1}, or one of the choices"
            raise Mismatch(f"column {suite.answer!r} of {where}", expected=expected, found=repr(answer)[:SHOWN])
        return _Question(prompt, tuple(texts), answer)

    def _encoded(self, question: _Question) -> list[Encoded]:
        """Tokens of the prompt and of each choice after it: what the tokens of both together have beyond the prompt's.

        Spaces at the end of a prompt belong to the choice, because tokenizers join them to the next word.
        """
        context = question.prompt + self._suite.separator
        prompt = context.rstrip()
        space = context[len(prompt) :]
        begin = self._tokens(prompt)
        # something must come before the first token that is predicted
        standing_in = [one for one in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id) if one is not None]
        found = []
        for choice in question.choices:
            answer = self._tokens(prompt + space + choice)[len(begin) :]
            if not answer or len(answer) >= self._most:
                raise InvalidInput(
                    f"the choice {choice[:SHOWN]!r}: expected 1 to {self._most - 1} tokens, found {len(answer)}",
                    remedy="Raise max_tokens if the base's context allows it, or leave such questions out of the data",
                )
            found.append((begin or standing_in[:1], answer))
        return found

    def _tokens(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer(text)["input_ids"]
        ends = found[-1:] == [self._tokenizer.eos_token_id]  # some tokenizers end every text
        return found[:-1] if ends and text else found

    def _fitted(self, prompt: list[int], answer: list[int]) -> Encoded:
        lead = prompt[:1] if prompt[:1] == [self._tokenizer.bos_token_id] else []
        return cut_prompt(prompt, answer, self._most, lead)
