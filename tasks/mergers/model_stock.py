"""Model Stock (arXiv 2403.19522): how far to go from the base towards the mean, read from the angles between updates.

Tuned models lie on a sphere around a better point. With N of them and the mean cosine c between their updates, the
point nearest to it on their plane is the base plus t times the mean update, per tensor:
    t = N c / (1 + (N - 1) c)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from storage.errors import InvalidInput
from tasks.mergers.base import Joint, Target
from tasks.mergers.vectors import gram, in_fixed_order, mixture
from tasks.packed import Planes, added, dot, total

_LEAST = 1e-6  # mergekit's lower bound for the product of two norms


@dataclass(frozen=True)
class ModelStock(Joint):
    """t = 1 keeps the mean of equal updates, t = 0 (orthogonal ones) keeps the base. One update stays as it is.

    The paper has two models, tuned on one task, and merges them again and again while they are tuned; its figures are
    of that. Updates of different tasks are nearly orthogonal, so that little of them is left: a scaling such as
    `match_norm` gives the size back.

    variant
        fixed     A tensor's updates of all zeros are left out: they have no angle, and N is the number of the others.
                  c below 0 counts as 0. The formula would turn the mean around, and has a pole at -1 / (N - 1): a
                  scalar that two tasks move in opposite ways (c = -1) would become infinite.
        mergekit  mergekit 0.1.4: updates of zeros count with cosine 0, c may be negative, and the product of two norms
                  counts as 1e-6 at least, which shrinks the cosines of small updates. At the pole it is an error.
    """

    source: ClassVar[str] = "arXiv 2403.19522"

    name: Literal["model_stock"] = "model_stock"
    version: Literal[1] = 1
    variant: Literal["fixed", "mergekit"] = "fixed"

    def combine(self, base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], target: Target) -> Tensor:
        if len(deltas) == 1:
            return deltas[0]
        deltas, _ = in_fixed_order(deltas, weights)
        return mixture(deltas, [self._share(gram(deltas), target)] * len(deltas))

    def combine_planes(self, deltas: Sequence[Planes], weights: Sequence[float], target: Target) -> Tensor | None:
        if len(deltas) == 1:
            return added(None, deltas[0])
        products = [[dot(one, other) for other in deltas] for one in deltas]
        share = self._share(torch.tensor(products, dtype=torch.float64), target)
        return total(deltas, [share] * len(deltas))

    def workspace(self, updates: int) -> float:
        """The deltas, and at most three tensors in float64."""
        return updates + 7

    def _share(self, gram_KK: Tensor, target: Target) -> float:
        """What every update counts: t / N. 0 if all of them are zeros."""
        norm_K = gram_KK.diagonal().sqrt()
        if self.variant == "fixed":
            live_K = norm_K > 0
            gram_KK, norm_K = gram_KK[live_K][:, live_K], norm_K[live_K]
        count = len(norm_K)
        return self._ratio(gram_KK, norm_K, target) / count if count else 0.0

    def _ratio(self, gram_KK: Tensor, norm_K: Tensor, target: Target) -> float:
        """t of the N updates that count."""
        count = len(norm_K)
        if count == 1:
            return 1.0
        product_KK = torch.outer(norm_K, norm_K)
        if self.variant == "mergekit":
            product_KK = product_KK.clamp(min=_LEAST)
        cosine_KK = (gram_KK / product_KK).clamp(-1, 1)
        mean = float(cosine_KK.triu(diagonal=1).sum()) / (count * (count - 1) / 2)
        if self.variant == "fixed":
            mean = max(mean, 0.0)
        below = 1 + (count - 1) * mean
        if below < 1e-9:
            raise InvalidInput(
                f"tensor {target.name!r}: expected a mean cosine above -1 / {count - 1} between its {count} updates, "
                f"found {mean:.6f}, where the ratio of Model Stock has a pole",
                remedy="Take variant `fixed`, which keeps the base where the updates cancel out",
            )
        return count * mean / below
