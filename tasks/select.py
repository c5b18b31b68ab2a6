"""Order statistics of tensors, alone or in streams too large to hold.

A k-th magnitude is found between two values of a sample: one pass draws the sample, the next one counts what is below
the two and collects what is between them, and the answer is among those few. What a sample promises is checked by the
counts; where it was wrong (or a few values make up the whole stream in a way that it does not show) digits are counted
instead, which takes two more passes over float32 and four over float64. The result is exact in every case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Stream = Callable[[], Iterable[Tensor]]  # called once per pass
Rank = int | Callable[[int], int]  # a rank, or a function that gives it from the number of elements

_DIGIT = 16
_PIECE = 1 << 16  # elements that stay in a core's cache while they are compared and counted
_SAMPLE = 1 << 16  # streams of up to twice as many elements are held, not sampled
_SIGMAS = 4  # half the width of a bracket, in standard deviations of the sample's rank


def kth_magnitude(stream: Stream, k: Rank) -> float:
    """The k-th smallest (from 1) of |x| over all elements of the stream, exactly, as `torch.kthvalue` would give it.

    k = 0 stands for a bound below all of them, 0.0. As a function, k is called with the number of elements, which
    saves the pass that would count them. Tensors are float32 or float64, without NaN. Where both dtypes occur, all are
    compared as float64, which changes no value. Raises ValueError if k is beyond the number of elements.
    """
    return ranked(stream, k).value


class Ranked(NamedTuple):
    """A magnitude, and how many elements are smaller and how many equal to it, if that came out by the way."""

    value: float
    smaller: int | None = None
    equal: int | None = None


def ranked(stream: Stream, k: Rank) -> Ranked:
    """`kth_magnitude`, and what else was found out."""
    sample = _Sample()
    for tensor in stream():
        sample.add(tensor)
    rank = k(sample.seen) if callable(k) else k
    if not 0 <= rank <= sample.seen:
        raise ValueError(f"k must be in 0..{sample.seen}, found {rank}")
    if rank == 0:
        return Ranked(0.0)
    if sample.complete:
        return _among(sample.values, rank, 0)
    found = _between(stream, rank, sample.bracket(rank), sample.dtype)
    return Ranked(_by_digits(stream, rank)) if found is None else found


def _among(magnitudes: Tensor, k: int, smaller: int) -> Ranked:
    """The k-th of these, which `smaller` elements are below."""
    value = float(torch.kthvalue(magnitudes, k).values)
    below, equal = (int(torch.count_nonzero(one)) for one in (magnitudes < value, magnitudes == value))
    return Ranked(value, smaller + below, equal)


def largest(tensor: Tensor, k: int) -> Tensor:
    """Which k entries have the largest magnitude: booleans of the tensor's shape, exactly k of them true.

    Of equal magnitudes the earlier entries count as larger, so that what is chosen for a smaller k is part of it.
    """
    if k >= tensor.numel():
        return torch.ones_like(tensor, dtype=torch.bool)
    if k <= 0:
        return torch.zeros_like(tensor, dtype=torch.bool)
    magnitude = tensor.abs()
    threshold = kth_magnitude(lambda: [tensor], tensor.numel() - k + 1)
    chosen = magnitude >= threshold
    if surplus := int(torch.count_nonzero(chosen)) - k:
        equal = (magnitude == threshold).flatten()
        order = equal.cumsum(0)
        chosen &= ~(equal & (order > order[-1] - surplus)).reshape(tensor.shape)
    return chosen


class _Bracket(NamedTuple):
    """`low` <= the value looked for <= `high`, if the sample is right.

    `ties` says that one of the two occurs more than once, and so may be that value itself. `room` is how many elements
    may be between them, some times what is expected.
    """

    low: float
    high: float
    ties: bool
    room: float


class _Sample:
    """Magnitudes drawn evenly from a stream of unknown length, and all of them while there are few.

    Of n elements about n^(2/3) are drawn: then drawing them and collecting what is between two of them cost alike.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.dtype = torch.float32
        self._share = 1.0
        self._drawn: list[Tensor] = []
        self._held = 0

    def add(self, tensor: Tensor) -> None:
        flat = tensor.flatten()
        self.seen += flat.numel()
        self.dtype = torch.promote_types(self.dtype, tensor.dtype)
        while self.seen * self._share > 2 * max(_SAMPLE, self.seen ** (2 / 3)):
            self._share /= 2
            self._drawn = [self.values[::2].clone()] if self._drawn else []
            self._held = sum(one.numel() for one in self._drawn)
        due = min(int(self.seen * self._share) - self._held, flat.numel())
        if due > 0:
            self._drawn.append(_spread(flat, due).abs())
            self._held += due

    @property
    def complete(self) -> bool:
        return self._share == 1

    @property
    def values(self) -> Tensor:
        """What was drawn, [held], in the widest dtype that occurred in it."""
        return torch.cat(self._drawn)

    def bracket(self, rank: int) -> _Bracket:
        """Two values of the sample around the one of this rank in the stream."""
        values = self.values
        held, part = values.numel(), rank / self.seen
        margin = _SIGMAS * math.sqrt(held * part * (1 - part)) + 2
        below, beyond = math.floor(held * part - margin), math.ceil(held * part + margin)
        low = _kth(values, below) if below >= 1 else -math.inf
        high = _kth(values, beyond) if beyond <= held else math.inf
        ties = any(int(torch.count_nonzero(values == end)) > 1 for end in (low, high))
        return _Bracket(low, high, ties, room=4 * (2 * margin / held * self.seen) + _SAMPLE)


