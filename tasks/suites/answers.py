"""Answers: what the suites of language models share. Tokens of a prompt and an answer, and the loss of the answer's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from storage.errors import InvalidInput
from tasks.suites.base import Batch
from tasks.suites.texts import require_fitting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100  # the label of tokens that count for nothing, as torch and transformers agree

Encoded = tuple[list[int], list[int]]  # the tokens of a prompt and those of its answer


class AnswerLoss(nn.Module):
    """The language model with the mean loss of the answers' tokens, in float32. Tokens [B, T] -> logits [B, T, V]."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits_BTV = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        if labels is None:
            return {"logits": logits_BTV}
        logits_NV, labels_N = predictions(logits_BTV, labels)
        return {"loss": functional.cross_entropy(logits_NV, labels_N), "logits": logits_BTV}


def answering(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> AnswerLoss:
    """Raises InvalidInput for a model that predicts no tokens, or does not know all of the tokenizer's."""
    model: PreTrainedModel = backbone
    if model.get_output_embeddings() is None:
        raise InvalidInput(
            f"{type(backbone).__name__} predicts no tokens: it has no language-model head",
            remedy="Ingest the base with `architecture` set to its causal class, for instance LlamaForCausalLM",
        )
    require_fitting(tokenizer, backbone)
    return AnswerLoss(backbone)


def predictions(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The logits that answer tokens were predicted with, each at the token before, and those tokens: [N, V] and [N]."""
    counts_BT = labels_BT[:, 1:] != IGNORED
    return logits_BTV[:, :-1][counts_BT].float(), labels_BT[:, 1:][counts_BT]


def padded(encoded: Sequence[Encoded], pad: int) -> Batch:
    """Tokens, padded at the end, [B, T]; labels are the answers' tokens, everything else is ignored."""
    length = max(len(prompt) + len(answer) for prompt, answer in encoded)
    input_ids = torch.full((len(encoded), length), pad)
    attention_mask = torch.zeros((len(encoded), length), dtype=torch.long)
    labels = torch.full((len(encoded), length), IGNORED)
    for number, (prompt, answer) in enumerate(encoded):
        end = len(prompt) + len(answer)
        input_ids[number, :end] = torch.tensor(prompt + answer)
        attention_mask[number, :end] = 1
        labels[number, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def counted_answers(batch: Batch) -> int:
    """How many tokens the loss of a batch is the mean of."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def cut_prompt(prompt: list[int], answer: list[int], most: int, lead: list[int]) -> Encoded:
    """The prompt without so much of its beginning as does not fit into `most` tokens; the answer is never cut.

    `lead`: the token that models which start with a special one expect always.
    """
    room = most - len(answer)
    if len(prompt) > room:
        kept = lead[:room]
        prompt = [*kept, *prompt[len(prompt) - (room - len(kept)) :]]
    return prompt, answer
