"""Order statistics of tensors and streams: exactly what torch says about all tensors held at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from tasks import select
from tasks.cuts import cut, keep
from tasks.moments import deviation, power
from tasks.select import kth_magnitude, largest


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kth_magnitude_of_several_tensors(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=dtype) for shape in [(31, 17), (), (0,), (1,), (5, 3, 2, 2)]]
    tensors.append(torch.randn(20, 30, dtype=dtype).T[::2])  # not contiguous
    expected = flat(tensors).abs().sort().values
    for k in [1, 2, 100, len(expected) // 2, len(expected) - 1, len(expected)]:
        assert kth_magnitude(lambda: tensors, k) == expected[k - 1].item()


def values(dtype: type[np.floating]) -> st.SearchStrategy[np.ndarray]:
    """Arrays with ties, both zeros, denormals, and anything else that is finite."""
    width = np.dtype(dtype).itemsize * 8
    smallest = float(np.finfo(dtype).smallest_subnormal)
    few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, smallest, -3 * smallest, float(np.finfo(dtype).max)])
    every = st.floats(allow_nan=False, allow_infinity=False, width=width)
    return arrays.arrays(dtype, st.integers(1, 60), elements=few | every)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kth_magnitude_is_kthvalue(dtype: type[np.floating]) -> None:
    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        tensors = [torch.from_numpy(one) for one in data.draw(st.lists(values(dtype), min_size=1, max_size=3))]
        joint = flat(tensors).abs()
        k = data.draw(st.integers(1, joint.numel()))
        assert kth_magnitude(lambda: tensors, k) == torch.kthvalue(joint, k).values.item()

    holds()


def test_kth_magnitude_of_mixed_dtypes() -> None:
    tensors = [torch.tensor([1.0, -4.0]), torch.tensor([2.5, 3.0], dtype=torch.float64), torch.tensor([0.5])]
    for stream in (tensors, tensors[::-1]):
        assert [kth_magnitude(lambda stream=stream: stream, k) for k in range(1, 6)] == [0.5, 1.0, 2.5, 3.0, 4.0]


@pytest.mark.parametrize("k", [-1, 4])
def test_kth_magnitude_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.3"):
        kth_magnitude(lambda: [torch.ones(2), torch.ones(1)], k)


@pytest.mark.parametrize("tensors", [[], [torch.empty(0)], [torch.ones(3)]])
def test_rank_zero_is_below_everything(tensors: list[Tensor]) -> None:
    assert kth_magnitude(lambda: tensors, 0) == 0.0
    assert kth_magnitude(lambda: tensors, lambda count: count - count) == 0.0


class Counting:
    """A stream that counts its passes."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors, self.passes = tensors, 0

    def __call__(self) -> list[Tensor]:
        self.passes += 1
        return self.tensors


def large(kind: str, dtype: torch.dtype, count: int = 400_000) -> Tensor:
    """More than is held, so that it is sampled; of values in all ways that are hard to sample."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(count, generator=generator, dtype=dtype)
    tuned = 0.02 * torch.randn(count, generator=generator, dtype=dtype)
    return {
        "normal": drawn,
        "constant": torch.full((count,), -0.3, dtype=dtype),
        "zeros": torch.zeros(count, dtype=dtype),
        "ternary": drawn.sign() * (drawn.abs() > 1.2815515655446004) * 0.01,
        "four fifths zeros": torch.where(drawn.abs() < 1.2815515655446004, 0, drawn),
        "bfloat16": (tuned + 1e-4 * drawn).bfloat16().to(dtype) - tuned.bfloat16().to(dtype),
        "sorted": drawn.sort().values,
        "heavy tails": drawn.abs() ** 15 * drawn.sign(),
        "denormal": drawn * torch.finfo(dtype).tiny,
        "period": drawn[:1024].repeat(count // 1024 + 1)[:count],
        "one of many": torch.where(torch.arange(count) == 77, 5, torch.ones((), dtype=dtype)),
    }[kind]


KINDS = ["normal", "constant", "zeros", "ternary", "four fifths zeros", "bfloat16", "sorted", "heavy tails"]
KINDS += ["denormal", "period", "one of many"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_kth_magnitude_of_a_large_tensor(kind: str, dtype: torch.dtype) -> None:
    """Exactly `torch.kthvalue`, in two passes: all of these the sample brackets."""
    tensor = large(kind, dtype)
    count, ordered = tensor.numel(), tensor.abs().sort().values
    edges = {int(share * count) + step for share in (0.1, 0.5, 0.8, 0.9, 0.999) for step in (0, 1)}
    edges |= {1, 2, count - 1, count, int((tensor == 0).sum()), int((tensor == 0).sum()) + 1}
    for k in sorted(edges & set(range(1, count + 1))):
        stream = Counting([tensor])
        assert kth_magnitude(stream, k) == ordered[k - 1].item(), k
        assert stream.passes == 2, k


def test_kth_magnitude_of_a_large_stream() -> None:
    """Many tensors of different sizes and scales, of both dtypes, one of them a view; the sample is thinned twice."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(3,), (200, 300), (), (0,), (1000, 64), (17,), (700, 600), (1,), (90, 1000)]
    tensors = [torch.randn(size, generator=generator) * 10.0 ** -(place % 4) for place, size in enumerate(sizes)]
    tensors += [torch.randn(60, 70, generator=generator, dtype=torch.float64), tensors[6].T[::2]]
    ordered = flat([one.double() for one in tensors]).abs().sort().values
    for k in [1, 1000, 200_000, len(ordered) // 2, len(ordered) - 5, len(ordered)]:
        stream = Counting(tensors)
        assert kth_magnitude(stream, lambda count, k=k: k + 0 * count) == ordered[k - 1].item()
        assert stream.passes == 2


def test_a_small_stream_is_read_once() -> None:
    stream = Counting([torch.randn(300, 100), torch.randn(30)])
    assert kth_magnitude(stream, 1000) == flat(stream.tensors).abs().kthvalue(1000).values.item()
    assert stream.passes == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 50_000, 200_000, 399_999, 400_000])
