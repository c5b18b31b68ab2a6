"""The verdict on updates of each sort, and each of its rules at its edge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from storage.artifacts import ArtifactStore
from storage.manifest import Lineage
from storage.refs import Ref, UpdateRef
from tasks.codecs import Ternary
from tasks.compress import compress_update
from tasks.inspect_update import inspect_update
from tasks.inspection.costs import CodecCost
from tasks.inspection.findings import Inspection, Measured
from tasks.inspection.measure import Moments, Ranks
from tasks.inspection.verdict import looks_like_rl, percent, verdict
from tasks.tensors import prefixed
from tests.builders import memory_store
from tests.tasks.inspected import case, noise, rl_case, small_steps, weights


@pytest.fixture
def store() -> ArtifactStore:
    return memory_store()


def said(found: Inspection) -> str:
    return "\n".join(verdict(found).lines)


def test_small_steps_of_bfloat16_are_for_exact(store: ArtifactStore) -> None:
    made, changed = rl_case(store, 0.05)
    found = inspect_update(made.update, store)
    assert f"{changed / found.total.elements:.1%}" == "4.8%"
    assert verdict(found).fits == "exact"
    assert "looks like an update of reinforcement learning: 4.8 % of the numbers changed, in every layer" in said(found)
    assert "norms hardly touched" in said(found)
    exact = next(one for one in found.costs if one.codec == "exact")
    assert f"`exact` keeps every bit in 1/{exact.ratio:.0f} of bfloat16" in said(found)
    assert "`low_rank` and `skillpack` are the wrong tool" in said(found)
    assert "heavy tails" not in said(found)  # zeros are no tails
    quick = inspect_update(made.update, store, codecs=())
    assert verdict(quick).fits == "exact" and looks_like_rl(quick) and "smallest" not in said(quick)


def test_a_full_fine_tuning_is_not(store: ArtifactStore) -> None:
    tensors = weights(torch.bfloat16)
    tuned = {name: one.bfloat16() for name, one in noise({k: v.float() for k, v in tensors.items()}).items()}
    found = inspect_update(case(tensors, tuned, store).update, store)
    assert not looks_like_rl(found)
    assert "reinforcement" not in said(found) and "numbers changed: to keep every bit takes" in said(found)
    within = [one for one in found.costs if not one.lossless and (one.error or 0) <= 0.3]
    assert verdict(found).fits == min(within, key=lambda one: one.bytes or 0).codec
    assert verdict(inspect_update(found.update, store, codecs=())).fits == "auto"


def test_one_frozen_layer_is_no_reinforcement_learning(store: ArtifactStore) -> None:
    tensors = weights(torch.bfloat16)
    tuned, _ = small_steps(tensors, 0.1)
    frozen = {name: tensors[name] if name.startswith("layers.2.") else one for name, one in tuned.items()}
    found = inspect_update(case(tensors, frozen, store).update, store, codecs=())
    assert not looks_like_rl(found) and verdict(found).fits == "exact"


def test_few_directions_are_for_low_rank(store: ArtifactStore) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = weights()
    tuned = {}
    for name, one in tensors.items():
        tuned[name] = one
        if one.ndim == 2:
            factors = [torch.randn(side, 2, generator=generator) * 0.05 for side in one.shape]
            tuned[name] = one + factors[0] @ factors[1].T
    found = inspect_update(case(tensors, tuned, store).update, store)
    assert verdict(found).fits == "low_rank"
    assert "few directions" in said(found) and "wrong tool" not in said(found)


def test_factors_are_left_to_be_factors(store: ArtifactStore) -> None:
    draft = store.draft("update", Lineage("extract", {"base": f"checkpoint/{'0' * 64}"}))
    parts = prefixed({"tensor": torch.randn(2, 32)}, "A") | prefixed({"tensor": torch.randn(48, 2)}, "B")
    draft.add("fc1.weight", parts, role="linear.weight", dtype="F32", shape=(48, 32), rank=2)
    found = inspect_update(UpdateRef(draft.commit()), store)
    assert "low-rank factors already" in said(found) and "wrong tool" not in said(found)
    assert verdict(found).fits != "low_rank"


def test_zeros_and_what_is_lossy_already(store: ArtifactStore) -> None:
    tensors = weights()
    zeros = inspect_update(case(tensors, tensors, store).update, store)
    assert verdict(zeros).fits == "" and "nothing changed" in said(zeros)
    small = compress_update(case(tensors, noise(tensors), store).update, Ternary(density=0.1), store)
    found = inspect_update(small, store)
    assert "a codec has changed it before: 10 % of its numbers are not zero" in said(found)
    assert verdict(found).fits != "exact" and "keeps every bit" not in said(found)


def made(
    changed: int = 300,
    *,
    kurtosis: float = 0.0,
    effective: float = 40.0,
    rank: int = 100,
    layers: tuple[int, ...] = (300, 300),
    costs: tuple[CodecCost, ...] = (),
) -> Inspection:
    """Two layers of one matrix with 1,000 numbers each."""
    moments = Moments(1000, 0.0, 1000.0, 0.0, (kurtosis + 3) * 1000.0)
    ranks = Ranks(100, rank, effective, 5.0)
    tensors = tuple(
        Measured(f"layers.{n}.fc.weight", "mlp", (100, 10), count, True, (), moments, 1.0, ranks, 0.0, None)
        for n, count in enumerate(layers if layers != (300, 300) else (changed, changed))
    )
    return Inspection(UpdateRef(Ref("update/0")), (), tensors, 1, 4000, costs, False, ())


@pytest.mark.parametrize(
    ("found", "words", "there"),
    [
        (lambda: made(500), "looks like", True),
        (lambda: made(501), "looks like", False),
        (lambda: made(layers=(400, 25)), "looks like", True),
        (lambda: made(layers=(400, 20)), "looks like", False),
        (lambda: made(rank=95), "looks like", True),
        (lambda: made(rank=94), "looks like", False),
        (lambda: replace(made(), lossy=True), "looks like", False),
        (lambda: made(effective=51), "wrong tool", True),
        (lambda: made(effective=50), "wrong tool", False),
        (lambda: made(effective=10), "few directions", True),
        (lambda: made(effective=11), "few directions", False),
        (lambda: made(900, kurtosis=6.1), "heavy tails (kurtosis 6)", True),
        (lambda: made(900, kurtosis=5.9), "heavy tails", False),
        (lambda: made(500, kurtosis=6.1), "heavy tails", False),
    ],
)
def test_the_rules_at_their_edges(found: Callable[[], Inspection], words: str, there: bool) -> None:
    assert (words in said(found())) == there


def cost(codec: str, size: int, error: float) -> CodecCost:
    return CodecCost(codec, codec == "exact", size, 4000 / size, 8 * size / 2000, error)


@pytest.mark.parametrize(
    ("found", "fits"),
    [
        (made(300, costs=(cost("exact", 2000, 0), cost("rtn", 300, 0.2))), "exact"),  # sparse, half of bfloat16
        (made(300, costs=(cost("exact", 2001, 0), cost("rtn", 300, 0.2))), "rtn"),
        (made(900, costs=(cost("exact", 600, 0), cost("rtn", 300, 0.2))), "exact"),  # what is lossy saves no more
        (made(900, costs=(cost("exact", 601, 0), cost("rtn", 300, 0.2))), "rtn"),
        (made(900, costs=(cost("exact", 1000, 0), cost("rtn", 300, 0.31))), "exact"),  # nothing else is near
        (made(900, costs=(cost("ternary", 200, 0.31), cost("rtn", 300, 0.3))), "rtn"),
        (made(900, costs=(cost("ternary", 200, 0.5),)), "auto"),
        (made(900, effective=10, costs=(cost("rtn", 300, 0.2),)), "low_rank"),
    ],
)
def test_what_fits(found: Inspection, fits: str) -> None:
    assert verdict(found).fits == fits


def test_what_is_further_off_than_nothing_is_not_offered() -> None:
    found = made(900, costs=(cost("dare", 50, 3.0), cost("ternary", 200, 0.8), cost("rtn", 300, 0.2)))
    assert "smallest: `ternary`, 20.0 times smaller" in said(found) and "dare" not in said(found)


def test_lossless_that_grows_is_said_to() -> None:
    found = made(900, costs=(cost("exact", 6000, 0),))
    assert "to keep every bit takes 1.5 times the bytes of bfloat16" in said(found)


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0.0 %"),
        (0.00003, "0.003 %"),
        (0.041, "4.1 %"),
        (0.3, "30 %"),
        (0.9997, "99.97 %"),
        (1, "100 %"),
        (3, "300 %"),
    ],
)
def test_shares_have_the_digits_that_they_need(share: float, text: str) -> None:
    assert percent(share) == text
