"""What a scaling is: a factor for every tensor of the merged delta, applied when the model is written.

It composes with any merger. While updates are folded, `share` and `close` gather what is needed to know of them; when
the model is written, one pass `measure`s the merged delta, and a second one writes it times `factor`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from tasks.mergers.base import Facts, Sums


class Scaling(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def needs_total(self) -> bool:
        """Whether `share` needs the sum of all updates, each times its weight.

        The state of a sequential merger then keeps it. That of a joint one is a list: the sum is added up when the
        model is written, and what `share` says of it, added over the tensors, joins the facts that `close` gave.
        """
        ...

    def share(self, delta: Tensor, total: Tensor | None) -> Sums:
        """One tensor's share of what `close` needs: of this update, and of the sum of all updates so far."""
        ...

    def close(self, facts: Facts, sums: Sums, weight: float = 1.0) -> Facts:
        """The scaling's facts after one more update, from its facts before, the sums over all tensors, and how much
        the update counts."""
        ...

    def measure(self, merged: Tensor) -> Sums:
        """One tensor's share of the numbers that `factors` needs of the whole merged delta; empty if it needs none."""
        ...

    def factors(self, names: Sequence[str], count: float, facts: Facts, measured: Sums) -> Mapping[str, float]:
        """The factor of every tensor. `count` is the number of updates, `facts` come from `close`, `measured` from
        the sums of `measure`."""
        ...
