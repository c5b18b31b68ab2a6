"""Turned: the same product of two factors, written so that the entries of both matter alike.

B A is also (B M)(M^-1 A) for any invertible M, and training leaves the factors of LoRA in odd shape: A starts random
and large, B at zero. A codec that keeps the largest entries of both would keep those of A alone, whose product with
what is left of B is nothing. Turned to the singular vectors of the product, each times the root of its value, they are
alike.
"""

from __future__ import annotations

import torch
from torch import Tensor


def turned(left_MR: Tensor, right_RN: Tensor) -> tuple[Tensor, Tensor]:
    """U sqrt(S) [m, r] and sqrt(S) V' [r, n] of their product, with r columns as before, in their dtype.

    Costs two QR decompositions of the factors and an SVD of [r, r]: the product itself is never made. Where r is more
    than a side, they are returned as they are.
    """
    if left_MR.shape[1] > min(left_MR.shape[0], right_RN.shape[1]):
        return left_MR, right_RN
    left_Q, left_R = torch.linalg.qr(left_MR)
    right_Q, right_R = torch.linalg.qr(right_RN.T)
    U, s, Vh = torch.linalg.svd(left_R @ right_R.T)
    left_U, right_V = left_Q @ U, right_Q @ Vh.T
    signs_R = torch.where(left_U.sum(0) < 0, -1.0, 1.0).to(s)  # of the two signs of a pair always the same
    root_R = signs_R * s.sqrt()
    return left_U * root_R, root_R[:, None] * right_V.T
