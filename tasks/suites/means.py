"""Means: what a base already tells apart, as a head: the mean of its own features of every class.

Scored with such a head, a base shows its own ability, and a merged model how much of it is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from storage.errors import InvalidInput
from tasks.data import Rows
from tasks.suites.base import Batch, batches


def class_means(
    features: Callable[[Batch], Tensor],
    rows: Rows,
    size: int,
    collate: Callable[[list[dict[str, Any]]], Batch],
    classes: int,
) -> Tensor:
    """Unit vectors [classes, D]: the directions of the mean of the normalised `features` [B, D] of each class.

    Raises InvalidInput for a class that no row has.
    """
    means_CD: Tensor | None = None
    seen_C = torch.zeros(classes)
    for batch in batches(rows, size, collate):
        labels_B = batch.pop("labels")
        feature_BD = functional.normalize(features(batch).float(), dim=-1)
        means_CD = torch.zeros(classes, feature_BD.shape[1]) if means_CD is None else means_CD
        means_CD.index_add_(0, labels_B, feature_BD)
        seen_C += labels_B.bincount(minlength=classes)
    if means_CD is None or not bool(seen_C.all()):
        missing = "all classes" if means_CD is None else f"class {int((seen_C == 0).nonzero()[0])}"
        raise InvalidInput(
            f"a head of class means needs examples of every class; the train split has none of {missing}",
            remedy="Check head.classes and the train split, or take another head",
        )
    return functional.normalize(means_CD, dim=-1)
