"""Each merger against its paper's formula and against what the reference implementation computed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tasks.mergers import Average, Parts, Sequential, Target, TaskArithmetic, Ties
from tests.contracts.test_mergers import State, Update, delta, fold, fold_all, updates

GOLDEN = Path(__file__).parents[1] / "golden" / "merge"
CASES = {case["file"]: case for case in json.loads((GOLDEN / "manifest.json").read_text())["cases"]}
KINDS = json.loads((GOLDEN / "kinds.json").read_text())
FAMILIES = {"linear": "linear", "embedding": "embedding", "conv2d": "conv", "layernorm": "norm"}


def golden_role(name: str, tensor: Tensor) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{FAMILIES[KINDS[module]]}.{leaf}" if module in KINDS else "bare"


def fold_weighted(merger: Sequential, state: State | None, update: Update, weight: float) -> State:
    """What `fold_update` does with an update of this weight, without a store."""
    before, facts = state if state is not None else ({}, {})
    held = None if state is None else delta(merger, state, golden_role)
    merged = None if held is None else lambda: (held[name] for name in update)
    survey = {**merger.survey(lambda: update.values(), merged), "weight": weight}
    parts: dict[str, Parts] = {}
    sums: dict[str, float] = {}
    for name, tau in update.items():
        parts[name], share = merger.fold(before.get(name), tau, Target(name, golden_role(name, tau)), facts, survey)
        for key, value in share.items():
            sums[key] = sums.get(key, 0.0) + value
    return parts, merger.close(facts, sums, survey)


def golden_update(task: int, dtype: torch.dtype) -> Update:
    base, tuned = load_file(GOLDEN / "in_base.safetensors"), load_file(GOLDEN / f"in_task{task}.safetensors")
    return {name: tuned[name].to(dtype) - base[name].to(dtype) for name in sorted(base)}


def golden_fold(
    merger: Sequential, order: list[int], dtype: torch.dtype, weights: Sequence[float] = ()
) -> tuple[Update, State]:
    """The merged delta and the state after folding the golden tasks in this order, all with weight 1 or with these."""
    state: State | None = None
    for task, weight in zip(order, weights or [1.0] * len(order), strict=True):
        state = fold_weighted(merger, state, golden_update(task, dtype), weight)
    assert state is not None
    return delta(merger, state, golden_role), state


def check_merged(merged: Update, file: str, tolerance: float) -> None:
    expected, base = load_file(GOLDEN / file), load_file(GOLDEN / "in_base.safetensors")
    assert expected.keys() == merged.keys()
    for name, tensor in expected.items():
        found = base[name].to(tensor.dtype) + merged[name]
        torch.testing.assert_close(found, tensor, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


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


def flat(update: Update) -> Tensor:
    return torch.cat([update[name].double().flatten() for name in sorted(update)])


def test_a_weighted_average_is_mergekits_linear() -> None:
    """mergekit rounds tensors, weights, products, sums and the quotient to bfloat16: half a unit of 2^-8 each time."""
    file, base = "mk_linear_bf16.safetensors", load_file(GOLDEN / "in_base.safetensors")
    weights, expected = CASES[file]["weights"], load_file(GOLDEN / file)
    merged, _ = golden_fold(Average(), [0, 1, 2, 3], torch.float32, weights)
    for name, tensor in expected.items():
        largest = (
            torch.stack([load_file(GOLDEN / f"in_task{task}.safetensors")[name] for task in range(4)]).abs().amax(0)
        )
        error = (base[name] + merged[name] - tensor.float()).abs()
        assert (error <= 5 * 2**-9 * largest + 1e-9).all(), name
    # the rounding hides which weights were used in a single entry, not over all of them
    taus = torch.stack([flat(golden_update(task, torch.float64)) for task in range(4)], dim=1)
    for one in (flat(expected) - flat(base), flat(merged)):
        found = torch.linalg.lstsq(taus, one[:, None]).solution.flatten()
        torch.testing.assert_close(found, torch.tensor(weights, dtype=torch.float64), rtol=0, atol=0.02)


def test_weights_of_task_arithmetic_multiply_its_updates() -> None:
    weights = [0.5, 2.0, 1.0, 3.0]
    merged, _ = golden_fold(TaskArithmetic(scale=0.3), [0, 1, 2, 3], torch.float64, weights)
    taus = [golden_update(task, torch.float64) for task in range(4)]
    for name, tensor in merged.items():
        expected = 0.3 * sum(weight * tau[name] for weight, tau in zip(weights, taus, strict=True))
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-12)


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
