"""Ternary against ComPEFT's own results, the entropy bound, and closed forms of its scales."""

from __future__ import annotations

import json
from math import log2
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from storage.blobs import encode_parts
from storage.errors import Damaged, InvalidInput
from tasks.codecs import Leaf, Ternary
from tasks.codecs.streams import squeeze_codes, stream

GOLDEN = Path(__file__).parents[1] / "golden" / "compress"
CASES = {case["name"]: case["hyper"] for case in json.loads((GOLDEN / "manifest.json").read_text())["cases"]}


def coded(codec: Ternary, deltas: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """The decoded update, and its one magnitude."""
    facts = codec.survey(lambda: [deltas[name] for name in sorted(deltas)])
    written = {name: codec.encode(Leaf(name, "linear.weight", delta), facts).parts for name, delta in deltas.items()}
    decoded = {name: codec.decode(parts, tuple(deltas[name].shape)) for name, parts in written.items()}
    return decoded, facts["magnitude"]


def check_against(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(found[name].sign(), tensor.sign()), name
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("row", CASES["compeft_lora"]["grid"], ids=lambda row: f"k{row['k']}-a{row['replace_factor']}")
def test_compeft_on_lora_factors(row: dict[str, float]) -> None:
    deltas, stored = (load_file(GOLDEN / f"compeft_lora.{side}.safetensors") for side in ("in", "out"))
    found, magnitude = coded(Ternary(density=row["k"] / 100, alpha=row["replace_factor"]), deltas)
    assert sum(int(tensor.count_nonzero()) for tensor in found.values()) == row["nnz"]
    assert magnitude == pytest.approx(row["alpha_f32"], rel=1e-6)
    total = sum(tensor.sum(dtype=torch.float64).item() for tensor in found.values())
    assert total == pytest.approx(row["checksum_sum"], rel=1e-6, abs=1e-9)
    prefix = f"k{row['k']}_a{row['replace_factor']}|"  # the tensors of seven of the rows are stored
    check_against(found, {name.removeprefix(prefix): out for name, out in stored.items() if name.startswith(prefix)})


@pytest.mark.parametrize("row", CASES["compeft_ties"]["rows"], ids=lambda row: f"{row['input']}-k{row['k']}")
def test_compeft_keeps_all_ties(row: dict[str, object]) -> None:
    """`>=` at the threshold keeps every tied entry, and so more than the share that was asked for."""
    inputs, outputs = (load_file(GOLDEN / f"compeft_ties.{side}.safetensors") for side in ("in", "out"))
    before, after = f"{row['input']}|", f"{row['input']}_k{row['k']}|"
    deltas = {name.removeprefix(before): tensor for name, tensor in inputs.items() if name.startswith(before)}
    found, _ = coded(Ternary(density=int(str(row["k"])) / 100, alpha=1.0), deltas)
    assert sum(int(tensor.count_nonzero()) for tensor in found.values()) == row["nnz"]
    expected = {name.removeprefix(after): tensor for name, tensor in outputs.items() if name.startswith(after)}
    assert len(expected) == len(deltas)
    check_against(found, expected)


@pytest.fixture(scope="module")
def million() -> Tensor:
    return torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)) * 1e-4


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.3, 0.5, 0.7])
def test_size_is_near_the_entropy_bound(million: Tensor, density: float) -> None:
    """H2(k) + k bits per entry bound any code of independent signs at independent places; the header is counted too."""
    codec = Ternary(density=density)
    leaf = Leaf("weight", "linear.weight", million)
    size = len(encode_parts(codec.encode(leaf, codec.survey(lambda: [million])).parts))
    bound = -density * log2(density) - (1 - density) * log2(1 - density) + density
    assert 0.99 * bound < 8 * size / million.numel() < 1.02 * bound


@pytest.mark.parametrize("density", [0.01, 0.2, 0.9])
def test_norm_keeps_the_norm(million: Tensor, density: float) -> None:
    found, _ = coded(Ternary(density=density, alpha="norm"), {"w": million})
    assert found["w"].double().norm().item() == pytest.approx(million.double().norm().item(), rel=1e-5)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.9])
def test_projection_is_the_closed_form(million: Tensor, density: float) -> None:
    """<ternary, dense> = <dense, dense>: seen along the dense update, the ternary one is the dense one."""
    found, magnitude = coded(Ternary(density=density, alpha="projection"), {"w": million})
    dense = million.double()
    kept = dense.abs()[found["w"] != 0]
    assert magnitude == pytest.approx((dense.square().sum() / kept.sum()).item(), rel=1e-9)
    assert (found["w"].double() * dense).sum().item() == pytest.approx(dense.square().sum().item(), rel=1e-6)


def test_float64_updates_are_coded_too() -> None:
    delta = torch.tensor([0.1, -3.0, 0.2, 0.0, 2.0], dtype=torch.float64)
    found, magnitude = coded(Ternary(density=0.2, alpha="projection"), {"w": delta})
    assert found["w"].sign().tolist() == [0, -1, 0, 0, 1]
    assert magnitude == pytest.approx(13.05 / 5)


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 70_000), min_size=1, max_size=300), st.randoms(use_true_random=False))
def test_places_and_signs_come_back(places: set[int], random: Random) -> None:
    delta = torch.zeros(70_001)
    for place in places:
        delta[place] = random.choice([-2.0, 2.0])
    coded = Ternary().encode(Leaf("w", "bare", delta), {"threshold": 1.0, "magnitude": 2.0})
    assert torch.equal(Ternary.decode(coded.parts, (70_001,)), delta)


def test_dense_places_are_written_four_to_a_byte() -> None:
    delta = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    parts = Ternary().encode(Leaf("w", "bare", delta), {"threshold": 0.5, "magnitude": 1.0}).parts
    assert "fours" in parts
    assert torch.equal(Ternary.decode(parts, (4096,)), torch.where(delta.abs() >= 0.5, delta.sign(), 0))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 65_537, 65_539])
def test_four_to_a_byte_whatever_the_size(size: int) -> None:
    delta = torch.randn(size, generator=torch.Generator().manual_seed(size)).sign()
    parts = Ternary().encode(Leaf("w", "bare", delta), {"threshold": 0.5, "magnitude": 1.0}).parts
    assert "fours" in parts
    assert torch.equal(Ternary.decode(parts, (size,)), delta)


@pytest.mark.parametrize("broken", [[0b11_00_00_00, 0], [0, 0b00_00_00_01]], ids=["no entry", "beyond the end"])
def test_four_to_a_byte_are_checked(broken: list[int]) -> None:
    parts = Ternary().encode(Leaf("w", "bare", torch.ones(7)), {"threshold": 0.5, "magnitude": 1.0}).parts
    parts["fours"] = stream(squeeze_codes([np.array(broken, dtype=np.uint8)]))
    with pytest.raises(Damaged, match="what is no entry"):
        Ternary.decode(parts, (7,))


@pytest.mark.parametrize("settings", [{"density": 0}, {"density": 1}, {"density": -0.1}, {"alpha": 0}, {"alpha": -1}])
def test_invalid_settings(settings: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(settings))):
        Ternary(**settings)  # type: ignore[arg-type]
