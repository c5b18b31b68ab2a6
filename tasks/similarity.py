"""Similarity: how updates of one base lie to each other, before they are merged: cosines and sign conflicts.

Updates that share a direction reinforce each other when they are merged, those of opposite signs wear each other down
(TIES, arXiv 2306.01708, section 3). One tensor of all updates is read at a time; what `ternary` wrote stays packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.artifacts import Artifact, ArtifactStore
from storage.errors import InvalidInput, Mismatch
from storage.manifest import TensorRecord
from storage.refs import UpdateRef, short
from tasks.extract import HEAD
from tasks.packed import PIECE, Planes, is_packed, overlap, planes_of, scaled, signs_of
from tasks.parallel import Budget, Report, in_order
from tasks.tensors import check_base, check_finite, read_delta

Square = NDArray[np.float64]  # [updates, updates], symmetrical
Counts = NDArray[np.int64]  # the same, of integers


@dataclass(frozen=True, eq=False)
class Similarity:
    """
    cosines:   [updates, updates], symmetrical; the diagonal is 1. An update of zeros has no direction: 0 to all others
    conflicts: [updates, updates], symmetrical: of the numbers that both change, the share that they change in opposite
               directions. Half of them is what unrelated updates have; 0 where no number is changed by both
    norms:     [updates], L2
    changed:   [updates], share of the numbers that an update changes
    numbers:   how many numbers an update has
    tensors:   in how many tensors
    packed:    of the pairs of tensors, the share that was compared on planes of bits alone
    """

    cosines: Square
    conflicts: Square
    norms: NDArray[np.float64]
    changed: NDArray[np.float64]
    numbers: int
    tensors: int
    packed: float


class _Sums(NamedTuple):
    """Of one tensor, or of all: dot products, numbers changed by both, those with opposite signs, pairs on planes."""

    dots: Square
    both: Counts
    opposed: Counts
    packed: int


class _Held(NamedTuple):
    """A tensor of one update: as planes, or as the planes of its signs and its values."""

    planes: Planes
    values: NDArray[Any] | None = None

    def piece(self, start: int, stop: int) -> NDArray[Any]:
        if self.values is not None:
            return self.values[start:stop]
        return self.planes.signs(start, stop) * np.float64(self.planes.scale)


def similarity(
    updates: Sequence[UpdateRef],
    store: ArtifactStore,
    budget: Budget | None = None,
    report: Report | None = None,
) -> Similarity:
    """Compare every pair of `updates`; heads, which are never merged, are left out. All sums are in float64.

    Raises Mismatch if they are of different bases or have other tensors, InvalidInput if there are fewer than two or
    numbers that are not finite.
    """
    if len(updates) < 2:
        raise InvalidInput(f"similarity is between two updates or more, found {len(updates)}")
    artifacts = [store.open(ref, "update") for ref in updates]
    records = _matched(artifacts)
    size = len(artifacts)
    dots, packed = np.zeros((size, size)), 0
    both, opposed = (np.zeros((size, size), dtype=np.int64) for _ in range(2))
    for found in in_order(
        [record.name for record in records],
        partial(_compared, artifacts),
        partial(_cost, artifacts),
        budget or Budget(),
        report,
    ):
        dots += found.dots
        both += found.both
        opposed += found.opposed
        packed += found.packed
    numbers = sum(record.elements for record in records)
    pairs = len(records) * size * (size - 1) // 2
    return Similarity(
        _cosines(dots),
        np.divide(opposed, both, out=np.zeros_like(dots), where=both > 0),
        np.sqrt(dots.diagonal()),
        both.diagonal() / max(numbers, 1),
        numbers,
        len(records),
        packed / pairs if pairs else 0.0,
    )


def _matched(artifacts: Sequence[Artifact]) -> list[TensorRecord]:
    """The records to be compared, those of the first update; the others must have the same base, names and shapes."""
    first = artifacts[0]
    base = first.manifest.lineage.inputs.get("base")
    if base is None:
        raise InvalidInput(f"{short(first.ref)} does not say which base it was taken from")
    records = _records(first)
    shapes = {record.name: record.shape for record in records}
    for other in artifacts[1:]:
        check_base(other, base, role=f"update (beside {short(first.ref)})")
        found = {record.name: record.shape for record in _records(other)}
        odd = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        if odd:
            expected, its = (list(one[odd[0]]) if odd[0] in one else "no such tensor" for one in (shapes, found))
            raise Mismatch(
                f"tensor {odd[0]!r} of {short(other.ref)}, one of {len(odd)}",
                expected=f"{expected} as in {short(first.ref)}",
                found=its,
                remedy="Compare updates of the same parameters of one base",
            )
    return records


def _records(artifact: Artifact) -> list[TensorRecord]:
    return [record for record in artifact.manifest.tensors if not record.role.startswith(HEAD)]


def _cost(artifacts: Sequence[Artifact], name: str) -> float:
    """Bytes: the planes of all, the values of those that are no planes, and reading one of them."""
    records = [artifact.record(name) for artifact in artifacts]
    dense = sum(not is_packed(record) for record in records)
    return records[0].elements * (len(records) / 4 + 4 * dense + (16 if dense else 2))


def _read(artifact: Artifact, name: str) -> _Held:
    record = artifact.record(name)
    if is_packed(record):
        return _Held(planes_of(artifact.parts(name), record.shape))
    delta = read_delta(artifact, name)
    check_finite(delta, name, short(artifact.ref))
    flat = delta.detach().reshape(-1)
    return _Held(signs_of(flat), flat.numpy())


def _compared(artifacts: Sequence[Artifact], name: str) -> _Sums:
    """All pairs of one tensor."""
    held = [_read(artifact, name) for artifact in artifacts]
    size = len(held)
    dots = _products(held)
    both, opposed = (np.zeros((size, size), dtype=np.int64) for _ in range(2))
    packed = 0
    for row, one in enumerate(held):
        for column, other in enumerate(held[: row + 1]):
            found = overlap(one.planes, other.planes)
            both[row, column] = both[column, row] = found.both
            opposed[row, column] = opposed[column, row] = found.oppose
            if one.values is None and other.values is None:
                dots[row, column] = scaled(one.planes, other.planes, found)
                packed += row != column
            dots[column, row] = dots[row, column]
    return _Sums(dots, both, opposed, packed)


def _products(held: Sequence[_Held]) -> Square:
    """Dot products of all pairs, piece by piece in float64; zeros if all are planes, which need no products."""
    found = np.zeros((len(held), len(held)))
    if all(one.values is None for one in held):
        return found
    elements = held[0].planes.elements
    for start in range(0, elements, PIECE):
        rows = np.stack([one.piece(start, min(start + PIECE, elements)) for one in held]).astype(np.float64, copy=False)
        found += rows @ rows.T
    return found


def _cosines(dots: Square) -> Square:
    squares = dots.diagonal()
    # a root of the product and not a product of roots: so updates that are equal have exactly 1
    scale = np.sqrt(np.outer(squares, squares))
    found = np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0).clip(-1, 1)
    np.fill_diagonal(found, 1.0)
    return found
