"""TSV-M: the streamed result is the joint method's after every update, and what holds where that is undefined."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from storage.errors import InvalidInput
from tasks.mergers import Target, TsvM
from tests.contracts.test_mergers import State, Update, delta, fold, fold_all, through_store, updates, zeros
from tests.tasks.test_merging import check_merged, golden_fold

Array = NDArray[np.float64]
EXACT: dict[str, Any] = {"accumulate": "float64"}
SHAPES = {"embed.weight": (40, 24), "layer.weight": (16, 48), "out.weight": (96, 80), "layer.bias": (24,)}


def tuned(seed: int, dtype: torch.dtype = torch.float64) -> Update:
    """An update whose matrices have singular values that fall by 10 % each, so that no cut is a close call."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 2:
            U, s, Vh = torch.linalg.svd(noise, full_matrices=False)
            noise = U * 0.9 ** torch.arange(len(s)) @ Vh
        found[name] = (noise * 1e-3).to(dtype)
    return found


def polar(frame: Array) -> Array:
    """The orthonormal factor by Newton's iteration on the square one that QR leaves: no SVD of the frame is taken."""
    if frame.shape[0] < frame.shape[1]:
        return polar(frame.T).T
    Q, X = np.linalg.qr(frame)
    for _ in range(40):
        X = (X + np.linalg.inv(X).T) / 2
    found: Array = Q @ X
    return found


def joint_tsv_m(several: list[Tensor]) -> Tensor:
    """The method of arXiv 2412.00081, all updates in memory: truncate, concatenate, whiten, multiply."""
    arrays = [one.double().numpy() for one in several]
    if arrays[0].ndim != 2:
        return torch.from_numpy(sum(arrays) / len(arrays))
    share = min(arrays[0].shape) // len(arrays)
    triplets = [np.linalg.svd(one, full_matrices=False) for one in arrays]
    U = np.concatenate([u[:, :share] for u, _, _ in triplets], axis=1)
    s = np.concatenate([s[:share] for _, s, _ in triplets])
    Vh = np.concatenate([vh[:share] for _, _, vh in triplets])
    return torch.from_numpy(polar(U) @ np.diag(s) @ polar(Vh))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-7)], ids=str)
def test_four_updates_are_fusion_bench(dtype: torch.dtype, tolerance: float) -> None:
    merger = TsvM(accumulate="float64" if dtype == torch.float64 else "float32")
    merged, _ = golden_fold(merger, [0, 1, 2, 3], dtype)
    check_merged({name: one.double() for name, one in merged.items()}, "fb_tsvm_64.safetensors", tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
def test_it_streams_the_joint_method(dtype: torch.dtype, tolerance: float) -> None:
    """After every step; the shares fall from all directions to a ninth, with and without a rest.

    Relative to the largest singular value. In float32 a rounding error turns the last direction of each share by
    eps * s_0 / (its gap, a tenth of itself), and whitening multiplies that by the condition of the frames.
    """
    several = [tuned(seed, dtype) for seed in range(9)]
    merger, state = TsvM(accumulate="float64" if dtype == torch.float64 else "float32"), None
    for step, update in enumerate(several):
        state = fold(merger, state, update)
        for name, tensor in delta(merger, state).items():
            expected = joint_tsv_m([one[name] for one in several[: step + 1]])
            assert tensor.dtype == dtype
            size = float(torch.linalg.matrix_norm(expected, 2) if expected.ndim == 2 else expected.abs().max())
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=tolerance * size)


def test_the_first_update_is_the_merged_delta() -> None:
    update = tuned(0)
    for name, tensor in delta(TsvM(**EXACT), fold_all(TsvM(**EXACT), [update])).items():
        torch.testing.assert_close(tensor, update[name], rtol=0, atol=1e-15)


def test_merged_singular_values_are_those_of_the_tasks() -> None:
    """What whitening is for: tasks do not add up or cancel."""
    several = [tuned(seed) for seed in range(4)]
    merged = delta(TsvM(**EXACT), fold_all(TsvM(**EXACT), several))
    for name in ("embed.weight", "layer.weight", "out.weight"):
        share = min(SHAPES[name]) // 4
        expected = torch.cat([torch.linalg.svdvals(one[name])[:share] for one in several]).sort(descending=True)[0]
        torch.testing.assert_close(torch.linalg.svdvals(merged[name])[: 4 * share], expected, rtol=1e-10, atol=0)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(4)), size=st.floats(1e-6, 1e6))
def test_order_does_not_matter_and_size_is_kept(order: list[int], size: float) -> None:
    several = [tuned(seed) for seed in range(4)]
    expected = delta(TsvM(**EXACT), fold_all(TsvM(**EXACT), several))
    turned = [{name: one * size for name, one in several[place].items()} for place in order]
    for name, tensor in delta(TsvM(**EXACT), fold_all(TsvM(**EXACT), turned)).items():
        torch.testing.assert_close(tensor, expected[name] * size, rtol=0, atol=1e-14 * size)


def test_a_turned_basis_turns_the_result() -> None:
    """Q tau R merges to Q delta R for orthogonal Q and R: only directions count, not coordinates."""
    generator = torch.Generator().manual_seed(5)
    Q, R = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in (40, 24))
    several = [tuned(seed)["embed.weight"] for seed in range(3)]
    plain, turned = (
        delta(TsvM(**EXACT), fold_all(TsvM(**EXACT), [{"l.weight": one} for one in some]))["l.weight"]
        for some in (several, [Q @ one @ R for one in several])
    )
    torch.testing.assert_close(turned, Q @ plain @ R, rtol=0, atol=1e-15)


