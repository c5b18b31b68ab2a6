"""Singular value decompositions for mergers: thin ones only, by the cheapest way that is exact enough."""

from __future__ import annotations

import torch
from torch import Tensor


def thin_svd(matrix_RC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [R, K], s [K] in descending order, Vh [K, C] with K = min(R, C), in the dtype of `matrix_RC`."""
    U_RK, s_K, Vh_KC = torch.linalg.svd(matrix_RC, full_matrices=False)
    return U_RK, s_K, Vh_KC
