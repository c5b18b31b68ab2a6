"""The gate's rules, one by one: against counted cases and scipy's own tests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, ttest_rel

from storage.errors import InvalidInput
from tasks.gate import Gate, Standing, judge, paired_test

NOTHING = {"average_drop": None, "significance": None}


def standing(retained: float | None = None, **right: Sequence[float]) -> Standing:
    """Tasks and what each of their rows gave."""
    return Standing({task: sum(rows) / len(rows) for task, rows in right.items()}, right, retained)


def test_without_a_champion_and_without_rules_everything_passes() -> None:
    found = judge(Gate(), standing(a=[0, 0]), None, {"a": 1.0})
    assert found.passed
    assert found.facts == {"average": 0.0}
    assert judge(Gate(**NOTHING), standing(a=[0] * 99), standing(a=[1] * 99), {"a": 1.0}).passed


def test_the_average_may_drop_so_far_and_no_further() -> None:
    gate = Gate(average_drop=0.05, significance=None)
    champion = standing(a=[1] * 10 + [0] * 10, b=[1] * 18 + [0] * 2)  # 50 and 90: 70
    assert judge(gate, standing(a=[1] * 10 + [0] * 10, b=[1] * 16 + [0] * 4), champion, {}).passed  # 65
    failed = judge(gate, standing(a=[1] * 9 + [0] * 11, b=[1] * 16 + [0] * 4), champion, {})  # 62.5
    assert failed.reasons == (
        "its average over 2 tasks is 62.5 %, 7.5 points below the champion's 70.0 %; allowed are 5.0",
    )
    assert failed.facts == pytest.approx({"average": 0.625, "champion_average": 0.7})


def test_only_tasks_of_the_challenger_count() -> None:
    champion = standing(old=[1] * 10, new=[0] * 10)
    assert judge(Gate(), standing(old=[1] * 9 + [0], new=[1] * 9 + [0]), champion, {}).passed


def test_every_task_keeps_a_share_of_its_own_model() -> None:
    gate = Gate(**NOTHING, of_alone=0.9)
    alone = {"a": 1.0, "b": 0.5}
    assert judge(gate, standing(a=[1] * 9 + [0], b=[1] * 5 + [0] * 5), None, alone).passed
    failed = judge(gate, standing(a=[1] * 8 + [0] * 2, b=[1] * 4 + [0] * 6), None, alone)
    assert failed.reasons == (
        "'a' reaches 80.0 %, 80.0 % of its own model's 100.0 %; asked are 90.0 %",
        "'b' reaches 40.0 %, 80.0 % of its own model's 50.0 %; asked are 90.0 %",
    )


def test_the_bases_abilities() -> None:
    gate = Gate(**NOTHING, retained=0.95)
    assert judge(gate, standing(0.95, a=[1]), None, {}).passed
    failed = judge(gate, standing(0.9, a=[1]), None, {})
    assert failed.reasons == ("90.0 % of the base's ability is left, asked is 95.0 %",)
    assert failed.facts["retained"] == 0.9


def test_a_significant_loss_is_refused_even_where_the_average_would_pass() -> None:
    """Sixteen rows lost and three won of 4,000: a third of a point, but no accident."""
    champion = standing(a=[1] * 2000 + [0] * 2000)
    challenger = standing(a=[0] * 16 + [1] * 1984 + [1] * 3 + [0] * 1997)
    failed = judge(Gate(), challenger, champion, {})
    expected = binom.sf(15, 19, 0.5)
    assert failed.facts["p_worse"] == pytest.approx(expected)
    assert failed.reasons == (
        f"on 4,000 rows it is worse than the champion: p = {expected:.2g}, below 0.05, of a paired test",
    )
    assert judge(Gate(significance=expected / 2), challenger, champion, {}).passed


def test_scores_of_a_time_without_rows_are_not_tested() -> None:
    champion = Standing({"a": 0.5}, {})
    found = judge(Gate(), standing(a=[1, 0]), champion, {})
    assert found.passed and "p_worse" not in found.facts


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_right_and_wrong_is_the_exact_sign_test(rows: list[tuple[bool, bool]]) -> None:
    lost, won = rows.count((False, True)), rows.count((True, False))
    expected = binom.sf(lost - 1, lost + won, 0.5) if lost + won else 1.0
    assert paired_test([new for new, _ in rows], [old for _, old in rows]) == pytest.approx(expected)


def test_other_outcomes_have_the_paired_t_test() -> None:
    old = [0.3, 0.9, 1.4, 0.2, 0.8, 1.1]
    new = [0.2, 0.8, 1.5, 0.1, 0.6, 1.0]
    assert paired_test(new, old) == pytest.approx(ttest_rel(new, old, alternative="less").pvalue)
    assert paired_test([0.5], [0.7]) == 0.0 and paired_test([0.7], [0.5]) == 1.0
    assert paired_test([1.5, 2.5], [2.5, 3.5]) == 0.0


def test_more_losses_are_never_less_significant() -> None:
    found = [paired_test([0.0] * lost + [1.0] * (50 - lost), [1.0] * 50) for lost in range(1, 20)]
    assert all(after < before for before, after in pairwise(found))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"average_drop": -0.1}, "average_drop must be null or in"),
        ({"of_alone": 1.1}, "of_alone must be null or in"),
        ({"retained": 2}, "retained must be null or in"),
        ({"significance": 0}, "significance must be null or in"),
    ],
)
def test_wrong_rules_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        Gate(**settings)  # type: ignore[arg-type]
