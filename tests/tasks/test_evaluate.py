"""What the accuracy matrix says, against the formulas worked out by hand."""

from __future__ import annotations

import pytest

from tasks.evaluate import Summary, summarise, tradeoff, with_abilities


def test_summary_of_three_steps() -> None:
    matrix = [
        {"a": 0.9},
        {"a": 0.95, "b": 0.8},
        {"a": 0.7, "b": 0.85, "c": 0.6},
    ]
    found = summarise(matrix, {"a": 1.0, "b": 0.85, "c": 0.8})
    assert found.average == pytest.approx((0.7 + 0.85 + 0.6) / 3)
    assert found.worst == 0.6
    assert found.backward_transfer == pytest.approx(((0.7 - 0.9) + (0.85 - 0.8)) / 2)
    assert found.forgetting == pytest.approx(((0.95 - 0.7) + (0.8 - 0.85)) / 2)  # the best before the last step
    assert found.normalised == pytest.approx((0.7 / 1.0 + 0.85 / 0.85 + 0.6 / 0.8) / 3)


def test_one_step_has_nothing_to_forget() -> None:
    found = summarise([{"a": 0.5}], {"a": 0.5})
    assert (found.average, found.worst, found.normalised) == (0.5, 0.5, 1.0)
    assert found.backward_transfer is None
    assert found.forgetting is None


def test_a_task_without_a_single_model_leaves_the_normalised_score_open() -> None:
    assert summarise([{"a": 0.5}], {}).normalised is None
    assert summarise([{"a": 0.5}], {"a": 0.0}).normalised is None


def test_forward_transfer_is_what_unmet_tasks_gain_over_the_base() -> None:
    """(Lopez-Paz & Ranzato 2017, eq. 4): over the tasks from the second on."""
    matrix = [{"a": 0.9}, {"a": 0.8, "b": 0.7}, {"a": 0.7, "b": 0.6, "c": 0.5}]
    ahead, base = {"b": 0.25, "c": 0.1, "elsewhere": 0.9}, {"a": 0.12, "b": 0.1, "c": 0.3}
    found = summarise(matrix, {}, ahead, base)
    assert found.forward_transfer == pytest.approx(((0.25 - 0.1) + (0.1 - 0.3)) / 2)
    assert summarise(matrix, {}, {"b": 0.25}, base).forward_transfer is None, "one of them was not measured"
    assert summarise(matrix, {}).forward_transfer is None
    assert summarise(matrix[:1], {}, ahead, base).forward_transfer is None
    rounds = [{"a": 0.9}, {"a": 0.95}, {"a": 0.8, "b": 0.7}, {"a": 0.8, "b": 0.9}]
    assert summarise(rounds, {}, ahead, base).forward_transfer == pytest.approx(0.25 - 0.1)


def test_the_tradeoff_is_the_geometric_mean_of_what_is_gained_and_held() -> None:
    found = with_abilities(
        summarise([{"a": 0.9}, {"a": 0.9, "b": 0.4}], {}), {"x": 0.5, "y": 0.3}, {"x": 1.0, "y": 0.4}
    )
    assert found.held_out == pytest.approx(0.4)
    assert found.retained == pytest.approx((0.5 / 1.0 + 0.3 / 0.4) / 2)
    assert found.tradeoff == pytest.approx((0.65 * 0.4) ** 0.5)
    assert tradeoff(-0.1, 0.5) is None, "no geometric mean of a negative score"
    plain = Summary(0.5, 0.5, None, None, None)
    assert with_abilities(plain, {}, {}) == plain
