"""Heads of classifiers: frozen class vectors that features are compared with. `AnyHead` is the list of choices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from storage.errors import InvalidInput, Mismatch
from tasks.choice import BY_NAME, Choice, require
from tasks.exclusive import PROCESS_STATE
from tasks.ingest import Checkpoint, locate

ClassNames = tuple[str, ...] | None  # of the labels in order, if they are known
Embed = Callable[[list[str]], Tensor]  # texts -> the base's own features of them [number of texts, D]
Means = Callable[[int], Tensor]  # C -> the base's own mean feature of each class [C, D], of unit length


class CosineHead(nn.Module):
    """logits = scale * normalise(project(feature)) @ weight^T, all frozen. Feature [B, D] -> logits [B, C]."""

    weight: Tensor

    def __init__(self, weight_CD: Tensor, scale: float, project: nn.Module | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight_CD)
        self.scale = scale
        self.project = project or nn.Identity()
        self.requires_grad_(False)

    def forward(self, feature_BD: Tensor) -> Tensor:
        return self.scale * functional.normalize(self.project(feature_BD), dim=-1) @ self.weight.T


@dataclass(frozen=True)
class Orthonormal(Choice):
    """Random orthonormal class vectors, the `index`-th draw of `seed`: heads that the base has never seen."""

    name: Literal["orthonormal"] = "orthonormal"
    version: Literal[1] = 1
    classes: int = 10
    index: int = 0
    seed: int = 7
    scale: float = 10.0

    def __post_init__(self) -> None:
        require(self.classes > 1, "classes", "at least 2", self.classes)
        require(self.index >= 0, "index", "0 or more", self.index)

    def count(self, names: ClassNames = None) -> int:
        return self.classes

    def build(
        self, width: int, names: ClassNames = None, embed: Embed | None = None, means: Means | None = None
    ) -> CosineHead:
        require(self.classes <= width, "classes", f"at most the width of the features, {width}", self.classes)
        generator = torch.Generator().manual_seed(self.seed)
        draws = [torch.randn(width, self.classes, generator=generator) for _ in range(self.index + 1)]
        basis_DC, _ = torch.linalg.qr(draws[-1])
        return CosineHead(basis_DC.T.contiguous(), self.scale)


@dataclass(frozen=True)
class ClipText(Choice):
    """Zero-shot class vectors of a CLIP model: its text embeddings of every class name in every template.

    `source` (folder or hub id) gives the text tower, the projections and the logit scale, all frozen; fine-tuning
    and merging touch the vision tower alone. Templates have one `{}` for the class name. `classes`: the names in the
    order of the labels, or `from_data`: those that the data set gives its labels.
    """

    name: Literal["clip_text"] = "clip_text"
    version: Literal[1] = 1
    source: str = "openai/clip-vit-base-patch32"
    revision: str | None = None
    classes: tuple[str, ...] | Literal["from_data"] = ()
    templates: tuple[str, ...] = ("a photo of a {}.",)

    def __post_init__(self) -> None:
        enough = self.classes == "from_data" or len(self.classes) > 1
        require(enough, "classes", "at least 2 names, or from_data", list(self.classes))
        good = bool(self.templates) and all(one.count("{}") == 1 for one in self.templates)
        require(good, "templates", "one or more texts with one {} each", list(self.templates))

    def count(self, names: ClassNames = None) -> int:
        return len(self.names(names))

    def build(
        self, width: int, names: ClassNames = None, embed: Embed | None = None, means: Means | None = None
    ) -> CosineHead:
        from transformers import AutoTokenizer, CLIPModel

        folder = locate(Checkpoint(source=self.source, revision=self.revision))
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            with PROCESS_STATE:
                clip: Any = CLIPModel.from_pretrained(folder, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise InvalidInput(
                f"{self.source!r} has no whole CLIP model in safetensors with its tokenizer: {error}",
                remedy="Check source and revision; on the hub, revision refs/pr/<number> may have safetensors",
            ) from error
        if clip.visual_projection.in_features != width:
            expected = f"features of width {clip.visual_projection.in_features}"
            raise Mismatch(f"vision tower for the head of {self.source!r}", expected=expected, found=width)
        vectors = []
        with torch.inference_mode():
            for name in self.names(names):
                tokens = tokenizer([one.format(name) for one in self.templates], padding=True, return_tensors="pt")
                pooled = clip.text_model(**tokens).pooler_output
                views_TD = functional.normalize(clip.text_projection(pooled), dim=-1)
                vectors.append(functional.normalize(views_TD.mean(dim=0), dim=-1))
        weight_CD = torch.stack(vectors).clone()
        return CosineHead(weight_CD, clip.logit_scale.exp().item(), clip.visual_projection)

    def names(self, given: ClassNames) -> tuple[str, ...]:
        if self.classes != "from_data":
            return self.classes
        if given is None:
            raise InvalidInput(
                "head.classes is from_data, but the data gives its labels no names",
                remedy="List the class names in head.classes, in the order of the labels",
            )
        return given


@dataclass(frozen=True)
class LabelText(Choice):
    """Zero-shot class vectors of a text encoder: the base's own features of the names of the classes.

    Every task's head is made by the same base, so backbones that were tuned apart still fit all heads when they are
    merged. `template` has one `{}` for the name of a class; `scale` multiplies the cosines.
    """

    name: Literal["label_text"] = "label_text"
    version: Literal[1] = 1
    template: str = "{}"
    scale: float = 20.0

    def __post_init__(self) -> None:
        require(self.template.count("{}") == 1, "template", "a text with one {}", self.template)
        require(self.scale > 0, "scale", "positive", self.scale)

    def count(self, names: ClassNames = None) -> int:
        return len(self._known(names))

    def build(
        self, width: int, names: ClassNames = None, embed: Embed | None = None, means: Means | None = None
    ) -> CosineHead:
        if embed is None:
            raise InvalidInput(
                "a head of label texts needs a base that reads texts", remedy="Take head clip_text for images"
            )
        texts = [self.template.format(name) for name in self._known(names)]
        return CosineHead(functional.normalize(embed(texts), dim=-1), self.scale)

    def _known(self, names: ClassNames) -> tuple[str, ...]:
        if names is None or len(names) < 2:
            raise InvalidInput(
                "a head of label texts needs the names of two classes or more, and the data give none",
                remedy="List them in order in the suite's labels",
            )
        return names


@dataclass(frozen=True)
class ClassMeans(Choice):
    """The means of the base's own features of the train split's classes: what the base can do before it is tuned.

    With it a suite measures how much of the base's ability a merged model has kept.
    """

    name: Literal["class_means"] = "class_means"
    version: Literal[1] = 1
    classes: int = 10
    scale: float = 10.0

    def __post_init__(self) -> None:
        require(self.classes > 1, "classes", "at least 2", self.classes)
        require(self.scale > 0, "scale", "positive", self.scale)

    def count(self, names: ClassNames = None) -> int:
        return self.classes

    def build(
        self, width: int, names: ClassNames = None, embed: Embed | None = None, means: Means | None = None
    ) -> CosineHead:
        if means is None:
            raise InvalidInput("a head of class means needs a suite that classifies", remedy="Take another head")
        return CosineHead(means(self.classes), self.scale)


AnyHead = Annotated[Orthonormal | ClipText | LabelText | ClassMeans, BY_NAME]
