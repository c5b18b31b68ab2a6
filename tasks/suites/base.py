"""What a suite is: data and a measure. Opened for a base model it becomes a problem, which trains and scores models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from storage.artifacts import Artifact
from tasks.data import Rows, Split

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Score:
    """One number about one model: `accuracy` 0.91 over 719 `samples`, 0.89 to 0.93 at 95 %. Shares are in [0, 1].

    `outcomes`, of the score that leads: what each sample gave, in the order of the rows. Their mean is `value`, so two
    models that saw the same rows can be compared row by row.
    """

    metric: str
    value: float
    samples: int
    low: float
    high: float
    outcomes: tuple[float, ...] = ()


@runtime_checkable
class Answering(Protocol):
    """What answering by a suite's head needs, of inputs without labels."""

    @property
    def label_names(self) -> Sequence[str]:
        """Of the logits, in order; their numbers if they have none."""
        ...

    def read(self, inputs: Sequence[Any]) -> Batch:
        """A batch of inputs as rows of the data have them. Raises InvalidInput for what is none."""
        ...

    def wrap(self, backbone: PreTrainedModel) -> nn.Module: ...


class Trainable(Protocol):
    """What training needs: rows, batches of them, and a module with a loss."""

    def rows(self, split: Split) -> Rows: ...

    def collate(self, rows: list[dict[str, Any]]) -> Batch: ...

    def wrap(self, backbone: PreTrainedModel) -> nn.Module:
        """A module whose forward(**batch) gives {"loss": scalar, "logits": ...}; its head is frozen."""
        ...

    def counted(self, batch: Batch) -> int | None:
        """How many the loss of a batch is the mean of; None if it compares the rows with each other, so that the loss
        of a batch is not made of those of its parts."""
        ...


class Problem(Trainable, Protocol):
    """A suite opened for one base model, whose tokenizer or processor turns rows into batches."""

    def check(self, rows: Rows, split: Split) -> dict[str, int]:
        """Look at every row that a training will read. Raises InvalidInput for the first that cannot be.

        Gives numbers that are worth keeping: `examples`, and `cut`, how many of them are too long and lose a part.
        """
        ...

    def score(
        self,
        backbone: PreTrainedModel,
        device: str,
        report: Callable[[int, int], None],
        split: Split = "test",
        limit: int | None = None,
    ) -> list[Score]:
        """Measure on a split, or on its first `limit` rows. The first score leads the tables, and higher is better."""
        ...


def first(rows: Rows, limit: int | None) -> Rows:
    """The first `limit` rows. Data sets of the hub give columns for a slice, so rows are taken one by one."""
    return rows if limit is None or limit >= len(rows) else [rows[number] for number in range(limit)]


def batches(rows: Rows, size: int, collate: Callable[[list[dict[str, Any]]], Batch]) -> Iterator[Batch]:
    """Batches in order. The loader has a generator of its own: see tasks/exclusive.py."""
    examples: Any = rows
    loader = DataLoader(examples, batch_size=size, collate_fn=collate, generator=torch.Generator())
    yield from loader


class Suite(Protocol):
    @property
    def name(self) -> str: ...

    def spec(self) -> dict[str, Any]: ...

    def fingerprint(self) -> str: ...

    def open(self, base: Artifact) -> Problem: ...
