"""SCE against its paper's formula, and against what the two implementations of it computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tasks.mergers import Sce
from tests.tasks.test_joint_mergers import drawn, merged, near

GOLDEN = Path(__file__).parents[1] / "golden" / "merge"


def by_the_paper(deltas: Sequence[Tensor], topk: float) -> Tensor:
    """SCE entry by entry, in plain numbers: variance, selection, weights, minority signs."""
    rows = [delta.flatten().tolist() for delta in deltas]
    columns = list(zip(*rows, strict=True))
    means = [math.fsum(column) / len(column) for column in columns]
    spread = [math.fsum((x - mean) ** 2 for x in column) for column, mean in zip(columns, means, strict=True)]
    ranked = sorted(range(len(spread)), key=lambda place: -spread[place])
    chosen = set(ranked[: int(topk * len(ranked))])
    squares = [math.fsum(row[place] ** 2 for place in chosen) for row in rows]
    found = []
    for place, column in enumerate(columns):
        wanted = 1 if math.fsum(column) >= 0 else -1
        kept = [(w, x) for w, x in zip(squares, column, strict=True) if x * wanted > 0] if place in chosen else []
        found.append(math.fsum(w * x for w, x in kept) / math.fsum(w for w, _ in kept) if kept else 0.0)
    return torch.tensor(found, dtype=torch.float64).reshape(deltas[0].shape)


class TestSce:
    @pytest.mark.parametrize(
        ("file", "topk", "factor", "variants"),
        [
            ("fuseai_sce_top0.1_f32", 0.1, 1, ["fuseai"]),
            ("mk_sce_top0.1_f32", 0.1, 1, ["mergekit", "paper"]),
            ("mk_sce_top0.5_x20_f32", 0.5, 20, ["mergekit", "paper"]),
        ],
    )
    def test_it_is_the_reference(self, file: str, topk: float, factor: int, variants: list[str]) -> None:
        """No entries tie in these tensors, and all their mean squares are large enough for mergekit to weigh by them:
        so the paper's rules and mergekit's agree."""
        base = load_file(GOLDEN / "in_base.safetensors")
        tuned = [load_file(GOLDEN / f"in_task{task}.safetensors") for task in range(4)]
        for variant in variants:
            merger = Sce(select_topk=topk, variant=variant)  # type: ignore[arg-type]
            for name, expected in load_file(GOLDEN / f"{file}.safetensors").items():
                deltas = [one[name] - base[name] for one in tuned]
                if factor != 1:
                    deltas = [base[name] + factor * delta - base[name] for delta in deltas]
                near(base[name] + merged(merger, deltas, base[name]), expected, 5e-7)

    @pytest.mark.parametrize("topk", [0.05, 0.3, 1.0])
    def test_it_is_the_paper(self, topk: float) -> None:
        deltas = [drawn(seed, 12, 9) + drawn(0, 12, 9) for seed in (1, 2, 3)]
        near(merged(Sce(select_topk=topk), deltas), by_the_paper(deltas, topk))

    def test_fuseai_selects_for_the_weights_alone(self) -> None:
        deltas = [drawn(seed, 40, 5) for seed in (1, 2, 3)]
        paper, fuseai = (merged(Sce(variant=variant), deltas) for variant in ("paper", "fuseai"))  # type: ignore[arg-type]
        assert int((paper != 0).sum()) == 20 and int((fuseai != 0).sum()) == 200
        # where all updates have one sign nothing is erased, and the two agree
        agreeing = (paper != 0) & (torch.stack(deltas).sign().sum(0).abs() == 3)
        assert agreeing.any()
        near(paper[agreeing], fuseai[agreeing])

    def test_mergekit_weighs_small_updates_alike(self) -> None:
        """Standard deviations of 1e-4 and 3e-4: mean squares of 1 to 9, which mergekit takes for zeros."""
        small, large = drawn(1, 100, 100, size=1e-4).abs(), drawn(2, 100, 100, size=3e-4).abs()
        paper, mergekit = (
            merged(Sce(select_topk=1.0, variant=variant), [small, large])  # type: ignore[arg-type]
            for variant in ("paper", "mergekit")
        )
        near(mergekit, (small + large) / 2)
        share = float(large.square().sum() / (small.square().sum() + large.square().sum()))
        assert share == pytest.approx(0.9, abs=0.01)
        near(paper, (1 - share) * small + share * large)

    def test_entries_that_tie_are_selected_together(self) -> None:
        """Compressed to three values, variances tie; the two implementations take the first of them."""
        one = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
        two = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
        expected = {"paper": [2, 3, 4, 7], "mergekit": [2, 3]}
        for variant, places in expected.items():
            found = merged(Sce(select_topk=0.5, variant=variant), [one, two])  # type: ignore[arg-type]
            assert found.nonzero().flatten().tolist() == places

    @pytest.mark.parametrize("step", [0.1, 2**-9, 3e-5])
    @pytest.mark.parametrize("count", [3, 5, 6, 7])
    def test_equal_steps_tie_whichever_update_took_them(self, count: int, step: float) -> None:
        """As tuning in bfloat16 makes them: each entry moved by one step, by one update, up or down."""
        deltas = [torch.zeros(4 * count) for _ in range(count)]
        for place in range(4 * count):
            deltas[place % count][place] = step * (-1) ** (place // count)
        found = merged(Sce(select_topk=0.3), deltas)
        torch.testing.assert_close(found, torch.stack(deltas).sum(0))

    def test_small_tensors_are_merged(self) -> None:
        """A tenth of five entries is none; the paper's variant selects the one in which the updates differ most."""
        one, two = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([1.0, 2.0, 3.1, 1.0, 5.0])
        assert merged(Sce(), [one, two]).nonzero().flatten().tolist() == [3]
        assert not merged(Sce(variant="mergekit"), [one, two]).any()

    def test_one_update_by_variant(self) -> None:
        """mergekit's rules select nothing where nothing varies: one update alone is lost, here too."""
        update = drawn(1, 6, 6)
        for variant, expected in (("paper", update), ("fuseai", update), ("mergekit", torch.zeros(6, 6))):
            near(merged(Sce(variant=variant), [update]), expected.double())  # type: ignore[arg-type]

    def test_a_tie_of_signs_is_positive(self) -> None:
        one = torch.tensor([3.0, -2.0])
        near(merged(Sce(select_topk=1.0), [one, -one]), torch.tensor([3.0, 2.0]))

    @pytest.mark.parametrize("variant", ["paper", "fuseai", "mergekit"])
    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 10**6), order=st.permutations(range(5)), levels=st.integers(1, 4))
    def test_order_changes_no_bit(self, variant: str, seed: int, order: list[int], levels: int) -> None:
        """With few distinct values too, where sums cancel and variances tie."""
        deltas = [(drawn(seed + one, 9, 4) * levels).round().float() * 0.1 for one in range(5)]
        merger = Sce(select_topk=0.3, variant=variant)  # type: ignore[arg-type]
        assert torch.equal(merged(merger, deltas), merged(merger, [deltas[place] for place in order]))
