"""From verdicts on pairs to ratings of traits: Bradley–Terry, Elo as published, and how alike two ratings rank.

Both are on Elo's scale: 1000 is the average, and 400 more means odds of 10 to 1.
"""

import math
from collections.abc import Sequence
from typing import Any

from character.intervals import DRAWS, LEVEL

START, SCALE, K = 1000.0, 400.0, 32.0
# Tied matches added for each trait, spread evenly over all others: the estimate is then finite for a trait that always
# or never won, and for traits that no chain of matches connects.
ADDED_TIES = 1.0
# With fewer verdicts a trait's rating would rest on the added tie.
MIN_MATCHES = 5
ORDERS = 100
STEPS = 100


def won(winners: Any, losers: Any, traits: int) -> Any:
    """Array (traits, traits): how often the first beat the second. winners, losers: arrays of trait numbers."""
    import numpy as np

    return np.bincount(winners * traits + losers, minlength=traits * traits).reshape(traits, traits).astype(float)


def bradley_terry(wins: Any, added_ties: float = ADDED_TIES) -> Any:
    """The likeliest ratings, (…, traits), of arrays of wins (…, traits, traits). Source: doi:10.2307/2334029.

    With `added_ties` 0 the ratings are plain maximum likelihood, which is finite only where every trait, directly or
    through others, has beaten every other. By Newton's method.
    """
    import numpy as np

    traits = wins.shape[-1]
    wins = wins + added_ties / (2 * max(1, traits - 1)) * (1 - np.eye(traits))
    matches = wins + wins.swapaxes(-1, -2)
    strengths = np.zeros(wins.shape[:-1])
    for _ in range(STEPS):
        chances = 1 / (1 + np.exp(strengths[..., None, :] - strengths[..., :, None]))
        slope = (wins - matches * chances).sum(-1)
        weights = matches * chances * (1 - chances)
        # The likelihood leaves the average open; adding a constant to the curvature keeps it at 0.
        curvature = np.eye(traits) * weights.sum(-1)[..., None] - weights + 1 / traits
        step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        longest = np.abs(step).max(-1, keepdims=True)
        # Far from the maximum a whole step would overshoot.
        strengths += step / np.maximum(1, longest / 2)
        if longest.max() < 1e-9:
            break
    # Rounded, so that traits that fare alike are equal.
    return np.round(START + SCALE / math.log(10) * strengths, 6)


def elo(winners: Any, losers: Any, traits: int, orders: Any) -> Any:
    """Ratings (orders, traits) after all matches, one order of them per row of `orders` (numbers of matches)."""
    import numpy as np

    ratings = np.full((len(orders), traits), START)
    rows = np.arange(len(orders))
    for match in orders.T:
        winner, loser = winners[match], losers[match]
        expected = 1 / (1 + 10 ** ((ratings[rows, loser] - ratings[rows, winner]) / SCALE))
        ratings[rows, winner] += K * (1 - expected)
        ratings[rows, loser] -= K * (1 - expected)
    return ratings


def elo_over_orders(winners: Any, losers: Any, traits: int, seed: int) -> tuple[Any, Any, Any, Any]:
    """(as published: in the given order, mean over seeded orders, low, high), each of `traits` numbers.

    low, high: the middle 95 % of the orders, which says how far Elo depends on the order alone.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    matches = len(winners)
    orders = np.array([np.arange(matches), *(random.permutation(matches) for _ in range(ORDERS))])
    given, *shuffled = elo(winners, losers, traits, orders)
    return given, np.mean(shuffled, axis=0), *np.quantile(shuffled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)


def parts(wins: Any, among: Sequence[int]) -> int:
    """How many groups some traits fall into that no chain of matches connects; 1 where all of them can be compared."""
    from scipy.sparse.csgraph import connected_components

    labels = connected_components(wins + wins.T, directed=False)[1]
    return len(set(labels[list(among)]))


def spearman(first: Any, second: Any) -> Any:
    """Spearman's rank correlation along the last axis; NaN where one of the two is all the same."""
    import numpy as np
    from scipy.stats import rankdata

    one, other = (
        ranks - ranks.mean(-1, keepdims=True) for ranks in (rankdata(first, axis=-1), rankdata(second, axis=-1))
    )
    with np.errstate(invalid="ignore"):
        return (one * other).sum(-1) / np.sqrt((one**2).sum(-1) * (other**2).sum(-1))


def spearman_with_interval(first: Any, second: Any, seed: int) -> tuple[float, float, float]:
    """(value, low, high) of Spearman between two models' ratings of the same traits; NaN where it is undefined.

    The bootstrap draws traits, not messages: redrawn messages would add noise to both ratings, and so pull every draw's
    correlation below the estimate.
    """
    import numpy as np

    value = float(spearman(first, second))
    if math.isnan(value):
        return value, value, value
    traits = np.random.default_rng(seed).integers(len(first), size=(DRAWS, len(first)))
    draws = spearman(first[traits], second[traits])
    low, high = np.quantile(draws[~np.isnan(draws)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return value, float(low), float(high)
