"""BitDelta against the published code, and the mean that loses least."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tasks.codecs import Leaf, decode_parts
from tasks.codecs.bitdelta import BitDelta

GOLDEN = Path(__file__).parents[1] / "golden" / "compress"


def coded(codec: BitDelta, delta: Tensor, role: str = "linear.weight") -> Tensor:
    found = codec.encode(Leaf("w", role, delta), {})
    return decode_parts(found.codec, found.parts, tuple(delta.shape))


def test_the_published_code() -> None:
    sides, expected = (load_file(GOLDEN / f"bitdelta_fp32.{side}.safetensors") for side in ("in", "out"))
    delta = sides["finetuned"] - sides["base"]
    found = coded(BitDelta(zeros="plus"), delta)
    assert torch.equal(found > 0, delta >= 0)
    torch.testing.assert_close(found, expected["delta"], rtol=1e-6, atol=0)
    torch.testing.assert_close(found.abs().amax().reshape(1), expected["coeff"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", ["matrix", "row"])
def test_the_mean_of_what_is_not_zero_loses_least(scale: str) -> None:
    delta = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    delta[delta.abs() < 0.3] = 0
    found = coded(BitDelta(scale=scale), delta)  # type: ignore[arg-type]
    assert torch.equal(found.sign(), delta.sign())
    rows = delta if scale == "row" else delta.reshape(1, -1)
    means = torch.stack([row[row != 0].abs().double().mean() for row in rows]).float()
    torch.testing.assert_close(found.abs().reshape(rows.shape).amax(1), means, rtol=1e-6, atol=0)
    least = (found - delta).norm()
    assert all((found * size - delta).norm() > least for size in (0.97, 1.03))


@pytest.mark.parametrize(
    ("role", "shape"), [("norm.weight", (30,)), ("embedding.weight", (5, 6)), ("linear.bias", (9,))]
)
def test_the_rest_stays_as_it_is(role: str, shape: tuple[int, ...]) -> None:
    delta = torch.randn(shape)
    assert torch.equal(coded(BitDelta(), delta, role), delta)


def test_a_row_of_zeros_has_no_scale() -> None:
    delta = torch.randn(4, 8)
    delta[2] = 0
    for zeros in ("keep", "plus"):
        found = coded(BitDelta(scale="row", zeros=zeros), delta)  # type: ignore[arg-type]
        assert torch.isfinite(found).all() and not found[2].any()
