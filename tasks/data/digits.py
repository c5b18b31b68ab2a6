"""Digits: 1,797 real scans of handwritten digits (8 x 8), which come with scikit-learn, seen in seven ways.

Each view is a fixed rearrangement of the pixels and one task of the demo: easy alone, and in conflict with the others
when the tuned models are merged.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tasks.choice import Choice, require
from tasks.data.base import Rows, Split
from tasks.data.held_out import part, require_share, spec_without_holdout

View = Literal["id", "rot90", "rot180", "transpose", "invert", "roll", "permute", "mixed"]
VIEWS: tuple[View, ...] = ("id", "rot90", "rot180", "transpose", "invert", "roll", "permute")
_TEST_SHARE = 0.4


@dataclass(frozen=True)
class Digits(Choice):
    """`view`: how the pixels are shown; `mixed` shows every scan in all seven. `seed`: of the stratified split.

    Rows have `pixel_values` [1, 8, 8] in [-1, 1] and `label` 0..9. `limit` keeps only the first examples of a split.
    `holdout`: the share of the scans to train on that is the validation split instead, whatever the view.
    """

    name: Literal["digits"] = "digits"
    version: Literal[1] = 1
    view: View = "id"
    seed: int = 0
    limit: int | None = None
    holdout: float = 0.0

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit > 0, "limit", "positive", self.limit)
        require_share(self.holdout)

    def spec(self) -> dict[str, Any]:
        return spec_without_holdout(super().spec())

    def fingerprint(self) -> str:
        images, labels = _split(self.seed, "train")
        return hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()

    def rows(self, split: Split) -> Rows:
        images, labels = _split(self.seed, "test" if split == "test" else "train")
        if split == "validation" or (split == "train" and self.holdout):
            chosen = part((image.numpy().tobytes() for image in images), split, self.holdout, ["test"])
            images, labels = images[chosen], labels[chosen]
        images, labels = images[: self.limit], labels[: self.limit]
        shown = _show(images, self.view).unsqueeze(1)
        targets = labels.repeat(len(shown) // len(labels)).tolist()
        rows: list[dict[str, Any]] = [
            {"pixel_values": image, "label": label} for image, label in zip(shown, targets, strict=True)
        ]
        return rows

    def class_names(self, column: str) -> tuple[str, ...] | None:
        return None


@cache
def _split(seed: int, split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = (bunch.images / 8 - 1).astype(np.float32)
    parts = train_test_split(images, bunch.target, test_size=_TEST_SHARE, stratify=bunch.target, random_state=seed)
    which = 0 if split == "train" else 1
    return torch.from_numpy(parts[which]), torch.from_numpy(parts[2 + which])


def _show(images_BHW: Tensor, view: View) -> Tensor:
    match view:
        case "id":
            return images_BHW
        case "rot90":
            return images_BHW.rot90(1, (1, 2))
        case "rot180":
            return images_BHW.rot90(2, (1, 2))
        case "transpose":
            return images_BHW.transpose(1, 2)
        case "invert":
            return -images_BHW
        case "roll":
            return images_BHW.roll((4, 4), (1, 2))
        case "permute":
            order = np.random.RandomState(123).permutation(64)
            return images_BHW.flatten(1)[:, torch.from_numpy(order)].reshape(images_BHW.shape)
        case "mixed":
            return torch.cat([_show(images_BHW, one) for one in VIEWS])
