"""What mergers share that give a matrix new singular directions: which tensors they treat, and how they whiten.

A direction that the data do not determine, such as a singular vector that belongs to a singular value of zero, comes
out of a decomposition as an arbitrary one. Nothing here lets such a direction into a result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tasks.kinds import is_expert_stack
from tasks.mergers.base import Target
from tasks.spectrum import thin_svd

Project = Literal["matrices", "linear"]
Level = Literal["rms", "mean"]


def is_projected(tensor: Tensor, target: Target, project: Project) -> bool:
    """Whether `tensor` is treated as a matrix, or as a stack of them. An empty one is not: it has no directions."""
    if not tensor.numel():
        return False
    wanted = project == "matrices" or target.role == "linear.weight"
    return (tensor.ndim == 2 and wanted) or is_expert_stack(target.name, target.role, tensor.ndim)


def by_matrix(work: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`work` on the matrices [R, C] that `tensors` are, or on those that they are stacks of, [E, R, C], one by one."""
    if tensors[0].ndim == 2:
        return work(*tensors)
    return torch.stack([work(*matrices) for matrices in zip(*tensors, strict=True)])


def leading_triplets(matrix_RC: Tensor, count: int, size: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` singular triplets U [R, N], s [N], Vh [N, C]; those that are numerically null are zeros.

    `size` is what numerically null is measured against, by default the largest singular value: a remainder that is
    all rounding error has to be compared with what it remained from.
    """
    U_RK, s_K, Vh_KC = thin_svd(matrix_RC)
    kept_N = s_K[:count] > rounding(matrix_RC) * (s_K[0] if size is None else size)
    # contiguous, as they come back from a file: how a tensor lies in memory may turn the last bits of what follows
    return (U_RK[:, :count] * kept_N).contiguous(), s_K[:count] * kept_N, (Vh_KC[:count] * kept_N[:, None]).contiguous()


def level_of(s_K: Tensor, level: Level) -> Tensor:
    """The one value that stands for all singular values."""
    return s_K.mean() if level == "mean" else torch.linalg.vector_norm(s_K) / math.sqrt(s_K.numel())


def rounding(matrix_RC: Tensor) -> float:
    """Singular values below this share of the largest one are rounding errors.

    Those of rank-deficient matrices come out at 1 to 5 eps, in float32 and float64, for 8 to 1,500 rows. The usual
    max(R, C) * eps would take real directions for errors: at 4,096 rows in float32 all below 1 / 2,000 of the largest.
    """
    return float(4 * math.sqrt(max(matrix_RC.shape)) * torch.finfo(matrix_RC.dtype).eps)


def whiten(frame_RC: Tensor) -> Tensor:
    """The nearest matrix [R, C] with orthonormal rows or columns: P Q of frame = P diag(s) Q (orthogonal Procrustes).

    Where the frame is rank-deficient, P and Q are taken on its range: zero rows and columns stay zero and change
    nothing else, and of k equal columns each becomes 1 / sqrt(k) of their common direction.
    """
    rows_R, columns_C = frame_RC.any(1), frame_RC.any(0)
    if not (rows_R.all() and columns_C.all()):  # decomposing them is the longer way, and on a GPU by far
        whitened_RC = torch.zeros_like(frame_RC)
        if rows_R.any():
            inside_RC = rows_R[:, None] & columns_C
            whitened_RC[inside_RC] = whiten(frame_RC[rows_R][:, columns_C]).flatten()
        return whitened_RC
    P_RK, _, Q_KC = leading_triplets(frame_RC, min(frame_RC.shape))
    return P_RK @ Q_KC
