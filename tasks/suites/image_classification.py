"""Image classification: a vision backbone and a frozen head, scored by accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from tasks.suites.base import Batch, Score, batches, first
from tasks.suites.features import Features
from tasks.suites.heads import AnyHead, ClipText, CosineHead
from tasks.suites.images import ImageReader
from tasks.suites.labels import Labels, require_columns
from tasks.suites.means import class_means, kept_means

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ImageClassification(Choice):
    """`feature`: what the head sees of the backbone, its class token or its pooled output.

    Rows need a label and either `pixel_values` (a tensor) or an image (PIL, encoded bytes, or a list of pixels).
    """

    data: AnyData
    head: AnyHead
    name: Literal["image_classification"] = "image_classification"
    version: Literal[1] = 1
    feature: Literal["cls", "pooled"] = "cls"
    image: str = "image"
    label: str = "label"
    batch: int = 256

    def __post_init__(self) -> None:
        require(self.batch > 0, "batch", "positive", self.batch)

    def fingerprint(self) -> str:
        return self.data.fingerprint()

    def open(self, base: Artifact) -> ImageProblem:
        return ImageProblem(self, base)


class Classifier(nn.Module):
    """Backbone plus frozen head; only what a tuner leaves trainable in the backbone learns."""

    def __init__(self, backbone: nn.Module, head: CosineHead, feature: str) -> None:
        super().__init__()
        self.backbone, self.head, self.feature = backbone, head, feature

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits_BC = self.head(feature_of(self.backbone, self.feature, pixel_values))
        found = {"logits": logits_BC}
        return found if labels is None else {"loss": functional.cross_entropy(logits_BC, labels), **found}


def feature_of(backbone: nn.Module, feature: str, pixel_values: Tensor) -> Tensor:
    """[B, D]: what a head sees of images."""
    output = backbone(pixel_values=pixel_values)
    found: Tensor = output.pooler_output if feature == "pooled" else output.last_hidden_state[:, 0]
    return found


class ImageProblem:
    def __init__(self, suite: ImageClassification, base: Artifact) -> None:
        self._suite = suite
        self._base = base
        self._reader = ImageReader(base)
        self._head: CosineHead | None = None
        self.shared = Features()
        self._names = suite.data.class_names(suite.label)
        known = suite.head.names(self._names) if isinstance(suite.head, ClipText) else self._names
        self._labels = Labels(suite.head.count(self._names), known)

    def rows(self, split: Split) -> Rows:
        rows = self._suite.data.rows(split)
        image = "pixel_values" if len(rows) and "pixel_values" in rows[0] else self._suite.image
        require_columns(rows, (image, self._suite.label), split, "Set image and label to the columns that hold them")
        self._labels.check(rows, self._suite.label, split)
        return rows

    def check(self, rows: Rows, split: Split) -> dict[str, int]:
        return {"examples": len(rows)}

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        labels = torch.tensor([self._labels.number(self._column(row, self._suite.label)) for row in rows])
        return {"pixel_values": self._stacked(rows), "labels": labels}

    @property
    def label_names(self) -> Sequence[str]:
        return self._labels.shown

    def read(self, inputs: Sequence[Any]) -> Batch:
        """Pixel values [C, H, W] as the model takes them, or images: PIL, encoded as bytes, or these in base64."""
        return {"pixel_values": self._reader.read(inputs)}

    def counted(self, batch: Batch) -> int:
        return len(batch["labels"])

    def wrap(self, backbone: PreTrainedModel) -> Classifier:
        width = getattr(backbone.config, "hidden_size", None)
        if width is None:
            raise InvalidInput(f"{type(backbone).__name__} has no hidden_size: it is no vision backbone")
        if self._head is None:
            with torch.inference_mode(False):  # what was made in that mode could not be trained with
                self._head = self._suite.head.build(width, self._names, means=self._means)
        return Classifier(backbone, self._head, self._suite.feature)

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
        made = self._features(lambda: backbone, rows, device)
        features = self.shared.of(self._inputs(split, limit), made)
        logits = (model.head(one.to(device)) for one in features)
        return accuracy_of(logits, self._labels.numbers(rows, self._suite.label), self._labels.classes, report)

    def _features(self, backbone: Callable[[], nn.Module], rows: Rows, device: str) -> Iterator[Tensor]:
        """[B, D] of every batch of rows. The backbone is asked for once they are."""
        model, suite = backbone(), self._suite
        for batch in batches(rows, suite.batch, lambda some: {"pixel_values": self._stacked(some)}):
            yield feature_of(model, suite.feature, batch["pixel_values"].to(device))

    def _inputs(self, split: Split, limit: int | None, **more: Any) -> dict[str, Any]:
        """What decides the pixels that an encoder sees, and in which batches."""
        suite = self._suite
        seen = {"data": suite.data.spec(), "content": suite.data.fingerprint(), "split": split, "limit": limit}
        seen["version"] = suite.version
        return {**seen, "image": suite.image, "feature": suite.feature, "batch": suite.batch, **more}

    def _means(self, classes: int) -> Tensor:
        seen = {**self._inputs("train", None), "label": self._suite.label, "names": list(self._labels.names or ())}
        return kept_means(self._base, seen, classes, lambda: self._make_means(classes))

    def _make_means(self, classes: int) -> Tensor:
        rows = self.rows("train")
        with torch.no_grad():
            made = self._features(lambda: load_model(self._base, dtype=torch.float32).eval(), rows, "cpu")
            features = self.shared.of(self._inputs("train", None, model="base"), made)
            return class_means(features, self._labels.numbers(rows, self._suite.label), classes)

    def _stacked(self, rows: list[dict[str, Any]]) -> Tensor:
        return torch.stack([self._pixels(row) for row in rows])

    def _pixels(self, row: dict[str, Any]) -> Tensor:
        ready = row.get("pixel_values")
        if isinstance(ready, Tensor):
            return ready
        image = self._column(row, self._suite.image)
        if isinstance(image, list):
            config = self._model_config()
            return torch.tensor(image, dtype=torch.float32).reshape(
                config["num_channels"], config["image_size"], config["image_size"]
            )
        return self._reader.processed(image)

    def _column(self, row: dict[str, Any], column: str) -> Any:
        if column not in row:
            raise Mismatch("columns of the data", expected=repr(column), found=", ".join(sorted(row)))
        return row[column]

    def _model_config(self) -> dict[str, Any]:
        import json

        found: dict[str, Any] = json.loads(self._base.asset("config.json"))
        return found
