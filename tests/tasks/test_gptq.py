"""GPTQ against the released code's numbers, and against its definition: one column, then the rest solved anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from storage.errors import InvalidInput
from tasks.codecs.gptq import DAMP, Rounded, curvature, gptq
from tasks.codecs.quantise import dequantised, grid_of, quantised

GOLDEN = Path(__file__).parents[1] / "golden" / "compress"
SIDES = {8: (0, 2), 4: (2, 10), 2: (10, 48)}  # bits: which of the triplets


def case() -> tuple[dict[str, Tensor], Tensor]:
    """What the released code made of a layer, and the moments of the layer's inputs."""
    given = load_file(GOLDEN / "graftllm_fp32_base0.in.safetensors")
    rows = given["calib"].reshape(-1, given["calib"].shape[-1])
    return load_file(GOLDEN / "graftllm_fp32_base0.out.safetensors"), rows.T @ rows / len(rows)


def inputs_of(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs [rows, columns] of which some count more, and that go together."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(columns, generator=generator) * 3 + 0.1
    mixed = torch.randn(rows, columns, generator=generator) @ (
        torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    )
    return mixed * sizes


def moments_of(rows: int, columns: int, seed: int = 0) -> Tensor:
    inputs = inputs_of(rows, columns, seed)
    return inputs.T @ inputs / rows


def drawn(rows: int, columns: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def off(rows: NDArray[np.float32], found: Rounded, moments: Tensor) -> float:
    """The mean square of what the rounding changes in the layer's output."""
    error = torch.from_numpy(rows - found.numbers()).double()
    return float(((error @ moments.double()) * error).sum())


@pytest.mark.parametrize("bits", SIDES)
def test_the_released_code(bits: int) -> None:
    expected, moments = case()
    own = slice(*SIDES[bits])
    right = gptq(expected["svd.V"][:, own].T.numpy(), bits, 128, curvature(moments))
    assert np.array_equal(right.group_C, expected[f"q.V{bits}.g_idx"])
    assert np.array_equal(right.zero_RG, expected[f"q.V{bits}.zero"])
    np.testing.assert_allclose(right.scale_RG, expected[f"q.V{bits}.scale"], rtol=1e-3)
    np.testing.assert_allclose(right.numbers().T, expected[f"deq.V{bits}"], rtol=1e-3, atol=1e-6)
    carried = expected["svd.S"][own, None] * torch.from_numpy(right.numbers())
    left = gptq(expected["svd.U"][:, own].numpy(), bits, 128, curvature(carried @ moments @ carried.T))
    assert np.array_equal(left.zero_RG, expected[f"q.U{bits}.zero"])
    np.testing.assert_allclose(left.numbers(), expected[f"deq.U{bits}"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_without_inputs_it_is_the_official_quantizer(bits: int) -> None:
    rows = load_file(GOLDEN / "graftllm_rtn_quantizer.in.safetensors")["W"].numpy()
    expected = load_file(GOLDEN / "graftllm_rtn_quantizer.out.safetensors")
    found = gptq(rows, bits, None)
    assert np.array_equal(found.zero_RG, expected[f"rtn{bits}.zero"])
    np.testing.assert_allclose(found.numbers(), expected[f"rtn{bits}.deq"], rtol=1e-6, atol=1e-9)
    groups = gptq(rows, bits, 96)
    for group, piece in enumerate((rows[:, :96], rows[:, 96:])):
        grid = grid_of(piece, bits)
        assert np.array_equal(
            groups.numbers()[:, 96 * group :][:, :96], dequantised(quantised(piece, grid, bits), grid)
        )


@settings(max_examples=50, deadline=None, derandomize=True)  # ties in float32 are a matter of luck
@given(st.integers(1, 5), st.integers(1, 12), st.sampled_from([2, 3, 4]), st.integers(0, 2**32 - 1))
def test_every_column_is_made_good_by_those_after_it(rows: int, columns: int, bits: int, seed: int) -> None:
    """The definition, with one inverse for every column: the rest moves by error * inverse row / inverse diagonal."""
    weights, moments = drawn(rows, columns, seed), moments_of(3 * columns, columns, seed)
    found = gptq(weights, bits, None, curvature(moments))
    damped = moments.double().numpy() + DAMP * float(moments.diagonal().mean()) * np.eye(columns)
    left, grid = weights.astype(np.float64), grid_of(weights, bits)
    rest = list(np.argsort(-moments.diagonal().numpy(), kind="stable"))
    wanted = np.empty_like(weights)
    while rest:
        inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
        column = rest[0]
        single = left[:, [column]].astype(np.float32)
        wanted[:, [column]] = dequantised(quantised(single, grid, bits), grid)
        error = (left[:, column] - wanted[:, column]) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
        rest = rest[1:]
    steps = np.abs(found.numbers() - wanted) / grid.scale_R[:, None]
    assert (steps < 1e-3).all()


@pytest.mark.parametrize("group", [None, 128, 50, 7])
def test_the_output_is_closer_than_by_rounding(group: int | None) -> None:
    weights, moments = drawn(40, 300), moments_of(900, 300)
    plain, seen = gptq(weights, 3, group), gptq(weights, 3, group, curvature(moments))
    assert off(weights, seen, moments) < 0.5 * off(weights, plain, moments)
    groups = 1 if group is None else -(-300 // group)
    assert seen.scale_RG.shape == (40, groups) and seen.group_C.max() == groups - 1


def test_the_unit_of_the_inputs_does_not_matter() -> None:
    weights, moments = drawn(10, 60), moments_of(200, 60)
    moments[:, 7] = moments[7] = 0
    once, again = (gptq(weights, 3, 16, curvature(moments * unit)) for unit in (1.0, 2.0**-40))
    assert np.array_equal(once.numbers(), again.numbers())
    assert not once.numbers()[:, 7].any(), "what the layer is never given is not worth a code"


def test_fewer_examples_than_columns_will_do() -> None:
    weights, moments = drawn(10, 200), moments_of(3, 200)
    assert off(weights, gptq(weights, 2, 128, curvature(moments)), moments) < off(weights, gptq(weights, 2), moments)
    assert np.isfinite(gptq(weights, 2, 128, curvature(torch.zeros(200, 200))).numbers()).all()


def test_nothing_is_changed_in_place() -> None:
    weights, moments = drawn(10, 20), moments_of(60, 20)
    gptq(weights, 2, 8, curvature(moments))
    assert np.array_equal(weights, drawn(10, 20)) and torch.equal(moments, moments_of(60, 20))


def test_scales_are_rounded_before_they_are_used() -> None:
    found = gptq(drawn(10, 200), 4, 128, curvature(moments_of(600, 200)), "<f2")
    assert np.array_equal(found.scale_RG, found.scale_RG.astype(np.float16))
    assert np.isinf(gptq(drawn(2, 8) * np.float32(1e30), 4, 8, None, "<f2").scale_RG).all()


@pytest.mark.parametrize(
    "moments", [torch.ones(3, 4), torch.full((3, 3), torch.nan), torch.diag(torch.tensor([1.0, -9e9, 1])) - 9e9]
)
def test_what_cannot_be_moments_is_refused(moments: Tensor) -> None:
    with pytest.raises(InvalidInput, match="calibration"):
        curvature(moments)
