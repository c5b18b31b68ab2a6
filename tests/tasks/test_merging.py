"""Each merger against its paper's formula and against what the reference implementation computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tasks.mergers import Average, Opcm, Sequential, Target, TaskArithmetic, Ties
from tests.contracts.test_mergers import State, Update, delta, fold, fold_all, updates, zeros

GOLDEN = Path(__file__).parents[1] / "golden" / "merge"
CASES = {case["file"]: case for case in json.loads((GOLDEN / "manifest.json").read_text())["cases"]}
KINDS = json.loads((GOLDEN / "kinds.json").read_text())
FAMILIES = {"linear": "linear", "embedding": "embedding", "conv2d": "conv", "layernorm": "norm"}


def golden_role(name: str, tensor: Tensor) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{FAMILIES[KINDS[module]]}.{leaf}" if module in KINDS else "bare"


def golden_fold(merger: Sequential, order: list[int], dtype: torch.dtype) -> tuple[Update, State]:
    """The merged delta and the state after folding the golden tasks in this order."""
    base = load_file(GOLDEN / "in_base.safetensors")
    state: State | None = None
    for task in order:
        tuned = load_file(GOLDEN / f"in_task{task}.safetensors")
        update = {name: tuned[name].to(dtype) - base[name].to(dtype) for name in sorted(base)}
        state = fold(merger, state, update, role=golden_role)
    assert state is not None
    return delta(merger, state, golden_role), state


def check_merged(merged: Update, file: str, tolerance: float) -> None:
    expected, base = load_file(GOLDEN / file), load_file(GOLDEN / "in_base.safetensors")
    assert expected.keys() == merged.keys()
    for name, tensor in expected.items():
        found = base[name].to(tensor.dtype) + merged[name]
        torch.testing.assert_close(found, tensor, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("file", sorted(file for file in CASES if file.startswith("opcm")))
def test_opcm_is_fusion_bench(file: str) -> None:
    """1e-12 in float64, where the thin SVD differs from the full one in the last bits; 5e-7 in float32."""
    case: dict[str, Any] = CASES[file]
    merger = Opcm(alpha=case["alpha"], variant="reference", accumulate=case["dtype"])
    merged, (_, facts) = golden_fold(merger, case["order"][: case["step"] + 1], getattr(torch, case["dtype"]))
    exact = case["dtype"] == "float64"
    check_merged(merged, file, 1e-12 if exact else 5e-7)
    relative = 1e-12 if exact else 1e-6
    assert 1 / facts["scale"] == pytest.approx(case["lambda_t"], rel=relative)
    assert facts["norms"] / facts["count"] == pytest.approx(case["avg_task_vector_norm"], rel=relative)


def test_fixed_opcm_differs_from_the_reference_in_bare_parameters_alone() -> None:
    """On matrices of full rank the two variants project alike; only the rescaling, a global norm, is shared."""
    one, two = (
        golden_fold(Opcm(variant=variant, accumulate="float64"), [0, 1, 2], torch.float64)[1][0]
        for variant in ("fixed", "reference")
    )
    different = {name for name in one if not torch.allclose(one[name]["sum"], two[name]["sum"], rtol=0, atol=1e-12)}
    assert different == {"visual.emb.class_embedding"}


@pytest.mark.parametrize(
    ("merger", "file"),
    [
        (TaskArithmetic(scale=0.3), "cont_ta_f32_step3.safetensors"),
        (Average(), "cont_avg_f32_step3.safetensors"),
        (Ties(density=0.2, scale=0.3, aggregate="sum"), "fb_ties_32.safetensors"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_baselines_are_fusion_bench(merger: Sequential, file: str) -> None:
    check_merged(golden_fold(merger, [0, 1, 2, 3], torch.float32)[0], file, 5e-7)


def joint_ties(several: list[Update], keep: int) -> Update:
    """TIES as the paper states it, with every update in memory: trim, elect, mean of those that agree (equations 1, 2).

    Where the paper leaves a choice, an election that ends in exactly zero, the majority of the model decides.
    """
    rows = torch.stack([torch.cat([tensor.flatten() for tensor in update.values()]) for update in several]).double()
    order = rows.abs().argsort(dim=1, descending=True)
    trimmed = torch.zeros_like(rows).scatter(1, order[:, :keep], rows.gather(1, order[:, :keep]))
    elected = trimmed.sum(0).sign()
    elected[elected == 0] = elected.sum().sign()
    agreeing = trimmed * (trimmed.sign() == elected)
    mean = agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)
    pieces = mean.split([tensor.numel() for tensor in several[0].values()])
    return {name: piece.reshape(several[0][name].shape) for name, piece in zip(several[0], pieces, strict=True)}


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_streams_the_joint_method(density: float) -> None:
    """After every step, not only at the end. Trimming keeps the threshold itself: one more than the share."""
    several, merger, state = updates(6), Ties(density=density), None
    count = sum(tensor.numel() for tensor in several[0].values())
    keep = min(int(count * density) + 1, count)
    for step, update in enumerate(several):
        state = fold(merger, state, update)
        expected = joint_ties(several[: step + 1], keep)
        for name, tensor in delta(merger, state).items():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-10)


def test_ties_gives_undecided_entries_the_sign_of_the_majority() -> None:
    first = {"w": torch.tensor([[2.0, -1.0, 4.0, -8.0]])}
    second = {"w": torch.tensor([[-2.0, -1.0, -4.0, -8.0]])}
    merged = delta(Ties(density=1.0), fold_all(Ties(density=1.0), [first, second]))
    assert merged["w"].tolist() == [[-2.0, -1.0, -4.0, -8.0]]


class TestOpcm:
    """What holds of OPCM whatever the numbers are."""

    def test_what_is_added_is_orthogonal_to_what_was_there(self) -> None:
        """<g_t, S_{t-1}> = 0, the reason for the method. Relative to both norms, in float32."""
        merger, state = Opcm(), fold(Opcm(), None, updates(1)[0])
        for update in updates(5)[1:]:
            after = fold(merger, state, update)
            for name in ("layer.weight", "out.weight"):
                before = state[0][name]["sum"].double()
                added = after[0][name]["sum"].double() - before
                assert abs((added * before).sum()) < 1e-6 * added.norm() * before.norm()
                assert added.norm() > 0.1 * update[name].norm()
            state = after

    def test_rank_one_is_the_closed_form(self) -> None:
        """One direction u v^T: exactly its component goes, and the arbitrary basis of the rest stays out of it."""
        torch.manual_seed(0)
        u, v = (torch.nn.functional.normalize(torch.randn(n, dtype=torch.float64), dim=0) for n in (12, 7))
        first, tau = 3 * torch.outer(u, v), torch.randn(12, 7, dtype=torch.float64)
        parts, _ = fold_all(Opcm(accumulate="float64"), [{"l.weight": first}, {"l.weight": tau}])
        expected = first + tau - (u @ tau @ v) * torch.outer(u, v)
        torch.testing.assert_close(parts["l.weight"]["sum"], expected, rtol=0, atol=1e-12)

    def test_protected_block_is_removed(self) -> None:
        """Singular values 4, 3, 2, 1 and alpha 0.8: the sums .4, .7 are within, so the block is two by two."""
        state = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
        tau = torch.arange(1.0, 17.0, dtype=torch.float64).reshape(4, 4)
        parts, _ = fold_all(Opcm(alpha=0.8, accumulate="float64"), [{"l.weight": state}, {"l.weight": tau}])
        kept = tau.clone().fill_diagonal_(0)
        kept[:2, :2] = 0
        torch.testing.assert_close(parts["l.weight"]["sum"] - state, kept, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("name", ["class_token", "layer.bias", "embed.weight"])
    def test_other_parameters_are_summed(self, name: str) -> None:
        parts, _ = fold_all(Opcm(), updates(3))
        torch.testing.assert_close(parts[name]["sum"], sum(update[name] for update in updates(3)))

    def test_embeddings_are_projected_if_asked(self) -> None:
        one, two = (fold_all(Opcm(project=project), updates(2))[0] for project in ("linear", "matrices"))
        assert not torch.allclose(one["embed.weight"]["sum"], two["embed.weight"]["sum"])
        assert torch.equal(one["layer.weight"]["sum"], two["layer.weight"]["sum"])

    @pytest.mark.parametrize("variant", ["fixed", "reference"])
    def test_the_merged_norm_is_the_mean_of_the_norms(self, variant: str) -> None:
        merger, state, norms = Opcm(variant=variant), None, []  # type: ignore[arg-type]
        for update in updates(5):
            state = fold(merger, state, update)
            norms.append(norm(update))
            assert norm(delta(merger, state)) == pytest.approx(sum(norms) / len(norms), rel=1e-5)

    def test_a_zero_state_takes_the_whole_update(self) -> None:
        update = updates(1)[0]
        parts, facts = fold_all(Opcm(), [zeros(), update])
        assert all(torch.equal(parts[name]["sum"], tensor) for name, tensor in update.items())
        assert facts["scale"] == pytest.approx(0.5)

    def test_a_zero_update_leaves_the_state(self) -> None:
        before, after = fold_all(Opcm(), updates(2)), fold_all(Opcm(), [*updates(2), zeros()])
        assert all(torch.equal(parts["sum"], after[0][name]["sum"]) for name, parts in before[0].items())

    def test_low_rank_updates_are_independent_of_the_null_space(self) -> None:
        """Rows of zeros added to a matrix change its null space and nothing else: so must they to the result."""
        generator = torch.Generator().manual_seed(0)
        several = [torch.randn(8, 2, generator=generator) @ torch.randn(2, 8, generator=generator) for _ in range(3)]
        square, _ = fold_all(Opcm(), [{"l.weight": one} for one in several])
        padded, _ = fold_all(Opcm(), [{"l.weight": torch.cat([one, torch.zeros(24, 8)])} for one in several])
        torch.testing.assert_close(padded["l.weight"]["sum"][:8], square["l.weight"]["sum"], rtol=0, atol=1e-5)

    def test_half_precision_updates_accumulate_in_full(self) -> None:
        update = {name: tensor.bfloat16() for name, tensor in updates(1)[0].items()}
        parts, _ = Opcm().fold(None, update["layer.weight"], Target("layer.weight", "linear.weight"), {}, {})
        assert parts["sum"].dtype == torch.float32


def norm(update: dict[str, Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in update.values()]).double().norm())
