"""Causal language modelling: prompts and answers, trained and scored on the tokens of the answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn import functional

from storage.artifacts import Artifact
from storage.errors import InvalidInput, Mismatch
from storage.refs import short
from tasks.choice import Choice, require
from tasks.data import AnyData, Rows, Split
from tasks.suites.answers import Encoded, answering, counted_answers, cut_prompt, padded, predictions
from tasks.suites.base import Batch, Score, batches, first
from tasks.suites.intervals import mean
from tasks.suites.labels import require_columns
from tasks.suites.texts import SHOWN, context, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# some chat templates write the day into the prompt; a task has no clock, so it is always the same day
_NO_CLOCK = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


@dataclass(frozen=True)
class CausalLm(Choice):
    """`prompt` and `answer`: text columns, joined by `separator`. Or `messages`: a column of chats.

    A chat is a list of {"role", "content"} in the base's chat template; its last message is the answer. `too_long`:
    where prompt and answer have more than `max_tokens` tokens, or more than the base can read, the prompt is cut from
    its beginning (the answer never), or the example is refused before anything is trained.
    """

    data: AnyData
    name: Literal["causal_lm"] = "causal_lm"
    version: Literal[1] = 1
    prompt: str = "prompt"
    answer: str = "answer"
    separator: str = "\n"
    messages: str | None = None
    max_tokens: int = 512
    too_long: Literal["cut", "refuse"] = "cut"
    batch: int = 8

    def __post_init__(self) -> None:
        require(self.max_tokens > 1, "max_tokens", "at least 2", self.max_tokens)
        require(self.batch > 0, "batch", "positive", self.batch)

    def spec(self) -> dict[str, Any]:
        """Without the way that long examples always went, so that what was made before there was a choice is found."""
        return {name: value for name, value in super().spec().items() if (name, value) != ("too_long", "cut")}

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.prompt, self.answer) if self.messages is None else (self.messages,)

    def fingerprint(self) -> str:
        return self.data.fingerprint()

    def open(self, base: Artifact) -> CausalLmProblem:
        return CausalLmProblem(self, base)


class CausalLmProblem:
    def __init__(self, suite: CausalLm, base: Artifact) -> None:
        self._suite = suite
        self._tokenizer: Any = load_tokenizer(base)
        if self._tokenizer.eos_token_id is None:
            raise InvalidInput(
                f"the tokenizer of the base {short(base.ref)} has no end-of-text token, so answers could not end",
                remedy="Set eos_token in its tokenizer_config.json and ingest it again",
            )
        self._most = context(base, self._tokenizer, suite.max_tokens)
        lead = self._tokenizer("")["input_ids"][:1]
        self._lead: list[int] = lead if lead == [self._tokenizer.bos_token_id] else []

    def rows(self, split: Split) -> Rows:
        rows = self._suite.data.rows(split)
        remedy = "Set prompt and answer, or messages, to the columns that hold them"
        require_columns(rows, self._suite.columns, split, remedy)
        return rows

    def check(self, rows: Rows, split: Split) -> dict[str, int]:
        cut = 0
        for number in range(len(rows)):
            prompt, answer = self._encode(rows[number])
            length = len(prompt) + len(answer)
            if length > self._most and self._suite.too_long == "refuse":
                raise InvalidInput(
                    f"example {number} of the {split} split: expected at most {self._most} tokens of prompt and "
                    f"answer, found {length}",
                    remedy="Raise max_tokens if the base's context allows it, or set too_long to cut",
                )
            cut += length > self._most
        return {"examples": len(rows), "cut": cut}

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """Tokens, padded at the end; labels are the answers' tokens, everything else is ignored."""
        return padded([self._fitted(*self._encode(row)) for row in rows], self._pad)

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
        """Teacher forced: every token of an answer is predicted from the true ones before it."""
        model = self.wrap(backbone).to(device).eval()
        rows = first(self.rows(split), limit)
        right: list[float] = []  # of every row: tokens that were predicted, the loss of all, how many there are
        losses: list[float] = []
        tokens: list[float] = []
        for batch in batches(rows, self._suite.batch, self.collate):
            logits_BTV = model(batch["input_ids"].to(device), batch["attention_mask"].to(device))["logits"]
            for number, labels_T in enumerate(batch["labels"].to(device)):
                logits_NV, labels_N = predictions(logits_BTV[number : number + 1], labels_T.unsqueeze(0))
                right.append(float((logits_NV.argmax(dim=-1) == labels_N).sum()))
                losses.append(float(functional.cross_entropy(logits_NV, labels_N, reduction="sum")))
                tokens.append(len(labels_N))
            report(len(tokens), len(rows))
        if not tokens:
            raise InvalidInput(f"the {split} split is empty", remedy="Check the path and the split names of the data")
        loss = mean("loss", losses, tokens)
        perplexity = Score("perplexity", _exp(loss.value), loss.samples, _exp(loss.low), _exp(loss.high))
        return [mean("token_accuracy", right, tokens), perplexity]

    @property
    def _pad(self) -> int:
        found = self._tokenizer.pad_token_id
        return int(self._tokenizer.eos_token_id if found is None else found)

    def _encode(self, row: dict[str, Any]) -> Encoded:
        """Tokens of the whole prompt and of the answer, which ends with the end-of-text token."""
        before, after = self._texts(row) if self._suite.messages is None else self._chat(row[self._suite.messages])
        end = self._tokenizer.eos_token_id
        prompt, answer = self._tokens(before), self._tokens(after)
        if self._suite.messages is None or not after.rstrip().endswith(self._tokenizer.eos_token):
            answer = [*answer, end]
        lead = self._lead if prompt[:1] != self._lead else []  # chat templates may have written it themselves
        prompt = [*lead, *prompt]
        if not answer[:-1] or len(answer) > self._most:
            raise InvalidInput(
                f"the answer of the example that begins {before[:SHOWN]!r}: expected 1 to "
                f"{self._most - 1} tokens and an end, found {len(answer) - 1}",
                remedy="Raise max_tokens if the base's context allows it, or leave such examples out of the data",
            )
        return prompt, answer

    def _fitted(self, prompt: list[int], answer: list[int]) -> Encoded:
        return cut_prompt(prompt, answer, self._most, self._lead)

    def _tokens(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def _texts(self, row: dict[str, Any]) -> tuple[str, str]:
        for column in self._suite.columns:
            if not isinstance(row.get(column), str):
                raise Mismatch(f"column {column!r} of the data", expected="text", found=repr(row.get(column))[:SHOWN])
        return row[self._suite.prompt] + self._suite.separator, row[self._suite.answer]

    def _chat(self, chat: Any) -> tuple[str, str]:
        last = chat[-1] if isinstance(chat, list) and len(chat) > 1 else None
        if not isinstance(last, dict) or last.get("role") != "assistant":
            expected = "two or more messages, the last with role assistant"
            raise Mismatch(f"column {self._suite.messages!r}", expected=expected, found=repr(chat)[:SHOWN])
        if not self._tokenizer.chat_template:
            raise InvalidInput(
                "the base's tokenizer has no chat template, but `messages` are chats",
                remedy="Use the instruction-tuned variant of the base, or prompt and answer columns",
            )
        settings = {"tokenize": False, "chat_template": _NO_CLOCK + self._tokenizer.get_chat_template()}
        before = self._tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, **settings)
        whole = self._tokenizer.apply_chat_template(chat, **settings)
        if not whole.startswith(before):
            raise InvalidInput(
                "the base's chat template writes a prompt otherwise once it is answered, so that the answer's tokens "
                f"cannot be told from it: {whole[:SHOWN]!r} does not begin with {before[:SHOWN]!r}",
                remedy="Use prompt and answer columns",
            )
        return before, whole.removeprefix(before)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
