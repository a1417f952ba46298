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

    members: dict[Hashable, list[int]] = {}
    for item, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(item)
    groups = [np.array(items) for items in members.values()]
    random = np.random.default_rng(seed)
    values = [
        statistic(np.concatenate([groups[number] for number in random.integers(len(groups), size=len(groups))]))
        for _ in range(draws)
    ]
    low, high = np.quantile(np.array(values), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return (float(low), float(high)) if np.ndim(low) == 0 else (low, high)


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
