"""Ratings against independent computations, and where plain maximum likelihood has no answer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import spearmanr

from character.preferences import ratings


@pytest.fixture
def matches() -> tuple[Any, Any, int]:
    """(winners, losers, traits): 600 matches between 12 traits of unlike strength."""
    random = np.random.default_rng(5)
    strengths = random.normal(size=12)
    one = random.integers(12, size=600)
    other = (one + random.integers(1, 12, size=600)) % 12
    first_won = random.random(600) < expit(strengths[one] - strengths[other])
    return np.where(first_won, one, other), np.where(first_won, other, one), 12


@pytest.mark.parametrize("ties", [0.0, ratings.ADDED_TIES])
def test_bradley_terry_has_the_greatest_likelihood(matches: tuple[Any, Any, int], ties: float) -> None:
    winners, losers, traits = matches

    def unlikelihood(strengths: Any) -> float:
        of_matches = np.log(expit(strengths[winners] - strengths[losers])).sum()
        gaps = strengths[:, None] - strengths
        of_ties = (np.log(expit(gaps)) * (1 - np.eye(traits))).sum() * ties / (2 * (traits - 1))
        return float(strengths.mean() ** 2 - of_matches - of_ties)

    found = minimize(unlikelihood, np.zeros(traits), method="BFGS", options={"gtol": 1e-7}).x
    expected = 1000 + 400 / np.log(10) * (found - found.mean())
    assert ratings.bradley_terry(ratings.won(winners, losers, traits), ties) == pytest.approx(expected, abs=0.01)


def test_agreement_with_evalica(matches: tuple[Any, Any, int], require: Callable[[str], Any]) -> None:
    evalica = require("evalica")
    winners, losers, traits = matches
    given = [list(map(int, winners)), list(map(int, losers)), [evalica.Winner.X] * len(winners)]
    scores = np.log(evalica.bradley_terry(*given, tolerance=1e-12, limit=10_000).scores.sort_index().to_numpy())
    expected = 1000 + 400 / np.log(10) * (scores - scores.mean())
    assert ratings.bradley_terry(ratings.won(winners, losers, traits), 0) == pytest.approx(expected, abs=1e-5)
    published = evalica.elo(*given, k=32).scores.sort_index().to_numpy()
    assert ratings.elo_over_orders(winners, losers, traits, seed=1)[0] == pytest.approx(published, abs=1e-9)


def test_elo_by_hand_and_over_orders() -> None:
    # 0 beats 1 among equals: ±16. Then 1, at 984, beats 2, at 1000: 32 × (1 - 0.477).
    winners, losers = np.array([0, 1]), np.array([1, 2])
    found = ratings.elo(winners, losers, 3, np.array([[0, 1], [1, 0]]))
    assert found[0] == pytest.approx([1016, 984 + 16.7363, 1000 - 16.7363], abs=1e-3)
    assert found[1] == pytest.approx([1016.7363, 1016 - 16.7363, 984], abs=1e-3)
    published, mean, low, high = ratings.elo_over_orders(winners, losers, 3, seed=1)
    assert published == pytest.approx(found[0])
    assert ((low <= mean) & (mean <= high)).all() and low[1] == pytest.approx(found[1][1])
    again = ratings.elo_over_orders(winners, losers, 3, seed=1)
    assert all((one == other).all() for one, other in zip((published, mean, low, high), again, strict=True))


def test_ratings_where_maximum_likelihood_has_none() -> None:
    assert ratings.bradley_terry(np.zeros((4, 4))) == pytest.approx([1000] * 4)
    even = 3 * (1 - np.eye(4))
    assert ratings.bradley_terry(even) == pytest.approx([1000] * 4)
    never = even.copy()
    never[3] = 0
    found = ratings.bradley_terry(never)
    assert (
        found[:3] == pytest.approx([found[0]] * 3) and 0 < found[3] < found[0] and found.mean() == pytest.approx(1000)
    )
    apart = np.zeros((5, 5))
    apart[0, 1], apart[1, 0], apart[2, 3] = 6, 2, 1e6
    found = ratings.bradley_terry(apart)
    assert np.isfinite(found).all() and found[0] > found[1] and found[2] > found[3]
    assert ratings.parts(apart, [0, 1, 2, 3]) == 2 and ratings.parts(apart, range(5)) == 3
    assert ratings.parts(apart, [0, 1]) == ratings.parts(even, range(4)) == 1
    several = ratings.bradley_terry(np.stack([never, even]))
    assert several == pytest.approx(np.stack([ratings.bradley_terry(never), ratings.bradley_terry(even)]))


def test_spearman_and_its_interval() -> None:
    random = np.random.default_rng(3)
    one = random.normal(size=150).round(1)
    other = one + random.normal(size=150)
    value, low, high = ratings.spearman_with_interval(one, other, seed=1)
    assert value == pytest.approx(spearmanr(one, other).statistic)
    # Fisher's interval with Bonett and Wright's error, doi:10.1007/BF02294183, is another way to the same.
    error = 1.96 * np.sqrt((1 + value**2 / 2) / (150 - 3))
    assert (low, high) == pytest.approx(
        (np.tanh(np.arctanh(value) - error), np.tanh(np.arctanh(value) + error)), abs=0.04
    )
    assert ratings.spearman(np.array([one, one]), np.array([one, -one])) == pytest.approx([1, -1])
    assert np.isnan(ratings.spearman_with_interval(one, np.ones(150), seed=1)).all()
