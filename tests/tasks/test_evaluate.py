"""What the accuracy matrix says, against the formulas worked out by hand."""

from __future__ import annotations

import pytest

from tasks.evaluate import summarise


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
