"""Texts: what the suites share whose examples are texts: the base's tokenizer, its context, and features of texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from storage.artifacts import Artifact
from storage.errors import InvalidInput, Mismatch
from storage.manifest import digest
from storage.refs import short
from tasks.checkpoints import CONFIG, assets_folder
from tasks.suites.base import Batch
from tasks.suites.features import Features

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pooling = Literal["cls", "mean"]
SHOWN = 60  # characters of a text that an error quotes
_POSITIONS = ("max_position_embeddings", "n_positions")  # under which names configs say how long a text may be
_ENDLESS = 10**9  # tokenizers that know no limit name a number beyond all bounds


def load_tokenizer(base: Artifact) -> Any:
    from transformers import AutoTokenizer

    with assets_folder(base) as folder:
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise InvalidInput(
                f"the base {short(base.ref)} has no tokenizer that can be read, but the data are texts",
                remedy="Ingest it from a folder that has one: tokenizer.json and tokenizer_config.json",
            ) from error


def context(base: Artifact, tokenizer: Any, wanted: int) -> int:
    """The tokens that a text may have: `wanted`, or fewer if the base cannot read so many."""
    config = json.loads(base.asset(CONFIG))
    config = {**config, **config.get("text_config", {})}
    limits: list[int] = [wanted, *(config[name] for name in _POSITIONS if isinstance(config.get(name), int))]
    if tokenizer.model_max_length < _ENDLESS:
        limits.append(int(tokenizer.model_max_length))
    return min(limits)


def require_fitting(tokenizer: Any, backbone: PreTrainedModel) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings."""
    model: Any = backbone  # transformers leaves this method without types
    words, known = len(tokenizer), model.get_input_embeddings().num_embeddings
    if words > known:
        raise Mismatch(
            "tokens of the base's tokenizer",
            expected=f"at most {known}, its embeddings",
            found=words,
            remedy="Ingest the base with the tokenizer that it was trained with",
        )


class TextReader:
    """Texts as padded tokens, cut at their end or refused where they are longer than `most` tokens."""

    def __init__(self, base: Artifact, wanted: int, too_long: Literal["cut", "refuse"]) -> None:
        self.tokenizer = load_tokenizer(base)
        self.most = context(base, self.tokenizer, wanted)
        self._too_long = too_long
        if self.tokenizer.pad_token_id is None:
            if self.tokenizer.eos_token_id is None:
                raise InvalidInput(
                    f"the tokenizer of the base {short(base.ref)} has no padding token, and no end-of-text token that "
                    "could stand in for it",
                    remedy="Set pad_token in its tokenizer_config.json and ingest it again",
                )
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def read(self, texts: Sequence[Sequence[str]]) -> Batch:
        """Texts, or pairs of texts, as `input_ids` and `attention_mask` [B, T], and token types where there are any."""
        columns = [list(column) for column in zip(*texts, strict=True)]
        longest = "longest_first" if len(columns) > 1 else True
        found = self.tokenizer(*columns, truncation=longest, max_length=self.most, padding=True, return_tensors="pt")
        return dict(found)

    def count_long(self, texts: Sequence[Sequence[str]], split: str) -> int:
        """How many are longer than the limit. Raises InvalidInput for the first if they are to be refused."""
        long = 0
        for number, one in enumerate(texts):
            tokens = len(self.tokenizer(*one)["input_ids"])
            if tokens > self.most and self._too_long == "refuse":
                raise InvalidInput(
                    f"row {number} of the {split} split, {one[0][:SHOWN]!r}: expected at most {self.most} tokens, "
                    f"found {tokens}",
                    remedy="Raise max_tokens if the base's context allows it, or set too_long to cut",
                )
            long += tokens > self.most
        return long


def pooled(backbone: nn.Module, pooling: Pooling, batch: Batch) -> Tensor:
    """One feature a text: that of the first token, or the mean over the tokens that are no padding. [B, D]"""
    from transformers import PreTrainedModel

    body = backbone.base_model if isinstance(backbone, PreTrainedModel) else backbone
    hidden_BTD = body(**batch).last_hidden_state
    if pooling == "cls":
        first: Tensor = hidden_BTD[:, 0]
        return first
    mask_BT1 = batch["attention_mask"].unsqueeze(-1).to(hidden_BTD.dtype)
    mean: Tensor = (hidden_BTD * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1).clamp(min=1)
    return mean


@dataclass(frozen=True)
class Reading:
    """How texts become features: `size` texts at a time, on a device."""

    reader: TextReader
    pooling: Pooling
    size: int
    device: str

    def features(
        self, backbone: Callable[[], nn.Module], texts: Sequence[Sequence[str]], shared: Features, **more: Any
    ) -> Iterator[Tensor]:
        """[B, D] of every batch of texts, or of pairs of texts, kept or made. `more`: what else tells them apart."""
        read = digest("\n".join(json.dumps(list(one)) for one in texts).encode())
        seen = {"texts": read, "tokens": self.reader.most, "pooling": self.pooling, "batch": self.size, **more}
        return shared.of(seen, self._made(backbone, texts))

    def _made(self, backbone: Callable[[], nn.Module], texts: Sequence[Sequence[str]]) -> Iterator[Tensor]:
        """The backbone is asked for with the first of them."""
        model = backbone()
        for start in range(0, len(texts), self.size):
            batch = self.reader.read(texts[start : start + self.size])
            yield pooled(model, self.pooling, {name: one.to(self.device) for name, one in batch.items()})


@torch.no_grad()
def features(backbone: PreTrainedModel, reader: TextReader, pooling: Pooling, texts: Sequence[str]) -> Tensor:
    """Features of a few texts, [number of texts, D]."""
    return torch.cat([pooled(backbone, pooling, reader.read([(text,)])) for text in texts]).clone()
