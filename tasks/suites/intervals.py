"""Intervals: how far a score may be from what other samples would have given. All at 95 %, all reproducible.

Shares have Wilson's interval (Wilson 1927), which holds for few samples and near 0 and 1; everything else has the
percentiles of a bootstrap over the samples (Efron 1979), drawn by a generator of its own with a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.suites.base import Score

_Z = 1.959963984540054  # of the normal distribution, at 97.5 %
_DRAWS = 500
_AT_ONCE = 1 << 22  # indices that are drawn at once

Floats = NDArray[np.float64]
Statistic = Callable[[NDArray[np.int64]], float]  # of the samples with these indices


def share(metric: str, right: Sequence[bool]) -> Score:
    """The share of samples that were right."""
    low, high = wilson(sum(right), len(right))
    return Score(metric, sum(right) / len(right), len(right), low, high, tuple(float(one) for one in right))


def mean(metric: str, values: Sequence[float], weights: Sequence[float] | None = None) -> Score:
    """sum(values) / sum(weights): with weights, `values` are sums over so many parts of each sample.

    `samples` counts the parts.
    """
    value_N = np.asarray(values, dtype=np.float64)
    weight_N = np.ones_like(value_N) if weights is None else np.asarray(weights, dtype=np.float64)
    low, high = bootstrap(lambda index: float(value_N[index].sum() / weight_N[index].sum()), len(value_N))
    total = float(weight_N.sum())
    outcomes = tuple((value_N / weight_N.mean()).tolist())
    return Score(metric, float(value_N.sum() / total), int(total), low, high, outcomes)


def wilson(right: int, samples: int) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    centre, square = right / samples, _Z**2 / samples
    middle = (centre + square / 2) / (1 + square)
    reach = _Z / (1 + square) * math.sqrt(centre * (1 - centre) / samples + square / (4 * samples))
    return (middle - reach if right else 0.0), (middle + reach if right < samples else 1.0)


def bootstrap(statistic: Statistic, samples: int) -> tuple[float, float]:
    """The 2.5 % and 97.5 % percentiles of a statistic over draws of as many samples, with replacement."""
    generator = np.random.Generator(np.random.PCG64(0))
    rows = max(1, _AT_ONCE // samples)
    found: list[float] = []
    while len(found) < _DRAWS:
        for index in generator.integers(samples, size=(min(rows, _DRAWS - len(found)), samples)):
            found.append(statistic(index))
    low, high = np.quantile(np.asarray(found), [0.025, 0.975])
    return float(low), float(high)
