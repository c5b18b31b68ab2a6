"""Text classification: a text encoder and a frozen head, scored by accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from storage.artifacts import Artifact
from storage.errors import InvalidInput, Mismatch
from tasks.checkpoints import load_model
from tasks.choice import Choice, require
from tasks.data import AnyData, Rows, Split
from tasks.suites.accuracy import accuracy_of
from tasks.suites.base import Batch, Score, first
from tasks.suites.features import Features
from tasks.suites.heads import AnyHead, ClassNames, CosineHead
from tasks.suites.labels import Labels, require_columns
from tasks.suites.means import class_means, kept_means
from tasks.suites.texts import SHOWN, Pooling, Reading, TextReader, features, pooled, require_fitting

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TextClassification(Choice):
    """`text`: a column of texts, with `pair` one of pairs of texts. `label`: numbers from 0, or names of classes.

    `labels`: the names of the classes in order; without them those that the data give. `pooling`: what the head sees
    of a text, its first token's feature or the mean. `too_long`: texts of more than `max_tokens` tokens, or more than
    the base can read, are cut at their end, or refused before anything is trained.
    """

    data: AnyData
    head: AnyHead
    name: Literal["text_classification"] = "text_classification"
    version: Literal[1] = 1
    text: str = "text"
    pair: str | None = None
    label: str = "label"
    labels: tuple[str, ...] = ()
    pooling: Pooling = "mean"
    max_tokens: int = 256
    too_long: Literal["cut", "refuse"] = "cut"
    batch: int = 64

    def __post_init__(self) -> None:
        require(self.max_tokens > 2, "max_tokens", "at least 3", self.max_tokens)
        require(self.batch > 0, "batch", "positive", self.batch)
        require(len(set(self.labels)) == len(self.labels), "labels", "different names", list(self.labels))

    def fingerprint(self) -> str:
        return self.data.fingerprint()

    def open(self, base: Artifact) -> TextProblem:
        return TextProblem(self, base)


class TextClassifier(nn.Module):
    """Encoder plus frozen head. Tokens [B, T] -> logits [B, C]."""

    def __init__(self, backbone: nn.Module, head: CosineHead, pooling: Pooling) -> None:
        super().__init__()
        self.backbone, self.head, self.pooling = backbone, head, pooling

    def forward(self, labels: Tensor | None = None, **batch: Tensor) -> dict[str, Tensor]:
        logits_BC = self.head(pooled(self.backbone, self.pooling, batch))
        found = {"logits": logits_BC}
        return found if labels is None else {"loss": functional.cross_entropy(logits_BC, labels), **found}


class TextProblem:
    def __init__(self, suite: TextClassification, base: Artifact) -> None:
        self._suite = suite
        self._base = base
        self._reader = TextReader(base, suite.max_tokens, suite.too_long)
        self._names: ClassNames = suite.labels or suite.data.class_names(suite.label)
        self._labels = Labels(suite.head.count(self._names), self._names)
        self._head: CosineHead | None = None
        self.shared = Features()

    def rows(self, split: Split) -> Rows:
        rows = self._suite.data.rows(split)
        wanted = tuple(name for name in (self._suite.text, self._suite.pair, self._suite.label) if name)
        require_columns(rows, wanted, split, "Set text, pair and label to the columns that hold them")
        self._labels.check(rows, self._suite.label, split)
        return rows

    def check(self, rows: Rows, split: Split) -> dict[str, int]:
        texts = [self._texts(rows[number]) for number in range(len(rows))]
        return {"examples": len(rows), "cut": self._reader.count_long(texts, split)}

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        labels = torch.tensor([self._labels.number(row[self._suite.label]) for row in rows])
        return {**self._reader.read([self._texts(row) for row in rows]), "labels": labels}

    @property
    def label_names(self) -> Sequence[str]:
        return self._labels.shown

    def read(self, inputs: Sequence[Any]) -> Batch:
        """Texts, or pairs of them where the suite has pairs."""
        return self._reader.read([self._given(one, number) for number, one in enumerate(inputs)])

    def _given(self, one: Any, number: int) -> tuple[str, ...]:
        columns = ("text", "pair") if self._suite.pair else ("text",)
        texts = (one,) if isinstance(one, str) else tuple(one) if isinstance(one, (list, tuple)) else ()
        if len(texts) != len(columns) or not all(isinstance(text, str) for text in texts):
            raise InvalidInput(f"row {number}: expected {' and '.join(columns)}, found {repr(one)[:SHOWN]}")
        return texts

    def counted(self, batch: Batch) -> int:
        return len(batch["labels"])

    def wrap(self, backbone: PreTrainedModel) -> TextClassifier:
        require_fitting(self._reader.tokenizer, backbone)
        if self._head is None:
            self._head = self._build(backbone.config.hidden_size)
        return TextClassifier(backbone, self._head, self._suite.pooling)

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
        logits = (model.head(one.to(device)) for one in self._features(lambda: backbone, rows, device))
        return accuracy_of(logits, self._labels.numbers(rows, self._suite.label), self._labels.classes, report)

    def _features(self, backbone: Callable[[], nn.Module], rows: Rows, device: str, **more: Any) -> Iterator[Tensor]:
        texts = [self._texts(rows[number]) for number in range(len(rows))]
        reading = Reading(self._reader, self._suite.pooling, self._suite.batch, device)
        return reading.features(backbone, texts, self.shared, **more)

    def _build(self, width: int) -> CosineHead:
        """The head. One made of label names asks the base, not the model that is tuned or scored: it never moves."""
        with torch.inference_mode(False), torch.random.fork_rng():
            return self._suite.head.build(width, self._names, self._embed, self._means)

    def _embed(self, texts: list[str]) -> Tensor:
        base = load_model(self._base, dtype=torch.float32)
        return features(base, self._reader, self._suite.pooling, texts)

    def _means(self, classes: int) -> Tensor:
        suite = self._suite
        data = {"data": suite.data.spec(), "content": suite.data.fingerprint(), "names": list(self._labels.names or ())}
        read = {
            name: getattr(suite, name)
            for name in ("version", "text", "pair", "label", "pooling", "max_tokens", "batch")
        }
        return kept_means(self._base, {**data, **read}, classes, lambda: self._make_means(classes))

    def _make_means(self, classes: int) -> Tensor:
        rows = self.rows("train")
        with torch.no_grad():
            base = partial(load_model, self._base, dtype=torch.float32)
            features = self._features(base, rows, "cpu", model="base")
            return class_means(features, self._labels.numbers(rows, self._suite.label), classes)

    def _texts(self, row: dict[str, Any]) -> tuple[str, ...]:
        found = []
        for name in (self._suite.text, self._suite.pair):
            if name is None:
                continue
            value = row.get(name)
            if not isinstance(value, str):
                raise Mismatch(f"column {name!r} of the data", expected="text", found=repr(value)[:SHOWN])
            found.append(value)
        if not any(text.strip() for text in found):
            raise InvalidInput(f"column {self._suite.text!r} of the data has a text without words: {found[0]!r}")
        return tuple(found)
