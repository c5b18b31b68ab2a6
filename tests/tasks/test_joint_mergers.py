"""Joint mergers that see updates as vectors, against what their papers derive. SCE has a room of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from storage.errors import InvalidInput
from tasks.mergers import Joint, Karcher, ModelStock, Slerp, Target

HERE = Target("layers.0.fc.weight", "linear.weight")


def drawn(seed: int, *shape: int, size: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size


def merged(
    merger: Joint, deltas: Sequence[Tensor], base: Tensor | None = None, weights: Sequence[float] = ()
) -> Tensor:
    start = torch.zeros_like(deltas[0]) if base is None else base
    return merger.combine(start, deltas, weights or [1.0] * len(deltas), HERE)


def near(found: Tensor, expected: Tensor, places: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=places)


def with_cosine(count: int, shared: float, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A point, and `count` updates that lie around it at right angles to it and to one another, equally far."""
    directions = torch.linalg.qr(drawn(seed, 30, count + 1))[0].T
    point = shared * directions[0]
    return point.reshape(5, 6), [(point + one).reshape(5, 6) for one in directions[1:]]


class TestModelStock:
    @pytest.mark.parametrize("count", [2, 3, 7])
    @pytest.mark.parametrize("shared", [0.1, 1.0, 5.0])
    def test_it_is_the_nearest_point_to_what_the_models_lie_around(self, count: int, shared: float) -> None:
        """What the paper derives the ratio from, as a least-squares problem."""
        point, deltas = with_cosine(count, shared)
        span = torch.stack([delta.flatten() for delta in deltas]).T
        nearest = span @ torch.linalg.lstsq(span, point.flatten().unsqueeze(1)).solution
        near(merged(ModelStock(), deltas), nearest.reshape(5, 6))

    def test_it_is_the_formula(self) -> None:
        deltas = [drawn(seed, 8, 5) + 2 * drawn(0, 8, 5) for seed in (1, 2, 3, 4)]
        flat = [one.flatten() for one in deltas]
        cosines = [float(torch.cosine_similarity(flat[i], flat[j], dim=0)) for i in range(4) for j in range(i)]
        mean = sum(cosines) / 6
        expected = 4 * mean / (1 + 3 * mean) * sum(deltas) / 4
        for variant in ("fixed", "mergekit"):
            near(merged(ModelStock(variant=variant), deltas), expected)  # type: ignore[arg-type]

    def test_updates_of_zeros_are_left_out(self) -> None:
        """Of one update and a zero nothing would be left; mergekit does that."""
        _, deltas = with_cosine(3, 1.0)
        zero = torch.zeros_like(deltas[0])
        near(merged(ModelStock(), [*deltas, zero, zero]), merged(ModelStock(), deltas))
        near(merged(ModelStock(), [zero, deltas[0]]), deltas[0])
        assert not merged(ModelStock(variant="mergekit"), [zero, deltas[0]]).any()

    def test_updates_that_point_apart_keep_the_base(self) -> None:
        """The formula would turn the mean around."""
        one = torch.tensor([1.0, 0.0])
        two = torch.tensor([-0.5, math.sqrt(0.75)])
        near(merged(ModelStock(), [one, two]), torch.zeros(2))
        near(merged(ModelStock(variant="mergekit"), [one, two]), -2 * (one + two) / 2, 1e-6)  # t = 2c / (1 + c) = -2

    def test_a_scalar_that_moves_both_ways(self) -> None:
        one, two = torch.tensor(0.1), torch.tensor(-0.099)
        assert float(merged(ModelStock(), [one, two])) == 0
        with pytest.raises(InvalidInput, match=r"layers\.0\.fc\.weight.*above -1 / 1 .*found -1\.0"):
            merged(ModelStock(variant="mergekit"), [one, two])

    def test_small_updates_count_by_their_angle(self) -> None:
        """mergekit's bound for the product of norms makes them look orthogonal."""
        _, deltas = with_cosine(2, 3.0)
        small = [delta * 1e-5 for delta in deltas]
        near(merged(ModelStock(), small), merged(ModelStock(), deltas) * 1e-5, 1e-17)
        assert float(merged(ModelStock(variant="mergekit"), small).norm()) < 0.01 * float(small[0].norm())