@pytest.mark.parametrize("wrong", ["below", "above", "wide"])
def test_a_sample_that_lies_costs_passes_and_no_digit(
    monkeypatch: pytest.MonkeyPatch, wrong: str, k: int, dtype: torch.dtype
) -> None:
    """A bracket on either side of the value, and one that lets too much through."""
    ends = {"below": (-1.0, 1e-9), "above": (1e3, 1e4), "wide": (-1.0, 1e4)}[wrong]
    bracket = select._Bracket(*ends, ties=True, room=0 if wrong == "wide" else 1e9)
    monkeypatch.setattr(select._Sample, "bracket", lambda self, rank: bracket)
    tensor = large("normal", dtype)
    stream = Counting([tensor])
    assert kth_magnitude(stream, k) == tensor.abs().kthvalue(k).values.item()
    assert stream.passes == 2 + torch.finfo(dtype).bits // 16


@pytest.mark.parametrize("kind", ["normal", "constant", "ternary", "bfloat16"])
@pytest.mark.parametrize("k", [0, 1, 7, 80_000, 200_000, 399_999, 400_000])
def test_largest_chooses_exactly_k(kind: str, k: int) -> None:
    tensor = large(kind, torch.float32).reshape(1000, 400)
    before = tensor.clone()
    chosen = largest(tensor, k)
    assert torch.count_nonzero(chosen) == k
    expected = torch.zeros(tensor.numel(), dtype=torch.bool)
    expected[tensor.flatten().abs().argsort(descending=True, stable=True)[:k]] = True  # the earlier of equal ones
    assert torch.equal(chosen.flatten(), expected)
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (1, 5)])
def test_largest_of_any_shape(shape: tuple[int, ...]) -> None:
    for k in range(7):
        chosen = largest(torch.ones(shape), k)
        assert chosen.shape == shape
        assert torch.count_nonzero(chosen) == min(k, chosen.numel())


def test_power_and_deviation() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(7, 5) + 100, torch.randn(()), torch.empty(0), torch.randn(40, 6).T]
    joint, found = flat(tensors).double(), power(lambda: tensors)
    assert found.elements == joint.numel()
    assert found.squares == pytest.approx(joint.square().sum().item(), rel=1e-12)
    assert deviation(lambda: tensors) == pytest.approx(joint.std().item(), rel=1e-12)


def test_deviation_keeps_its_digits_far_from_zero() -> None:
    """In one pass over squares, 1e8 of mean would swallow a deviation of one."""
    tensor = torch.tensor([1e8 - 1, 1e8, 1e8 + 1], dtype=torch.float64)
    assert deviation(lambda: [tensor]) == 1.0


@pytest.mark.parametrize("tensors", [[], [torch.empty(0)], [torch.tensor([2.0])]])
def test_deviation_of_next_to_nothing(tensors: list[Tensor]) -> None:
    assert deviation(lambda: tensors) == 0.0


@given(
    st.lists(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]), max_size=9), max_size=6),
    st.integers(-1, 60),
)
def test_a_cut_keeps_what_is_largest(pieces: list[list[float]], k: int) -> None:
    """Piece by piece as in one: exactly the k largest, of equal ones the earlier."""
    tensors = [torch.tensor(piece) for piece in pieces]
    whole = torch.cat([*tensors, torch.zeros(0)])
    found = cut(lambda: tensors, k)
    expected = torch.where(largest(whole, k), whole, 0.0)
    kept, start = [torch.zeros(0)], 0
    for one in tensors:
        kept.append(keep(one, *found, start))
        start += one.numel()
    assert torch.equal(torch.cat(kept), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_cut_of_many_entries(dtype: torch.dtype) -> None:
    """Sampled and not held; in bfloat16's values many are equal."""
    tensor = torch.randn(400_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    tensor = tensor.to(torch.float64 if dtype == torch.float64 else torch.float32)
    for k in (1, 4_000, 200_001, 399_999):
        pieces = tensor.split(30_000)
        bound, until = cut(lambda pieces=pieces: pieces, k)
        kept = torch.cat([keep(one, bound, until, 30_000 * number) for number, one in enumerate(pieces)])
        assert torch.equal(kept, torch.where(largest(tensor, k), tensor, 0))