def test_resuming_changes_no_bit_of_larger_matrices() -> None:
    """The contract has small ones; here it counts how tensors lie in memory before and after a file."""
    several = [
        {"l.weight": torch.randn(150, 110, generator=torch.Generator().manual_seed(seed)) * 1e-3} for seed in range(4)
    ]
    kept: State | None = None
    resumed: State | None = None
    for update in several:
        kept = fold(TsvM(), kept, update)
        resumed = through_store(fold(TsvM(), resumed, update))
        assert torch.equal(delta(TsvM(), kept)["l.weight"], delta(TsvM(), resumed)["l.weight"])


@pytest.mark.parametrize("place", [0, 1])
def test_an_update_of_zeros_takes_its_share_and_brings_nothing(place: int) -> None:
    """What is left is the best approximation of half the rank: no arbitrary direction turns it."""
    update = {name: tensor.double() for name, tensor in updates(1)[0].items()}
    both = [update]
    both.insert(place, {name: tensor.double() for name, tensor in zeros().items()})
    for name, tensor in delta(TsvM(**EXACT), fold_all(TsvM(**EXACT), both)).items():
        expected = update[name] / 2
        if expected.ndim == 2:
            U, s, Vh = torch.linalg.svd(update[name], full_matrices=False)
            half = len(s) // 2
            expected = U[:, :half] * s[:half] @ Vh[:half]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-15)


def test_the_same_update_again_only_cuts_it() -> None:
    """Equal frames are linearly dependent: their common directions are kept, and nothing is made up for the rest."""
    update = tuned(0)
    merged = delta(TsvM(**EXACT), fold_all(TsvM(**EXACT), [update, update]))
    U, s, Vh = torch.linalg.svd(update["embed.weight"], full_matrices=False)
    torch.testing.assert_close(merged["embed.weight"], U[:, :12] * s[:12] @ Vh[:12], rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_low_rank_updates_are_independent_of_the_null_space(dtype: torch.dtype) -> None:
    """Rank one where there is room for two, and rows of zeros added, which change nothing but the null space."""
    generator = torch.Generator().manual_seed(0)
    several = [
        torch.outer(*(torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(2))).to(dtype)
        for _ in range(3)
    ]
    merger = TsvM(accumulate="float64" if dtype == torch.float64 else "float32")
    square = delta(merger, fold_all(merger, [{"l.weight": one} for one in several]))["l.weight"]
    rows = torch.zeros(24, 8, dtype=dtype)
    padded = delta(merger, fold_all(merger, [{"l.weight": torch.cat([one, rows])} for one in several]))["l.weight"]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(padded, torch.cat([square, rows]), rtol=0, atol=tolerance)
    expected = torch.stack([torch.linalg.svdvals(one)[0] for one in several]).sort(descending=True)[0]
    torch.testing.assert_close(torch.linalg.svdvals(square)[:3], expected, rtol=0, atol=tolerance)


def test_small_matrices_are_averaged_once_there_are_more_updates_than_directions() -> None:
    several = updates(11)
    for count, whitened in ((8, True), (9, False), (11, False)):
        parts, _ = state = fold_all(TsvM(), several[:count])
        merged = delta(TsvM(), state)
        mean = sum(one["layer.weight"] for one in several[:count]) / count
        assert ("u" in parts["layer.weight"]) == whitened
        assert torch.allclose(merged["layer.weight"], mean, rtol=0, atol=1e-9) != whitened
        torch.testing.assert_close(merged["layer.bias"], sum(one["layer.bias"] for one in several[:count]) / count)


def test_large_matrices_refuse_more_updates_than_they_have_directions() -> None:
    state = None
    for seed in range(65):
        update = {"l.weight": torch.randn(65, 66, generator=torch.Generator().manual_seed(seed))}
        state = fold(TsvM(), state, update)
    assert state is not None
    assert set(state[0]["l.weight"]) == {"u", "s", "vh"}
    assert state[0]["l.weight"]["s"].shape == (65,)
    with pytest.raises(InvalidInput, match=r"'l\.weight' has 65 directions.*another merger"):
        fold(TsvM(), state, update)


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0), (1, 7), (7, 1), (1, 1), (2, 3, 4)], ids=str)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    """One direction is whitened once and averaged from the second update on; none is averaged always."""
    generator = torch.Generator().manual_seed(0)
    several = [torch.randn(shape, generator=generator) for _ in range(3)]
    for count in (1, 2, 3):
        merged = delta(TsvM(), fold_all(TsvM(), [{"l.weight": one} for one in several[:count]]))["l.weight"]
        mean = torch.stack(several[:count]).mean(0)
        torch.testing.assert_close(merged, mean, rtol=1e-5, atol=1e-6)


def test_embeddings_are_averaged_if_asked() -> None:
    several = updates(2)
    mean = (several[0]["embed.weight"] + several[1]["embed.weight"]) / 2
    matrices, linear = (
        delta(merger, fold_all(merger, several)) for merger in (TsvM(project="matrices"), TsvM(project="linear"))
    )
    torch.testing.assert_close(linear["embed.weight"], mean)
    assert not torch.allclose(matrices["embed.weight"], mean, rtol=0.01)
    assert torch.equal(matrices["layer.weight"], linear["layer.weight"])


def test_scale_multiplies_everything() -> None:
    one, two = (delta(merger, fold_all(merger, updates(3))) for merger in (TsvM(), TsvM(scale=2.0)))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], 2 * tensor)
    with pytest.raises(InvalidInput, match="scale"):
        TsvM(scale=0.0)


def test_half_precision_updates_accumulate_in_full() -> None:
    update = updates(1)[0]["layer.weight"].bfloat16()
    parts, _ = TsvM().fold(None, update, Target("layer.weight", "linear.weight"), {}, {})
    assert {part.dtype for part in parts.values()} == {torch.float32}