class TestSlerp:
    @pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
    def test_it_is_the_arc(self, t: float) -> None:
        """Two vectors of one length stay on their circle, t of the angle from the first."""
        one, two = (torch.nn.functional.normalize(drawn(seed, 50), dim=0) for seed in (1, 2))
        base = drawn(3, 50)
        found = base + merged(Slerp(t=t), [one - base, two - base], base)
        angle = math.acos(float(one @ two))
        assert float(found.norm()) == pytest.approx(1, abs=1e-12)
        assert math.acos(min(float(found @ one), 1.0)) == pytest.approx(t * angle, abs=1e-6)
        assert math.acos(min(float(found @ two), 1.0)) == pytest.approx((1 - t) * angle, abs=1e-6)

    def test_lengths_are_mixed_like_directions(self) -> None:
        one, two = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 5.0])
        near(merged(Slerp(t=1 / 3), [one, two]), math.sin(math.pi / 3) * one + math.sin(math.pi / 6) * two, 1e-6)

    @pytest.mark.parametrize("t", [0.25, 0.5])
    def test_near_models_are_mixed_along_a_line(self, t: float) -> None:
        """Angles beyond |cosine| = 0.9995, on both sides; up to it, the arc."""
        base, one, two = drawn(0, 10, 10), drawn(1, 10, 10, size=0.001), drawn(2, 10, 10, size=0.001)
        near(merged(Slerp(t=t), [one, two], base), (1 - t) * one + t * two, 1e-18)
        opposite = merged(Slerp(t=t), [one, -2 * base - one], base)
        near(opposite, (1 - t) * one + t * (-2 * base - one))
        east = torch.tensor([1.0, 0.0])
        for angle, straight in ((0.0310, True), (0.0320, False)):  # acos(0.9995) = 0.03162
            turned = torch.tensor([math.cos(angle), math.sin(angle)])
            length = float(merged(Slerp(), [east.double(), turned.double()]).norm())
            assert (length < 1 - 1e-5) == straight

    def test_a_model_of_zeros_has_no_direction(self) -> None:
        one, base = drawn(1, 4, 4), drawn(0, 4, 4)
        near(merged(Slerp(t=0.25), [one - base, -base], base), 0.75 * one - base)

    def test_three_updates_are_refused(self) -> None:
        with pytest.raises(InvalidInput, match="two updates, found 3") as caught:
            merged(Slerp(), [drawn(seed, 3) for seed in (1, 2, 3)])
        assert "karcher" in str(caught.value)


