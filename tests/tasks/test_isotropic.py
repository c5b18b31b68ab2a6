"""Iso-C and Iso-CTS against the reference implementation, the paper's formulas, and what must hold of any input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from storage.errors import InvalidInput
from tasks.mergers import IsoC, IsoCts, Target
from tests.contracts.test_mergers import State, Update, delta, fold, fold_all, updates
from tests.tasks.test_merging import GOLDEN, check_merged, golden_fold, golden_role, load_file
from tests.tasks.test_tsv_m import polar, tuned

Array = NDArray[np.float64]
EXACT: dict[str, Any] = {"accumulate": "float64", "level": "mean"}
LINEAR = Target("l.weight", "linear.weight")
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-7)], ids=str)


def randoms(shape: Sequence[int], count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * 1e-3).to(dtype) for _ in range(count)
    ]


def joint_iso_c(several: Sequence[Tensor]) -> Tensor:
    """The method of arXiv 2502.04959, all updates in memory; U Vh is the polar factor, found without an SVD."""
    total = sum(one.double().numpy() for one in several)
    if total.ndim != 2:
        return torch.from_numpy(total / len(several))
    return torch.from_numpy(np.linalg.norm(total, "nuc") / min(total.shape) * polar(total))


def joint_iso_cts(several: Sequence[Tensor], fraction: float) -> Tensor:
    """Iso-CTS of arXiv 2502.04959 as fusion_bench divides the directions up, in numpy."""
    arrays = [one.double().numpy() for one in several]
    total: Array = np.sum(arrays, axis=0)
    if total.ndim != 2:
        return torch.from_numpy(total / len(arrays))
    directions = min(total.shape)
    each = round((directions - int(directions * fraction)) / len(arrays))
    common = directions - each * len(arrays)
    U, s, Vh = np.linalg.svd(total, full_matrices=False)
    shared = U[:, :common]
    own = [np.linalg.svd(one - shared @ shared.T @ one, full_matrices=False) for one in arrays]
    Us, ss, Vhs = (
        np.concatenate([first, *rest], axis=axis)
        for first, rest, axis in (
            (shared, [u[:, :each] for u, _, _ in own], 1),
            (s[:common], [s[:each] for _, s, _ in own], 0),
            (Vh[:common], [vh[:each] for _, _, vh in own], 0),
        )
    )
    return torch.from_numpy(ss.mean() * polar(Us) @ polar(Vhs))


def combined(merger: IsoCts, several: Sequence[Update]) -> Update:
    """What writing a model does with a joint merger, without a store."""
    first = several[0]
    ones = [1.0] * len(several)
    return {
        name: merger.combine(one, [update[name] for update in several], ones, Target(name, golden_role(name, one)))
        for name, one in first.items()
    }


def test_the_level_rms_keeps_the_norm_of_the_sum() -> None:
    """Both levels are multiples of the same matrix; rms is the one whose norm is that of what was merged."""
    several = randoms((12, 7), 3)
    total = sum(several)
    state = {"sum": total}
    facts = {"count": 3.0, "weight": 3.0}
    rms, mean = (IsoC(accumulate="float64", level=level).delta(state, facts, LINEAR) for level in ("rms", "mean"))  # type: ignore[arg-type]
    assert float(rms.norm()) == pytest.approx(float(total.norm()), rel=1e-12)  # type: ignore[union-attr]
    values = np.linalg.svd(total.numpy(), compute_uv=False)  # type: ignore[union-attr]
    torch.testing.assert_close(rms, mean * float(np.sqrt((values**2).mean()) / values.mean()), rtol=1e-10, atol=0)
    whole = IsoCts(common_space_fraction=1.0).combine(several[0], several, [1.0] * 3, LINEAR)
    torch.testing.assert_close(whole, rms, rtol=1e-9, atol=1e-15)


class TestIsoC:
    @PRECISIONS
    def test_four_updates_are_fusion_bench(self, dtype: torch.dtype, tolerance: float) -> None:
        merger = IsoC(level="mean", accumulate="float64" if dtype == torch.float64 else "float32")
        merged, _ = golden_fold(merger, [0, 1, 2, 3], dtype)
        check_merged({name: one.double() for name, one in merged.items()}, "fb_iso_c_64.safetensors", tolerance)

    @PRECISIONS
    def test_it_streams_the_joint_method(self, dtype: torch.dtype, tolerance: float) -> None:
        """After every step. Float32 relative to the largest singular value of the sum, in units of its condition."""
        several = [tuned(seed, dtype) for seed in range(6)]
        merger: IsoC = IsoC(level="mean", accumulate="float64" if dtype == torch.float64 else "float32")
        state: State | None = None
        for step, update in enumerate(several):
            state = fold(merger, state, update)
            for name, tensor in delta(merger, state).items():
                seen = [one[name].double() for one in several[: step + 1]]
                expected = joint_iso_c(seen)
                assert tensor.dtype == dtype
                size = 1e-3
                if expected.ndim == 2:
                    values = torch.linalg.svdvals(torch.stack(seen).sum(0))
                    size = float(values.mean() * values[0] / values[-1])
                torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=tolerance * size)

    def test_weights_are_ratios_of_the_sum(self) -> None:
        one, two = randoms((9, 6), 2)
        merged = {}
        for factor in (1.0, 4.0):
            state: Any = None
            facts: dict[str, float] = {}
            for tau, weight in ((one, 3 * factor), (two, factor)):
                state, _ = IsoC(**EXACT).fold(state, tau, LINEAR, facts, {"weight": weight})
                facts = dict(IsoC(level="mean").close(facts, {}, {"weight": weight}))
            merged[factor] = IsoC(**EXACT).delta(state, facts, LINEAR)
        torch.testing.assert_close(merged[1.0], joint_iso_c([1.5 * one, 0.5 * two]), rtol=0, atol=1e-15)
        torch.testing.assert_close(merged[4.0], merged[1.0], rtol=0, atol=1e-15)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_nothing_is_written_into_the_null_space(self, dtype: torch.dtype) -> None:
        """Three updates of rank one in six directions: three singular values of the mean over six, three of zero."""
        several = [torch.outer(*pair).to(dtype) for pair in zip(randoms((10,), 3), randoms((6,), 6)[3:], strict=True)]
        merger = IsoC(level="mean", accumulate="float64" if dtype == torch.float64 else "float32")
        merged = delta(merger, fold_all(merger, [{"l.weight": one} for one in several]))["l.weight"].double()
        total = torch.stack(several).sum(0).double()
        mean = torch.linalg.svdvals(total).sum() / 6
        expected = torch.cat([mean.expand(3), torch.zeros(3, dtype=torch.float64)])
        tolerance = (1e-12 if dtype == torch.float64 else 1e-5) * float(mean)
        torch.testing.assert_close(torch.linalg.svdvals(merged), expected, rtol=0, atol=tolerance)
        inside = torch.linalg.pinv(total, rtol=1e-4) @ total  # projects rows onto those of the sum
        torch.testing.assert_close(merged @ inside, merged, rtol=0, atol=tolerance)

    def test_updates_that_cancel_merge_to_zero(self) -> None:
        one = updates(1)[0]
        merged = delta(
            IsoC(level="mean"), fold_all(IsoC(level="mean"), [one, {name: -tensor for name, tensor in one.items()}])
        )
        assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in merged.values())

    @pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0), (1, 7), (7, 1), (1, 1), (2, 3, 4)], ids=str)
    def test_odd_shapes(self, shape: tuple[int, ...]) -> None:
        """One direction has one singular value, which is its own mean: the sum. The rest is averaged."""
        several = randoms(shape, 3)
        merged = delta(IsoC(**EXACT), fold_all(IsoC(**EXACT), [{"l.weight": one} for one in several]))["l.weight"]
        total = torch.stack(several).sum(0)
        torch.testing.assert_close(merged, total if len(shape) == 2 else total / 3)

    def test_embeddings_are_averaged_if_asked(self) -> None:
        matrices, linear = (
            delta(one, fold_all(one, updates(2))) for one in (IsoC(level="mean"), IsoC(level="mean", project="linear"))
        )
        mean = (updates(2)[0]["embed.weight"] + updates(2)[1]["embed.weight"]) / 2
        torch.testing.assert_close(linear["embed.weight"], mean)
        assert not torch.allclose(matrices["embed.weight"], mean, rtol=0.01)
        assert torch.equal(matrices["layer.weight"], linear["layer.weight"])

    def test_half_precision_updates_accumulate_in_full(self) -> None:
        parts, _ = IsoC(level="mean").fold(None, updates(1)[0]["layer.weight"].bfloat16(), LINEAR, {}, {})
        assert parts["sum"].dtype == torch.float32

    def test_scale_multiplies_everything(self) -> None:
        one, two = (
            delta(merger, fold_all(merger, updates(3)))
            for merger in (IsoC(level="mean"), IsoC(level="mean", scale=2.0))
        )
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], 2 * tensor)


class TestIsoCts:
    @PRECISIONS
    def test_four_updates_are_fusion_bench(self, dtype: torch.dtype, tolerance: float) -> None:
        base = load_file(GOLDEN / "in_base.safetensors")
        several = []
        for task in range(4):
            tuned_one = load_file(GOLDEN / f"in_task{task}.safetensors")
            several.append({name: tuned_one[name].to(dtype) - base[name].to(dtype) for name in sorted(base)})
        merged = combined(IsoCts(level="mean"), several)
        check_merged({name: one.double() for name, one in merged.items()}, "fb_iso_cts_64.safetensors", tolerance)

    @pytest.mark.parametrize("fraction", [0.25, 0.5, 0.8, 1.0])
    @pytest.mark.parametrize("count", [1, 2, 3, 5])
    @pytest.mark.parametrize("shape", [(30, 20), (20, 30), (17, 17), (8,)], ids=str)
    def test_it_is_the_formula(self, fraction: float, count: int, shape: tuple[int, ...]) -> None:
        several = randoms(shape, count)
        found = IsoCts(level="mean", common_space_fraction=fraction).combine(several[0], several, [1.0] * count, LINEAR)
        torch.testing.assert_close(found, joint_iso_cts(several, fraction), rtol=0, atol=1e-13)

    def test_all_common_is_iso_c(self) -> None:
        several = randoms((12, 9), 4)
        found = IsoCts(level="mean", common_space_fraction=1.0).combine(several[0], several, [1.0] * 4, LINEAR)
        torch.testing.assert_close(found, joint_iso_c(several), rtol=0, atol=1e-13)

    @pytest.mark.parametrize("fraction", [0.0, 0.3, 0.8])
    def test_one_update_is_iso_c(self, fraction: float) -> None:
        """Its own directions beside the common ones are just the rest of its directions."""
        several = randoms((12, 9), 1)
        found = IsoCts(level="mean", common_space_fraction=fraction).combine(several[0], several, [1.0], LINEAR)
        torch.testing.assert_close(found, joint_iso_c(several), rtol=0, atol=1e-13)

    @settings(max_examples=40, deadline=None)
    @given(
        rows=st.integers(1, 12),
        columns=st.integers(1, 12),
        count=st.integers(1, 15),
        fraction=st.floats(0, 1),
        silent=st.booleans(),
    )
    def test_all_singular_values_are_one_or_zero_times_their_mean(
        self, rows: int, columns: int, count: int, fraction: float, silent: bool
    ) -> None:
        """Whatever the division, more tasks than directions and updates of zeros among them."""
        several = randoms((rows, columns), count)
        if silent:
            several[-1] = torch.zeros_like(several[-1])
        merger = IsoCts(level="mean", common_space_fraction=fraction)
        found = merger.combine(several[0], several, [1.0] * count, LINEAR)
        values = torch.linalg.svdvals(found)
        relative = values / max(float(values[0]), 1e-300)
        assert torch.isfinite(found).all()
        assert bool(((relative - 1).abs() < 1e-9).logical_or(relative < 1e-9).all())
        assert bool(found.any()) != (silent and count == 1)
        turned = merger.combine(several[0], several[::-1], [1.0] * count, LINEAR)
        torch.testing.assert_close(turned, found, rtol=0, atol=1e-10)

    def test_odd_shapes(self) -> None:
        for shape in [(), (0,), (0, 5), (5, 0), (2, 3, 4)]:
            several = randoms(shape, 3)
            found = IsoCts(level="mean").combine(several[0], several, [1.0] * 3, LINEAR)
            torch.testing.assert_close(found, torch.stack(several).mean(0))

    def test_updates_of_zeros_merge_to_zeros(self) -> None:
        several = [torch.zeros(6, 4)] * 3
        assert torch.equal(IsoCts(level="mean").combine(several[0], several, [1.0] * 3, LINEAR), torch.zeros(6, 4))

    def test_embeddings_are_averaged_if_asked(self) -> None:
        several, target = randoms((9, 6), 2), Target("embed.weight", "embedding.weight")
        mean = (several[0] + several[1]) / 2
        torch.testing.assert_close(
            IsoCts(level="mean", project="linear").combine(mean, several, [1.0] * 2, target), mean
        )
        torch.testing.assert_close(
            IsoCts(level="mean", project="linear").combine(mean, several, [1.0] * 2, LINEAR),
            IsoCts(level="mean").combine(mean, several, [1.0] * 2, target),
        )

    def test_scale_multiplies_everything(self) -> None:
        for shape in ((9, 6), (5,)):
            several = randoms(shape, 3)
            one, two = (
                IsoCts(level="mean", scale=size).combine(several[0], several, [1.0] * 3, LINEAR) for size in (1.0, 2.0)
            )
            torch.testing.assert_close(two, 2 * one)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (IsoC, {"scale": 0.0}),
        (IsoCts, {"scale": -1.0}),
        (IsoCts, {"common_space_fraction": 1.1}),
        (IsoCts, {"common_space_fraction": -0.1}),
    ],
)
def test_invalid_settings(kind: type, wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(wrong))):
        kind(**wrong)
