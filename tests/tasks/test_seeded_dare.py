"""DARE as a codec keeps what the sparsifier keeps, and pays nothing for positions."""

from __future__ import annotations

import pytest
import torch

from storage.blobs import encode_parts
from storage.errors import InvalidInput
from tasks.codecs import Leaf
from tasks.codecs.seeded_dare import SeededDare
from tasks.sparsifiers import Dare

UPDATE = f"update/{'1' * 64}"
DELTA = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) * 1e-3


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("values", "off"), [("f32", 1e-6), ("bf16", 2**-8), ("f16", 2**-6)])  # f16 has denormals here
def test_the_sparsifier_of_that_name(density: float, values: str, off: float) -> None:
    codec = SeededDare(density=density, seed=3, values=values)  # type: ignore[arg-type]
    parts = codec.encode(Leaf("fc1.weight", "linear.weight", DELTA, UPDATE), {}).parts
    thinned = Dare(density=density, seed=3).thin(DELTA, UPDATE, "fc1.weight")
    torch.testing.assert_close(SeededDare.decode(parts, (200, 300)), thinned, rtol=off, atol=1e-6)
    kept = int(thinned.count_nonzero())
    width = {"f32": 4, "bf16": 2, "f16": 2}[values]
    assert len(encode_parts(parts)) < kept * width + 600


def test_another_seed_or_tensor_keeps_others() -> None:
    def places(seed: int, name: str) -> torch.Tensor:
        parts = SeededDare(seed=seed).encode(Leaf(name, "linear.weight", DELTA, UPDATE), {}).parts
        return SeededDare.decode(parts, (200, 300)) != 0

    first = places(0, "a")
    assert torch.equal(places(0, "a"), first)
    for other in (places(1, "a"), places(0, "b")):
        assert 0.05 < (other & first).sum() / first.sum() < 0.2


def test_numbers_beyond_the_dtype_are_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match="fc1"):
        SeededDare(density=1.0, values="f16").encode(Leaf("fc1.weight", "linear.weight", torch.full((3,), 1e5)), {})