def tangent_mean(mean: Tensor, points: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean of the points as seen from `mean`, on the unit sphere: zero at the Karcher mean."""
    total = torch.zeros_like(mean)
    for point, weight in zip(points, weights, strict=True):
        along = point - (point @ mean) * mean
        angle = 2 * math.asin(min(float((point - mean).norm()) / 2, 1.0))
        total += weight * angle * along / along.norm()
    return total / sum(weights)


class TestKarcher:
    @pytest.mark.parametrize("apart", [1e-4, 0.1, 1.0])
    @pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [3.0, 1.0, 0.5]], ids=str)
    def test_the_mean_tangent_is_zero_and_the_length_the_mean(self, apart: float, weights: list[float]) -> None:
        """The definition, within the tolerance, with vectors of different lengths."""
        base = drawn(0, 60)
        models = [(base + drawn(seed, 60, size=apart)) * seed for seed in (1, 2, 3)]
        found = base + merged(Karcher(), [model - base for model in models], base, weights)
        lengths = [float(model.norm()) * weight for model, weight in zip(models, weights, strict=True)]
        assert float(found.norm()) == pytest.approx(sum(lengths) / sum(weights), rel=1e-12)
        tangent = tangent_mean(found / found.norm(), [model / model.norm() for model in models], weights)
        assert float(tangent.norm()) < min(1e-5, apart**2)

    def test_near_models_are_exact_in_single_precision(self) -> None:
        """Angles of 1e-4 cannot be told from 0 by an arc cosine in float32."""
        base = drawn(0, 4000).float()
        deltas = [drawn(seed, 4000, size=1e-4).float() for seed in (1, 2, 3)]
        found = merged(Karcher(), deltas, base).double()
        exact = merged(Karcher(tolerance=1e-12), [one.double() for one in deltas], base.double())
        near(found, exact, 1e-10)
        mean = sum(one.double() for one in deltas) / 3
        assert float((exact - mean).norm()) < 0.01 * float(mean.norm())

    def test_of_two_it_is_the_middle_of_the_arc(self) -> None:
        one, two = (torch.nn.functional.normalize(drawn(seed, 20), dim=0) for seed in (1, 2))
        near(merged(Karcher(), [one, two]), merged(Slerp(), [one, two]))

    def test_on_a_circle_it_is_the_mean_angle(self) -> None:
        angles, weights = [0.1, 0.5, 1.8], [1.0, 2.0, 1.0]
        points = [torch.tensor([math.cos(one), math.sin(one)], dtype=torch.float64) for one in angles]
        mean = sum(a * w for a, w in zip(angles, weights, strict=True)) / 4
        expected = torch.tensor([math.cos(mean), math.sin(mean)], dtype=torch.float64)
        near(merged(Karcher(tolerance=1e-9), points, weights=weights), expected)

    def test_iterations_end_the_search(self) -> None:
        """None: the normalised mean of the directions. Ten are enough."""
        points = [torch.nn.functional.normalize(drawn(seed, 8).abs(), dim=0) for seed in (1, 2, 3)]
        points.append(torch.nn.functional.normalize(drawn(4, 8), dim=0))
        total = sum(points)
        assert isinstance(total, Tensor)
        near(merged(Karcher(iterations=0), points), total / total.norm())
        ten, many = (merged(Karcher(iterations=count, tolerance=1e-12), points) for count in (10, 100))
        assert float((ten - many).norm()) < 1e-5 < float((ten - total / total.norm()).norm())

    def test_opposite_models_are_averaged(self) -> None:
        base, one = drawn(0, 6), drawn(1, 6)
        near(merged(Karcher(), [one - base, -3 * one - base], base), -one - base)

    @pytest.mark.parametrize("seed", range(5))
    def test_a_model_opposite_to_the_others_moves_nothing(self, seed: int) -> None:
        """There no arc is the shortest; rounding alone would choose one."""
        one, two = (torch.nn.functional.normalize(drawn(number, 40), dim=0) for number in (seed, seed + 100))
        middle = torch.nn.functional.normalize(one + two, dim=0)
        near(merged(Karcher(), [one, two, -middle]), middle)

    def test_order_changes_no_bit_where_only_weights_differ(self) -> None:
        base, one, two = drawn(0, 30), drawn(1, 30), drawn(2, 30)
        for weights in ([0.1, 0.7, 0.3], [0.2, 0.9, 1.3], [0.3, 0.6, 1.1]):
            there = merged(Karcher(), [one, one, two], base, weights)
            assert torch.equal(there, merged(Karcher(), [two, one, one], base, [weights[2], weights[1], weights[0]]))

    def test_models_of_zeros_shorten_and_do_not_turn(self) -> None:
        one, two = drawn(1, 6), drawn(2, 6)
        both = merged(Karcher(), [one, two])
        near(merged(Karcher(), [one, two, torch.zeros(6, dtype=torch.float64)]), both * 2 / 3)
        near(merged(Karcher(), [-one, -one], one), -one)

    def test_small_weights_are_merged_like_large_ones(self) -> None:
        """mergekit writes zeros where all lengths are below its tolerance."""
        points = [drawn(seed, 12) for seed in (1, 2, 3)]
        near(merged(Karcher(), [point * 1e-8 for point in points]) * 1e8, merged(Karcher(), points))
