"""Accuracy: how often a classifier with a frozen head is right. What the suites of images and of texts share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from storage.errors import InvalidInput
from tasks.data import Rows
from tasks.suites.base import Batch, Score, batches


def accuracy_of(
    model: nn.Module,
    rows: Rows,
    size: int,
    collate: Callable[[list[dict[str, Any]]], Batch],
    classes: int,
    device: str,
    report: Callable[[int, int], None],
) -> list[Score]:
    """The share of `rows` whose label has the largest logit, `size` rows at a time; the model is on `device`.

    Raises InvalidInput if there are none.
    """
    accuracy = MulticlassAccuracy(classes, average="micro").to(device)
    done = 0
    for batch in batches(rows, size, collate):
        there = {name: value.to(device) for name, value in batch.items()}
        labels: torch.Tensor = there.pop("labels")
        accuracy.update(model(**there)["logits"], labels)
        done += len(labels)
        report(done, len(rows))
    if not done:
        raise InvalidInput("the split is empty: nothing can be scored", remedy="Check the path and the split names")
    return [Score("accuracy", float(accuracy.compute()), done)]
