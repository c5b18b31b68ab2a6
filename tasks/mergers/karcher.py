"""Karcher mean: the point of the sphere with the least squared distance along arcs to all models, tensor by tensor.

The weights w_j = base + tau_j of a tensor are directions u_j = w_j / |w_j| and lengths. The mean direction u is found
by steps along the mean tangent, u <- cos|T| u + sin|T| T / |T| with T = sum of a_j (angle / sin angle) (u_j - cos u),
and gets the mean length sum of a_j |w_j|. All u that can occur are mixtures of the u_j, so everything happens in their
K coefficients, with the K x K inner products of the u_j: two passes over the tensors, and no digit lost to float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tasks.choice import require
from tasks.mergers.base import Joint, Target
from tasks.mergers.vectors import gram, in_fixed_order, mixture

_OPPOSITE = 1e-6  # radians from 180 degrees, where no arc is the shortest


@dataclass(frozen=True)
class Karcher(Joint):
    """`iterations` and `tolerance` (radians) end the search; the values are mergekit's, and enough for tuned models.

    Weights of the updates weigh directions and lengths. For two models of equal weight it is slerp's middle, with the
    mean of their lengths. Models of one base are close, so that the result is near the weighted average; what it adds
    is the length, which averaging shortens.

    Unlike mergekit 0.1.4, which searches in float32 and in the dtype of the files: angles are in float64, small
    weights (|w| below the tolerance) are merged rather than zeroed, a model opposite to the mean moves it nowhere, and
    where the directions cancel out, or all models are zero, the updates are averaged instead of one being picked.
    """

    source: ClassVar[str] = "Karcher 1977, mergekit"
    weighted: ClassVar[bool] = True

    name: Literal["karcher"] = "karcher"
    version: Literal[1] = 1
    iterations: int = 10
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        require(self.iterations >= 0, "iterations", "zero or more", self.iterations)
        require(self.tolerance > 0, "tolerance", "positive", self.tolerance)

    def combine(self, base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], target: Target) -> Tensor:
        if len(deltas) == 1:
            return deltas[0]
        if not any(bool(delta.any()) for delta in deltas):
            return torch.zeros_like(deltas[0])
        deltas, weights = in_fixed_order(deltas, weights)
        share_K = torch.tensor(weights, dtype=torch.float64)
        share_K /= share_K.sum()
        gram_KK = gram(deltas, onto=base)
        length_K = gram_KK.diagonal().sqrt()
        inverse_K = torch.where(length_K > 0, 1 / length_K, 0.0)
        cosine_KK = (gram_KK * torch.outer(inverse_K, inverse_K)).clamp(-1, 1)
        mean_K = self._mean(cosine_KK, share_K * (length_K > 0))
        if mean_K is None:
            return mixture(deltas, share_K.tolist())
        factor_K = (share_K @ length_K) * mean_K * inverse_K
        return mixture([*deltas, base], [*factor_K.tolist(), math.fsum(factor_K.tolist()) - 1])

    def workspace(self, updates: int) -> float:
        """The deltas, the base, and at most three tensors in float64."""
        return updates + 8

    def _mean(self, cosine_KK: Tensor, share_K: Tensor) -> Tensor | None:
        """The mean direction as coefficients of the unit vectors; None where they cancel out."""

        def length(coefficient_K: Tensor) -> float:
            return math.sqrt(max(float(coefficient_K @ cosine_KK @ coefficient_K), 0.0))

        share_K = share_K / share_K.sum().clamp(min=torch.finfo(torch.float64).tiny)
        if length(share_K) < self.tolerance:
            return None
        mean_K = share_K / length(share_K)
        for _ in range(self.iterations):
            to_mean_K = (cosine_KK @ mean_K).clamp(-1, 1)
            angle_K = torch.atan2(((1 - to_mean_K) * (1 + to_mean_K)).sqrt(), to_mean_K)
            pull_K = share_K * torch.where(angle_K > 0, angle_K / angle_K.sin(), 1.0)
            pull_K = torch.where(angle_K > math.pi - _OPPOSITE, 0.0, pull_K)
            tangent_K = pull_K - (pull_K @ to_mean_K) * mean_K
            step = length(tangent_K)
            if step < self.tolerance:
                break
            mean_K = math.cos(step) * mean_K + math.sin(step) / step * tangent_K
            mean_K = mean_K / length(mean_K)
        return mean_K
