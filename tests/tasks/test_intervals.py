"""Intervals and the numbers of classifiers: against scipy, torchmetrics and the normal approximation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_f1_score

from tasks.suites.accuracy import calibration, macro_f1
from tasks.suites.intervals import bootstrap, mean, share, wilson


@given(st.integers(1, 400), st.data())
def test_shares_have_wilsons_interval(samples: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, samples))
    expected = binomtest(right, samples).proportion_ci(method="wilson")
    assert wilson(right, samples) == pytest.approx((expected.low, expected.high), abs=1e-9)
    score = share("accuracy", [number < right for number in range(samples)])
    assert (score.value, score.samples) == (right / samples, samples)
    assert score.low <= score.value <= score.high
    assert np.mean(score.outcomes) == pytest.approx(score.value)


def test_means_are_near_the_normal_approximation_and_the_same_every_time() -> None:
    values = np.random.default_rng(3).exponential(size=400)
    score = mean("loss", values.tolist())
    reach = 1.96 * values.std(ddof=1) / 20
    assert (score.low, score.high) == pytest.approx((values.mean() - reach, values.mean() + reach), rel=0.03)
    assert score == mean("loss", values.tolist())


def test_weights_are_parts_of_samples() -> None:
    """Three texts of 2, 5 and 3 tokens, of which 1, 5 and 0 were predicted."""
    score = mean("token_accuracy", [1, 5, 0], [2, 5, 3])
    assert (score.value, score.samples) == (0.6, 10)
    assert np.mean(score.outcomes) == pytest.approx(0.6)
    assert (score.low, score.high) == (0.0, 1.0)  # three texts say little, however many tokens they have


def test_every_sample_is_drawn_about_as_often() -> None:
    counts = np.zeros(7)
    bootstrap(lambda index: counts.__iadd__(np.bincount(index, minlength=7))[0], 7)
    assert counts.sum() == 7 * 500
    assert counts == pytest.approx(np.full(7, 500), abs=80)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(1, 60))
def test_f1_and_calibration_are_those_of_torchmetrics(seed: int, classes: int, samples: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probability_NC = (3 * torch.randn(samples, classes, generator=generator)).softmax(dim=-1)
    label_N = torch.randint(classes, (samples,), generator=generator)
    confidence_N, guess_N = probability_NC.max(dim=-1)
    expected = multiclass_f1_score(guess_N, label_N, classes, average="macro")
    assert macro_f1(guess_N.numpy(), label_N.numpy(), classes) == pytest.approx(float(expected), abs=1e-6)
    right_N = (guess_N == label_N).numpy().astype(np.float64)
    expected = multiclass_calibration_error(probability_NC, label_N, classes, n_bins=15)
    assert calibration(confidence_N.double().numpy(), right_N) == pytest.approx(float(expected), abs=1e-5)
