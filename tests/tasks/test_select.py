"""Order statistics of streams: exactly what torch says about all tensors held at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from tasks.select import deviation, kth_magnitude, power


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


@pytest.mark.parametrize("k", [0, -1, 4])
def test_kth_magnitude_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.3"):
        kth_magnitude(lambda: [torch.ones(2), torch.ones(1)], k)


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
