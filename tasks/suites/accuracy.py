"""Accuracy: how often a classifier with a frozen head is right, and how sure it is. What the classifying suites share.

Accuracy leads; macro F1 tells of classes that are rare, the calibration error whether its confidence can be believed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.errors import InvalidInput
from tasks.suites.base import Score
from tasks.suites.intervals import bootstrap, share

_BINS = 15  # of confidence, of equal width: Guo et al. 2017

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def accuracy_of(
    logits: Iterable[Tensor], label_N: Tensor, classes: int, report: Callable[[int, int], None]
) -> list[Score]:
    """How well the largest logit is the label of each of N rows; `logits` [B, C] come in batches.

    Raises InvalidInput if there are none.
    """
    # it loads half of scipy: only for those who score
    from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_f1_score

    probabilities = []
    for logits_BC in logits:
        probabilities.append(logits_BC.float().softmax(dim=-1).cpu())
        report(sum(map(len, probabilities)), len(label_N))
    if not probabilities:
        raise InvalidInput("the split is empty: nothing can be scored", remedy="Check the path and the split names")
    probability_NC = torch.cat(probabilities)
    confidence_N, guess_N = probability_NC.max(dim=-1)
    right_N = guess_N == label_N
    count = len(label_N)
    guesses, truth = guess_N.numpy(), label_N.numpy()
    right, confidence = right_N.numpy().astype(np.float64), confidence_N.double().numpy()
    f1 = float(multiclass_f1_score(guess_N, label_N, classes, average="macro"))
    error = float(multiclass_calibration_error(probability_NC, label_N, classes, n_bins=_BINS))
    return [
        share("accuracy", right_N.tolist()),
        Score("f1_macro", f1, count, *bootstrap(lambda at: macro_f1(guesses[at], truth[at], classes), count)),
        Score("calibration_error", error, count, *bootstrap(lambda at: calibration(confidence[at], right[at]), count)),
    ]


def macro_f1(guess_N: Ints, label_N: Ints, classes: int) -> float:
    """The mean over the classes that occur of 2 TP / (2 TP + FP + FN)."""
    both_C = np.bincount(label_N[guess_N == label_N], minlength=classes)
    all_C = np.bincount(guess_N, minlength=classes) + np.bincount(label_N, minlength=classes)
    occur_C = all_C > 0
    return float((2 * both_C[occur_C] / all_C[occur_C]).mean())


def calibration(confidence_N: Floats, right_N: Floats) -> float:
    """sum over bins of (share of the samples) * |mean confidence - accuracy|."""
    bin_N = np.minimum((confidence_N * _BINS).astype(np.int64), _BINS - 1)
    off_B = np.bincount(bin_N, weights=confidence_N - right_N, minlength=_BINS)
    return float(np.abs(off_B).sum() / len(confidence_N))
