"""OPCM against the paper's formula in full bases, against the two reference implementations, and what always holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.mergers import Opcm, Target
from tests.contracts.test_mergers import Update, delta, fold, fold_all, updates, zeros
from tests.tasks.test_merging import CASES, check_merged, golden_fold

# fusion_bench removes the diagonal; in the code behind the paper's tables the line that should writes into a copy
DIAGONAL = {"fusion_bench OPCM (opcm_general)": "remove", "tanganke/opcm repo (.diag() no-op)": "leave"}

# lambda of the projection as printed on the golden tasks 0, 1, 2, 3 with alpha 0.5 in float64, found apart from this
# code, with full bases
TWO_SIDED = [1.0, 1.4148839195889047, 1.607160347413136, 1.8476526275866034]

EVERY = [(variant, diagonal) for variant in ("fixed", "reference", "paper") for diagonal in ("remove", "leave")]
each_setting = pytest.mark.parametrize(("variant", "diagonal"), EVERY)
SHAPES = [(12, 12), (30, 11), (11, 30), (40, 33), (1, 7), (7, 1), (1, 1)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def low_rank(rows: int, columns: int, rank: int, seed: int = 0) -> Tensor:
    return drawn(rows, rank, seed=seed) @ drawn(rank, columns, seed=seed + 100)


def added(merger: Opcm, merged: Tensor, tau: Tensor) -> Tensor:
    """g: what folding tau into the state `merged` adds."""
    parts, _ = merger.fold({"sum": merged}, tau, Target("l.weight", "linear.weight"), {}, {})
    return parts["sum"] - merged


def printed(merged: Tensor, tau: Tensor, alpha: float, variant: str, diagonal: str) -> Tensor:
    """Section by section as the papers and codes write it: full bases, loops, nothing saved."""
    U, s, Vh = torch.linalg.svd(merged, full_matrices=True)
    shares = [float(s[: count + 1].sum() / s.sum()) for count in range(len(s))]
    P = U.T @ tau @ Vh.T
    for i in range(P.shape[0]):
        for j in range(P.shape[1]):
            if variant == "paper":
                r = next(count for count in range(1, len(s) + 1) if shares[count - 1] >= alpha)
                gone = i < r or j < r
            else:
                r = next(count for count in range(len(s)) if shares[count] > alpha)
                gone = i < r and j < r
            if gone or (i == j and diagonal == "remove"):
                P[i, j] = 0
    return U @ P @ Vh


@pytest.mark.parametrize("file", sorted(file for file in CASES if file.startswith("opcm")))
def test_reference_implementations(file: str) -> None:
    """1e-12 in float64, where the thin SVD differs from the full one in the last bits; 5e-7 in float32."""
    case: dict[str, Any] = CASES[file]
    diagonal: Any = DIAGONAL[case["impl"]]
    merger = Opcm(alpha=case["alpha"], variant="reference", diagonal=diagonal, accumulate=case["dtype"])
    merged, (_, facts) = golden_fold(merger, case["order"][: case["step"] + 1], getattr(torch, case["dtype"]))
    exact = case["dtype"] == "float64"
    check_merged(merged, file, 1e-12 if exact else 5e-7)
    relative = 1e-12 if exact else 1e-6
    assert 1 / facts["scale"] == pytest.approx(case["lambda_t"], rel=relative)
    assert facts["norms"] / facts["count"] == pytest.approx(case["avg_task_vector_norm"], rel=relative)


def test_both_reference_implementations_are_among_the_cases() -> None:
    assert {case["impl"] for file, case in CASES.items() if file.startswith("opcm")} == DIAGONAL.keys()


@pytest.mark.parametrize(("count", "expected"), list(enumerate(TWO_SIDED, start=1)))
def test_the_projection_as_printed(count: int, expected: float) -> None:
    merger = Opcm(variant="paper", accumulate="float64")
    _, (_, facts) = golden_fold(merger, list(range(count)), torch.float64)
    assert 1 / facts["scale"] == pytest.approx(expected, rel=1e-12)


@each_setting
@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula_in_full_bases(shape: tuple[int, int], alpha: float, variant: Any, diagonal: Any) -> None:
    merged, tau = drawn(*shape), drawn(*shape, seed=1)
    merger = Opcm(alpha=alpha, variant=variant, diagonal=diagonal, accumulate="float64")
    expected = printed(merged, tau, alpha, variant, diagonal)
    torch.testing.assert_close(added(merger, merged, tau), expected, rtol=0, atol=1e-12)


@each_setting
@pytest.mark.parametrize("shape", [(64, 64), (160, 48), (48, 160)], ids=str)
def test_float32_is_as_close_as_float32_allows(shape: tuple[int, int], variant: Any, diagonal: Any) -> None:
    """tau shares much with the state, so that most of it goes; 1e-5 of its norm."""
    merged = drawn(*shape).float()
    tau = (drawn(*shape, seed=1) + 2 * merged).float()
    expected = printed(merged.double(), tau.double(), 0.5, variant, diagonal)
    found = added(Opcm(variant=variant, diagonal=diagonal), merged, tau)
    assert found.dtype == torch.float32
    assert (found.double() - expected).norm() < 1e-5 * tau.norm()


def test_fixed_differs_from_the_reference_in_bare_parameters_alone() -> None:
    """On matrices of full rank the two variants project alike; only the rescaling, a global norm, is shared."""
    one, two = (
        golden_fold(Opcm(variant=variant, accumulate="float64"), [0, 1, 2], torch.float64)[1][0]
        for variant in ("fixed", "reference")
    )
    different = {name for name in one if not torch.allclose(one[name]["sum"], two[name]["sum"], rtol=0, atol=1e-12)}
    assert different == {"visual.emb.class_embedding"}


@pytest.mark.parametrize("variant", ["fixed", "reference", "paper"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_what_is_added_is_orthogonal_to_what_was_there(variant: Any, alpha: float) -> None:
    """<g_t, S_{t-1}> = 0, the reason for the method. Relative to both norms, in float32."""
    merger = Opcm(variant=variant, alpha=alpha)
    state = fold(merger, None, updates(1)[0])
    for update in updates(5)[1:]:
        after = fold(merger, state, update)
        for name in ("layer.weight", "out.weight"):
            before = state[0][name]["sum"].double()
            step = after[0][name]["sum"].double() - before
            assert abs((step * before).sum()) < 1e-6 * step.norm() * before.norm()
            assert step.norm() > 0.1 * update[name].norm()
        state = after


@pytest.mark.parametrize("shape", [(96, 96), (200, 60), (60, 200)], ids=str)
@pytest.mark.parametrize("rank", [1, 5, None])
def test_orthogonal_whatever_the_shape_and_rank(shape: tuple[int, int], rank: int | None) -> None:
    """In float32, where the vectors come by different ways, and for a newcomer that is nearly the state itself."""
    merged = (drawn(*shape) if rank is None else low_rank(*shape, rank)).float()
    tau = (merged + 0.1 * drawn(*shape, seed=1)).float()
    for alpha in (0.0, 0.5):
        step = added(Opcm(alpha=alpha), merged, tau).double()
        assert abs((step * merged).sum()) < 2e-6 * tau.norm() * merged.norm()
        assert step.norm() > 0.05 * math.sqrt(tau.numel())  # most of the noise stays


def test_left_in_the_diagonal_is_a_small_part() -> None:
    """For noise on noise, one number in K beyond the block: at 160 x 160 less than one per cent of the energy."""
    merged, tau = drawn(160, 160).float(), drawn(160, 160, seed=1).float()
    there, gone = (added(Opcm(diagonal=diagonal), merged, tau) for diagonal in ("leave", "remove"))  # type: ignore[arg-type]
    share = float((there - gone).norm() / tau.norm()) ** 2
    assert 0.2 / 160 < share < 0.01
    assert abs((there.double() * merged).sum()) > 1e-4 * there.norm() * merged.norm()


def test_rank_one_is_the_closed_form() -> None:
    """One direction u v^T: exactly its component goes, and the arbitrary basis of the rest stays out of it."""
    u, v = (torch.nn.functional.normalize(drawn(n), dim=0) for n in (12, 7))
    first, tau = 3 * torch.outer(u, v), drawn(12, 7, seed=1)
    expected = tau - (u @ tau @ v) * torch.outer(u, v)
    torch.testing.assert_close(added(Opcm(accumulate="float64"), first, tau), expected, rtol=0, atol=1e-12)
    # the one direction is protected, so on both sides nothing of it stays
    expected = tau - torch.outer(u, u @ tau) - torch.outer(tau @ v, v) + (u @ tau @ v) * torch.outer(u, v)
    for diagonal in ("remove", "leave"):
        merger = Opcm(variant="paper", diagonal=diagonal, accumulate="float64")  # type: ignore[arg-type]
        torch.testing.assert_close(added(merger, first, tau), expected, rtol=0, atol=1e-12)


def test_protected_block_is_removed() -> None:
    """Singular values 4, 3, 2, 1 and alpha 0.8: the sums .4, .7 are within, so the block is two by two."""
    state = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    tau = torch.arange(1.0, 17.0, dtype=torch.float64).reshape(4, 4)
    kept = tau.clone()
    kept[:2, :2] = 0
    left = added(Opcm(alpha=0.8, diagonal="leave", accumulate="float64"), state, tau)
    torch.testing.assert_close(left, kept, rtol=0, atol=1e-12)
    removed = added(Opcm(alpha=0.8, accumulate="float64"), state, tau)
    torch.testing.assert_close(removed, kept.fill_diagonal_(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("diagonal", ["remove", "leave"])
def test_alpha_zero_protects_nothing(diagonal: Any) -> None:
    merged, tau = drawn(20, 12), drawn(20, 12, seed=1)
    results = [
        added(Opcm(alpha=0.0, variant=variant, diagonal=diagonal, accumulate="float64"), merged, tau)
        for variant in ("fixed", "reference", "paper")  # type: ignore[arg-type]
    ]
    U, _, Vh = torch.linalg.svd(merged, full_matrices=False)
    gone = 0 if diagonal == "leave" else U @ torch.diag(torch.diagonal(U.T @ tau @ Vh.T)) @ Vh
    for found in results:
        torch.testing.assert_close(found, tau - gone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["class_token", "layer.bias", "embed.weight"])
@pytest.mark.parametrize("variant", ["fixed", "paper"])
def test_other_parameters_are_summed(variant: Any, name: str) -> None:
    parts, _ = fold_all(Opcm(variant=variant), updates(3))
    torch.testing.assert_close(parts[name]["sum"], sum(update[name] for update in updates(3)))


def test_embeddings_are_projected_if_asked() -> None:
    one, two = (fold_all(Opcm(project=project), updates(2))[0] for project in ("linear", "matrices"))  # type: ignore[arg-type]
    assert not torch.allclose(one["embed.weight"]["sum"], two["embed.weight"]["sum"])
    assert torch.equal(one["layer.weight"]["sum"], two["layer.weight"]["sum"])


@each_setting
def test_the_merged_norm_is_the_mean_of_the_norms(variant: Any, diagonal: Any) -> None:
    merger, state, norms = Opcm(variant=variant, diagonal=diagonal), None, []
    for update in updates(5):
        state = fold(merger, state, update)
        norms.append(norm(update))
        assert norm(delta(merger, state)) == pytest.approx(sum(norms) / len(norms), rel=1e-5)


@pytest.mark.parametrize(("variant", "diagonal"), [(v, d) for v, d in EVERY if v != "reference"])
def test_zero_states_and_zero_updates_pass_through(variant: Any, diagonal: Any) -> None:
    merger, update = Opcm(variant=variant, diagonal=diagonal), updates(1)[0]
    parts, facts = fold_all(merger, [zeros(), update])
    assert all(torch.equal(parts[name]["sum"], tensor) for name, tensor in update.items())
    assert facts["scale"] == pytest.approx(0.5)
    before, after = fold_all(merger, updates(2)), fold_all(merger, [*updates(2), zeros()])
    assert all(torch.equal(parts["sum"], after[0][name]["sum"]) for name, parts in before[0].items())


def test_a_zero_state_costs_the_reference_its_diagonal() -> None:
    """The quirk is kept: the singular vectors of zeros are unit vectors. Without the diagonal nothing goes."""
    for shape in ((9, 5), (5, 9), (6, 6)):
        tau, nothing = drawn(*shape).float(), torch.zeros(shape)
        assert torch.equal(added(Opcm(variant="reference"), nothing, tau), tau.clone().fill_diagonal_(0))
        assert torch.equal(added(Opcm(variant="reference", diagonal="leave"), nothing, tau), tau)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
@each_setting
def test_empty_matrices(shape: tuple[int, int], variant: Any, diagonal: Any) -> None:
    empty = torch.zeros(shape)
    assert added(Opcm(variant=variant, diagonal=diagonal), empty, empty).shape == shape


@pytest.mark.parametrize(("variant", "diagonal"), [(v, d) for v, d in EVERY if v != "reference"])
@pytest.mark.parametrize("columns", [8, 24])
def test_low_rank_updates_are_independent_of_the_null_space(variant: Any, diagonal: Any, columns: int) -> None:
    """Rows of zeros added to a matrix change its null space and nothing else: so must they to the result."""
    merger = Opcm(variant=variant, diagonal=diagonal)
    several = [low_rank(16, columns, 2, seed=seed).float() for seed in range(3)]
    whole, _ = fold_all(merger, [{"l.weight": one} for one in several])
    padded, _ = fold_all(merger, [{"l.weight": torch.cat([one, torch.zeros(40, columns)])} for one in several])
    assert not padded["l.weight"]["sum"][16:].any()
    torch.testing.assert_close(padded["l.weight"]["sum"][:16], whole["l.weight"]["sum"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_setting
def test_half_precision_updates_accumulate_in_full(variant: Any, diagonal: Any, dtype: torch.dtype) -> None:
    """The same bits as folding what the files hold in float32: nothing is rounded to their dtype on the way."""
    merger = Opcm(variant=variant, diagonal=diagonal)
    halves = [{name: tensor.to(dtype) for name, tensor in update.items()} for update in updates(3)]
    wide: list[Update] = [{name: tensor.float() for name, tensor in update.items()} for update in halves]
    found, expected = fold_all(merger, halves)[0], fold_all(merger, wide)[0]
    assert all(torch.equal(parts["sum"], expected[name]["sum"]) for name, parts in found.items())
    assert {parts["sum"].dtype for parts in found.values()} == {torch.float32}


def test_float64_states_from_float32_updates() -> None:
    parts, _ = fold_all(Opcm(accumulate="float64"), updates(2))
    assert {one["sum"].dtype for one in parts.values()} == {torch.float64}


def norm(update: dict[str, Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in update.values()]).double().norm())