def _spread(flat: Tensor, count: int) -> Tensor:
    """`count` different elements of `flat`, far from each other: steps of the golden section, so that no regular
    structure of rows and columns falls in step with them."""
    total = flat.numel()
    if count == total:
        return flat
    step = max(int(total * 0.6180339887498949), 1)
    while math.gcd(step, total) != 1:
        step += 1
    return flat[torch.arange(count, device=flat.device) * step % total]


def _between(stream: Stream, rank: int, bracket: _Bracket, dtype: torch.dtype) -> Ranked | None:
    """The magnitude of this rank, if it is in the bracket and what is between its ends fits in the room; else None."""
    low, high, ties, room = bracket
    up_to_low = at_low = at_high = held = 0
    inside: Tensor | None = None  # one block of memory: many small ones among the pieces would scatter these
    for piece in _pieces(stream()):
        magnitude = piece.to(dtype).abs()
        if inside is None:
            inside = torch.empty(int(room) + 1, dtype=dtype, device=piece.device)
        above, between = _split(magnitude, low, high)
        up_to_low += magnitude.numel() - above
        if ties:
            at_low += count_equal(magnitude, low)
            at_high += count_equal(magnitude, high)
        if held + between.numel() > room:
            return None
        inside[held : held + between.numel()] = between
        held += between.numel()
    place = rank - (up_to_low - at_low)
    if place < 1:
        return None
    if place <= at_low:  # so it was counted
        return Ranked(low, up_to_low - at_low, at_low)
    place -= at_low
    if inside is not None and place <= held:
        return _among(inside[:held], place, up_to_low)
    return Ranked(high, up_to_low + held, at_high) if place - held <= at_high and low < high else None


def _split(magnitude: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """How many are above `low`, and those that are below `high` too."""
    if magnitude.device.type != "cpu":
        above = magnitude > low
        return int(torch.count_nonzero(above)), magnitude[above & (magnitude < high)]
    values = magnitude.numpy()  # its comparisons are vectorised, those of torch are not: a fifth of the time
    beyond = values > low
    count = int(np.count_nonzero(beyond))
    return count, torch.from_numpy(values[np.logical_and(beyond, values < high, out=beyond)])


def count_equal(magnitude: Tensor, value: float) -> int:
    """How many of these are exactly `value`."""
    if magnitude.device.type != "cpu":
        return int(torch.count_nonzero(magnitude == value))
    return int(np.count_nonzero(magnitude.numpy() == value))


def _pieces(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Flat pieces of all tensors; on an accelerator whole tensors, as every piece costs a call."""
    for tensor in tensors:
        flat = tensor.flatten()
        size = _PIECE if tensor.device.type == "cpu" else max(flat.numel(), 1)
        for start in range(0, flat.numel(), size):
            yield flat[start : start + size]


def _kth(magnitudes: Tensor, k: int) -> float:
    return float(torch.kthvalue(magnitudes, k).values)


def _by_digits(stream: Stream, k: int) -> float:
    """`kth_magnitude` in constant memory, whatever the values are: digit by digit, sixteen bits a pass, by counting.

    A magnitude's bits, read as an integer, sort like the magnitude itself.
    """
    width, prefix, below = 0, 0, 0
    dtype: torch.dtype | None = None
    while True:
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        bits = _DIGIT
        for tensor in stream():
            dtype = dtype or tensor.dtype
            if tensor.dtype != dtype:
                return _by_digits(lambda: (one.double() for one in stream()), k)
            view = torch.int64 if tensor.dtype == torch.float64 else torch.int32
            bits = 64 if tensor.dtype == torch.float64 else 32
            magnitude = tensor.abs().flatten().view(view)
            if width:
                magnitude = magnitude[(magnitude >> (bits - width)) == prefix]
            digit = (magnitude >> (bits - width - _DIGIT)) & ((1 << _DIGIT) - 1)
            counts += torch.bincount(digit, minlength=1 << _DIGIT).cpu()
        cumulative = counts.cumsum(0)
        found = int(torch.searchsorted(cumulative, torch.tensor(k - below)))
        below += int(cumulative[found - 1]) if found else 0
        prefix, width = (prefix << _DIGIT) | found, width + _DIGIT
        if width == bits:
            whole = torch.tensor(prefix, dtype=torch.int64 if bits == 64 else torch.int32)
            return float(whole.view(torch.float64 if bits == 64 else torch.float32))
