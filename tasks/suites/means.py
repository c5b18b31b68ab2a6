"""Means: what a base already tells apart, as a head: the mean of its own features of every class.

Scored with such a head, a base shows its own ability, and a merged model how much of it is left.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from storage.errors import InvalidInput


def class_means(features: Iterable[Tensor], label_N: Tensor, classes: int) -> Tensor:
    """Unit vectors [classes, D]: the directions of the mean of the normalised features of each class.

    `features` [B, D] come in batches, in the order of their labels.

    Raises InvalidInput for a class that no row has.
    """
    means_CD: Tensor | None = None
    seen_C = torch.zeros(classes)
    done = 0
    for one in features:
        labels_B = label_N[done : done + len(one)]
        done += len(one)
        feature_BD = functional.normalize(one.float(), dim=-1)
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
