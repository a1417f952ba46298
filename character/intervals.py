"""Intervals and rates that the evaluations share. Every interval is a 95 % one."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

LEVEL = 0.95
Z95 = 1.959964
DRAWS = 1000


def wilson(hits: int, total: int) -> tuple[float, float]:
    """The Wilson score interval of a share. Source: Wilson 1927, doi:10.1080/01621459.1927.10502953."""
    share = hits / total
    centre = share + Z95**2 / (2 * total)
    spread = Z95 * math.sqrt(share * (1 - share) / total + Z95**2 / (4 * total**2))
    scale = 1 + Z95**2 / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def bootstrap(
    clusters: Sequence[Hashable],
    statistic: Callable[[Any], Any],
    seed: int,
    draws: int = DRAWS,
) -> tuple[Any, Any]:
    """Percentile interval of a statistic whose items come in clusters, such as several answers to one prompt.

    clusters: the cluster of each item. statistic: array of item numbers, drawn with whole clusters → a number or an
    array of numbers. Returns (low, high), each of the statistic's shape. Source: Efron and Tibshirani 1993, chapter 13.
    """
    import numpy as np

    values = _drawn(clusters, statistic, seed, draws)
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return (float(low), float(high)) if np.ndim(low) == 0 else (low, high)


def bounded_bootstrap(
    clusters: Sequence[Hashable],
    statistic: Callable[[Any], Any],
    seed: int,
    draws: int = DRAWS,
) -> tuple[Any, Any]:
    """As `bootstrap`, for a statistic between 0 and 1 such as a rate or F1, near whose ends percentiles are too narrow.

    Student's interval of the log-odds, with the bootstrap's standard error; for a statistic of 0 or 1 Wilson's, each
    cluster counting once. There must be two clusters or more.
    """
    import numpy as np
    from scipy import stats

    trials = len(set(clusters))
    value = np.asarray(statistic(np.arange(len(clusters))), dtype=float)
    error = _drawn(clusters, statistic, seed, draws).std(axis=0, ddof=1) * math.sqrt(trials / (trials - 1))
    inside = np.where((value > 0) & (value < 1), value, 0.5)
    odds = np.log(inside / (1 - inside))
    spread = stats.t.ppf((1 + LEVEL) / 2, trials - 1) * error / (inside * (1 - inside))
    ends = [value <= 0, value >= 1]
    low = np.select(ends, [0.0, wilson(trials, trials)[0]], 1 / (1 + np.exp(spread - odds)))
    high = np.select(ends, [wilson(0, trials)[1], 1.0], 1 / (1 + np.exp(-spread - odds)))
    return (float(low), float(high)) if np.ndim(low) == 0 else (low, high)


def _drawn(clusters: Sequence[Hashable], statistic: Callable[[Any], Any], seed: int, draws: int) -> Any:
    """The statistic of each draw of as many clusters as there are, with replacement: an array, a row per draw."""
    import numpy as np

    members: dict[Hashable, list[int]] = {}
    for item, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(item)
    groups = [np.array(items) for items in members.values()]
    random = np.random.default_rng(seed)
    return np.array(
        [
            statistic(np.concatenate([groups[number] for number in random.integers(len(groups), size=len(groups))]))
            for _ in range(draws)
        ]
    )


def between_runs(values: Sequence[float]) -> dict[str, float | None]:
    """{mean, low, high, n} over runs with different seeds: Student's interval, None where there is one run only."""
    from scipy import stats

    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return {"mean": mean, "low": None, "high": None, "n": n}
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    spread = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    return {"mean": mean, "low": mean - spread, "high": mean + spread, "n": n}
