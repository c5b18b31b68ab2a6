"""OSF, sculpting subspaces (arXiv 2504.07097), by peft: the leading singular directions of each weight stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tasks.choice import require
from tasks.tuners.adapter import Adapter
from tasks.tuners.targets import Layer, narrow


@dataclass(frozen=True, kw_only=True)
class Osf(Adapter):
    """W = U S V^T: the leading share `keep` of the singular triples stays, the others learn.

    What a model knows is in the directions that stay, so it forgets less when it is tuned again and again. Gradients
    are orthogonal to those directions; AdamW turns the steps a little, so that about a tenth of the change's norm is
    along them. The change has rank 2 (1 - keep) min(m, n) at most. Needs the memory of full fine-tuning and of U and V,
    and an SVD of every target before the first step, on the CPU.
    """

    source: ClassVar[str] = "arXiv 2504.07097"
    trains: ClassVar[str] = "the minor singular triples of linear layers"

    name: Literal["osf"] = "osf"
    version: Literal[1] = 1
    learning_rate: float = 3e-3
    keep: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.keep < 1, "keep", "in (0, 1)", self.keep)

    def check(self, layers: list[Layer]) -> None:
        least = narrow(layers)
        what = f"at least 1 / {least.side}, a direction of {least.path} [{least.rows}, {least.columns}]"
        require(int(least.side * self.keep) > 0, "keep", what, self.keep)

    def config(self, targets: str) -> Any:
        from peft import OSFConfig

        return OSFConfig(effective_rank=self.keep, target_modules=targets)
