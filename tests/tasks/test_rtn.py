"""Rounding to nearest against the official quantizer, its grid, and the packing of codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from storage.blobs import encode_parts
from storage.errors import Damaged, InvalidInput
from tasks.codecs import Leaf
from tasks.codecs.packing import pack_codes, packed_size, unpack_codes
from tasks.codecs.quantise import grid_of
from tasks.codecs.rtn import Rtn

GOLDEN = Path(__file__).parents[1] / "golden" / "compress"


def coded(codec: Rtn, delta: Tensor) -> tuple[Tensor, int]:
    """What comes back, and the size of the file."""
    parts = codec.encode(Leaf("w", "linear.weight", delta), {}).parts
    return Rtn.decode(parts, tuple(delta.shape)), len(encode_parts(parts))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_official_quantizer(bits: int) -> None:
    rows = load_file(GOLDEN / "graftllm_rtn_quantizer.in.safetensors")["W"]
    expected = load_file(GOLDEN / "graftllm_rtn_quantizer.out.safetensors")
    grid = grid_of(rows.numpy(), bits)
    np.testing.assert_allclose(grid.scale_R, expected[f"rtn{bits}.scale"].flatten(), rtol=1e-6)
    assert np.array_equal(grid.zero_R, expected[f"rtn{bits}.zero"].flatten())
    found, _ = coded(Rtn(bits=bits), rows)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected[f"rtn{bits}.deq"], rtol=1e-6, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(0, 300), st.integers(0, 2**32))
def test_packing_undoes_itself(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, count).astype(np.uint8)
    packed = np.frombuffer(pack_codes(codes, bits), dtype=np.uint8)
    assert packed.size == packed_size(count, bits) == -(-count * bits // 8)
    assert np.array_equal(unpack_codes(packed, bits, count), codes)
    with pytest.raises(Damaged):
        unpack_codes(np.append(packed, np.uint8(0)), bits, count)


def test_packing_goes_on_over_pieces() -> None:
    codes = np.random.default_rng(0).integers(0, 8, 200_003).astype(np.uint8)
    packed = np.frombuffer(pack_codes(codes, 3), dtype=np.uint8)
    assert np.array_equal(unpack_codes(packed, 3, codes.size), codes)


@pytest.mark.parametrize("group", [None, 1, 7, 128, 1000])
@pytest.mark.parametrize("shape", [(33, 17), (300,), (4, 3, 5, 6), (1, 200), ()], ids=str)
def test_no_number_moves_further_than_half_a_step(shape: tuple[int, ...], group: int | None) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    rows = delta.reshape(shape[0] if len(shape) > 1 else 1, -1)
    columns = rows.shape[1]
    found = coded(Rtn(bits=3, group=group), delta)[0].reshape(rows.shape)
    size = min(group or columns, columns)
    for start in range(0, columns, size):
        part, near = rows[:, start : start + size], found[:, start : start + size]
        step = (part.clamp(min=0).amax(1) - part.clamp(max=0).amin(1)) / 7
        # the zero is rounded too: an end of the range can be half a step beyond the last code
        assert ((part - near).abs() <= 1.001 * step[:, None]).all()
        assert ((part - near).abs() <= 0.501 * step[:, None]).float().mean() > 0.5


def test_codes_are_entropy_coded() -> None:
    delta = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    found, size = coded(Rtn(bits=4), delta)
    assert 8 * size / delta.numel() < 3.8
    assert (
        found - delta
    ).norm() / delta.norm() < 0.13  # a step is 6.5 of 15 sigmas, of which rounding costs 1 / sqrt 12
    smaller, halved = coded(Rtn(bits=4, scales="f16"), delta)
    assert halved == pytest.approx(size - 2 * 512, abs=20)
    assert (smaller - delta).norm() / delta.norm() < 0.13


def test_a_range_beyond_the_dtype_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match="fc1"):
        Rtn().encode(Leaf("fc1.weight", "linear.weight", torch.tensor([3e38, -3e38])), {})
    with pytest.raises(InvalidInput, match="f16"):
        Rtn(scales="f16").encode(Leaf("fc1.weight", "linear.weight", torch.tensor([3e7, -3e7])), {})
