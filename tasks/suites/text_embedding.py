"""Text embedding: an encoder whose features of texts that belong together are alike, scored by retrieval.

Trained on pairs with the other texts of the batch as contrast (InfoNCE, arXiv 1807.03748, on cosines). There is no
head at all, so backbones that were tuned apart can be merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from storage.artifacts import Artifact
from storage.errors import InvalidInput, Mismatch
from tasks.choice import Choice, require
from tasks.data import AnyData, Rows, Split
from tasks.suites.base import Batch, Score, first
from tasks.suites.features import Features
from tasks.suites.intervals import mean, share
from tasks.suites.labels import require_columns
from tasks.suites.texts import SHOWN, Pooling, Reading, TextReader, pooled, require_fitting

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TextEmbedding(Choice):
    """`query` and `positive`: columns of texts that belong together, a question and its answer for instance.

    `scale` multiplies the cosines in the loss. Scored by how often a query's own text is the nearest of all the texts
    of the split, and by the mean reciprocal rank. `pooling`, `max_tokens`, `too_long` as in text_classification.
    """

    data: AnyData
    name: Literal["text_embedding"] = "text_embedding"
    version: Literal[1] = 1
    query: str = "query"
    positive: str = "positive"
    pooling: Pooling = "mean"
    scale: float = 20.0
    max_tokens: int = 256
    too_long: Literal["cut", "refuse"] = "cut"
    batch: int = 64

    def __post_init__(self) -> None:
        require(self.scale > 0, "scale", "positive", self.scale)
        require(self.max_tokens > 2, "max_tokens", "at least 3", self.max_tokens)
        require(self.batch > 0, "batch", "positive", self.batch)

    def fingerprint(self) -> str:
        return self.data.fingerprint()

    def open(self, base: Artifact) -> EmbeddingProblem:
        return EmbeddingProblem(self, base)


class Retriever(nn.Module):
    """B queries and their texts, of which U differ: cosines times a scale, [B, U], against which text is whose."""

    def __init__(self, backbone: nn.Module, pooling: Pooling, scale: float) -> None:
        super().__init__()
        self.backbone, self.pooling, self.scale = backbone, pooling, scale

    def embed(self, batch: Batch) -> Tensor:
        """Unit vectors [B, D]."""
        return functional.normalize(pooled(self.backbone, self.pooling, batch), dim=-1)

    def forward(self, labels: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        query_BD, text_UD = (
            self.embed({name.removeprefix(side): one for name, one in batch.items() if name.startswith(side)})
            for side in ("query_", "text_")
        )
        logits_BU = self.scale * query_BD @ text_UD.T
        return {"loss": functional.cross_entropy(logits_BU, labels), "logits": logits_BU}


class EmbeddingProblem:
    def __init__(self, suite: TextEmbedding, base: Artifact) -> None:
        self._suite = suite
        self._reader = TextReader(base, suite.max_tokens, suite.too_long)
        self.shared = Features()

    def rows(self, split: Split) -> Rows:
        rows = self._suite.data.rows(split)
        wanted = (self._suite.query, self._suite.positive)
        require_columns(rows, wanted, split, "Set query and positive to the columns that hold them")
        return rows

    def check(self, rows: Rows, split: Split) -> dict[str, int]:
        long = 0
        for name in (self._suite.query, self._suite.positive):
            texts = [(self._text(rows[number], name),) for number in range(len(rows))]
            long += self._reader.count_long(texts, split)
        return {"examples": len(rows), "cut": long}

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """A text that several queries share is there once: it is no contrast to itself."""
        queries = [self._text(row, self._suite.query) for row in rows]
        own = [self._text(row, self._suite.positive) for row in rows]
        texts = list(dict.fromkeys(own))
        sides = {"query": queries, "text": texts}
        batch = {
            f"{side}_{name}": one
            for side, several in sides.items()
            for name, one in self._reader.read([(text,) for text in several]).items()
        }
        return {**batch, "labels": torch.tensor([texts.index(text) for text in own])}

    def counted(self, batch: Batch) -> int | None:
        """Every query is compared with the texts of the whole batch."""
        return None

    def wrap(self, backbone: PreTrainedModel) -> Retriever:
        require_fitting(self._reader.tokenizer, backbone)
        return Retriever(backbone, self._suite.pooling, self._suite.scale)

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
        if not len(rows):
            raise InvalidInput(f"the {split} split is empty", remedy="Check the path and the split names of the data")
        queries = [self._text(rows[number], self._suite.query) for number in range(len(rows))]
        own = [self._text(rows[number], self._suite.positive) for number in range(len(rows))]
        texts = list(dict.fromkeys(own))
        text_UD = torch.cat(list(self._embedded(model, texts, device)))
        place = {text: number for number, text in enumerate(texts)}
        ranks: list[int] = []
        for query_BD in self._embedded(model, queries, device):
            cosines_BU = query_BD @ text_UD.T
            mine = torch.tensor([place[text] for text in own[len(ranks) : len(ranks) + len(query_BD)]], device=device)
            own_B1 = cosines_BU.gather(1, mine.unsqueeze(1))
            ranks += (1 + (cosines_BU > own_B1).sum(dim=1)).tolist()
            report(len(ranks), len(queries))
        return [
            share("accuracy", [rank == 1 for rank in ranks]),
            mean("mean_reciprocal_rank", [1 / rank for rank in ranks]),
        ]

    def _embedded(self, model: Retriever, texts: list[str], device: str) -> Iterator[Tensor]:
        reading = Reading(self._reader, self._suite.pooling, self._suite.batch, device)
        for one in reading.features(lambda: model.backbone, [(text,) for text in texts], self.shared):
            yield functional.normalize(one.to(device), dim=-1)

    def _text(self, row: dict[str, Any], name: str) -> str:
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            raise Mismatch(f"column {name!r} of the data", expected="a text with words", found=repr(value)[:SHOWN])
        return value
