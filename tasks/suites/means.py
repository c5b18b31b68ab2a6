"""Means: what a base already tells apart, as a head: the mean of its own features of every class.

Scored with such a head, a base shows its own ability, and a merged model how much of it is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from storage.artifacts import Artifact
from storage.errors import DeltaworksError, InvalidInput
from storage.manifest import canonical, digest
from storage.measured import Measured
from storage.refs import CheckpointRef

VERSION = 1  # of how means are made


def kept_means(base: Artifact, seen: Mapping[str, Any], classes: int, make: Callable[[], Tensor]) -> Tensor:
    """[classes, D]: the means of a base's classes as `make` gives them, made once: every model is asked with them.

    `seen`: plain values that decide them, beside the base. They are kept like scores, see storage/measured.py.
    """
    key = digest(canonical({"means": VERSION, "classes": classes, **seen}))
    kept, model = Measured(base.store.objects), CheckpointRef(base.ref)
    found: Tensor | None = None
    with suppress(DeltaworksError):
        found = _means(kept.read(model, key), classes)
    if found is None:
        found = make()
        with suppress(DeltaworksError):  # who may only read, to serve a model for instance, makes them each time
            kept.write(model, key, {"means": found.tolist()})
    return found


def _means(entry: Any, classes: int) -> Tensor | None:
    """None for what are no means of so many classes."""
    try:
        found = torch.tensor(entry["means"], dtype=torch.float32)
    except (TypeError, KeyError, ValueError, RuntimeError, OverflowError):
        return None
    return found if found.ndim == 2 and len(found) == classes and bool(found.isfinite().all()) else None


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
