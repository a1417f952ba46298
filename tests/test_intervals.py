"""Intervals: against published formulas and independent computations."""

import numpy as np
import pytest

from character import intervals


def test_wilson_equals_the_published_formula() -> None:
    # statsmodels' proportion_confint(8, 10, method="wilson") and (0, 40).
    assert intervals.wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-5)
    assert intervals.wilson(0, 40) == pytest.approx((0.0, 0.087622), abs=1e-5)
    assert intervals.wilson(40, 40)[1] == 1.0


def test_bootstrap_draws_whole_clusters() -> None:
    values = np.array([0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0] * 10)
    clusters = [number // 2 for number in range(len(values))]
    low, high = intervals.bootstrap(clusters, lambda items: values[items].mean(), seed=1)
    # 40 clusters of two equal values: the standard error is that of 40 coin tosses, not of 80.
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / 40**0.5, rel=0.12)
    assert (low, high) == intervals.bootstrap(clusters, lambda items: values[items].mean(), seed=1)
    lows, highs = intervals.bootstrap(clusters, lambda items: np.array([values[items].mean(), 3.0]), seed=1)
    assert lows.tolist() == [low, 3.0] and highs.tolist() == [high, 3.0]


def test_bounded_bootstrap_stays_within_its_bounds() -> None:
    random = np.random.default_rng(3)
    middling, high = (random.random(400) < share for share in (0.5, 0.98))
    for values in (middling, high):
        wide = intervals.bounded_bootstrap(range(400), lambda items, values=values: values[items].mean(), seed=1)
        # For independent items it is nearly Wilson's.
        assert wide == pytest.approx(intervals.wilson(int(values.sum()), 400), abs=0.006) and wide[1] < 1
    lows, highs = intervals.bounded_bootstrap(range(50), lambda items: np.array([0.0, 1.0]), seed=1)
    assert (lows[0], highs[1]) == (0, 1)
    assert (highs[0], lows[1]) == (intervals.wilson(0, 50)[1], intervals.wilson(50, 50)[0])


def test_between_runs_is_students_interval() -> None:
    # scipy.stats.ttest_1samp([.8, .9, 1.0], 0).confidence_interval()
    found = intervals.between_runs([0.8, 0.9, 1.0])
    assert found == {
        "mean": pytest.approx(0.9),
        "low": pytest.approx(0.651586),
        "high": pytest.approx(1.148414),
        "n": 3,
    }
    assert intervals.between_runs([0.5]) == {"mean": 0.5, "low": None, "high": None, "n": 1}


def test_wilson_covers_simulated_truths() -> None:
    random = np.random.default_rng(5)
    for n in (200, 500):
        truths = random.uniform(0.05, 0.95, 1000)
        found = [intervals.wilson(int(hits), n) for hits in random.binomial(n, truths)]
        covered = sum(low <= truth <= high for truth, (low, high) in zip(truths, found, strict=True))
        assert 930 <= covered <= 970
