"""From verdicts to what a results file says: ratings, how they moved, what they rest on, all with 95 % intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from character.intervals import bootstrap
from character.preferences import ratings
from character.robustness.classify.scores import MIN_PROMPTS, share
from character.rows import Row
from character.utils import PERSONA_TRAITS

BASE = "base"
SIDES = ("first", "second")
# With fewer traits a rank correlation says nothing.
MIN_TRAITS = 3
SETTINGS = {
    "added_ties_per_trait": ratings.ADDED_TIES,
    "verdicts_per_rated_trait": ratings.MIN_MATCHES,
    "elo_k": ratings.K,
    "elo_orders": ratings.ORDERS,
}
Figure = dict[str, Any]
Results = Mapping[str, Any]


def measure(verdicts: Mapping[str, Mapping[str, Sequence[Row]]], name: str, judged: bool, seed: int) -> dict[str, Any]:
    """{own, methods: method → condition → what was found}. verdicts: condition → method → rows with a 'winner'.

    own: the persona's own traits among those on offer. judged: by a judge, whose leaning to what it reads first is
    then told.
    """
    methods: dict[str, Any] = {}
    offered = {row[side] for parts in verdicts.values() for given in parts.values() for row in given for side in SIDES}
    own = [trait for trait in PERSONA_TRAITS.get(name, ()) if trait in offered]
    for condition, parts in verdicts.items():
        told = {method: [row for row in given if row["winner"]] for method, given in parts.items()}
        cells = rated({method: given for method, given in told.items() if given}, sorted(offered), own, seed)
        for method, given in told.items():
            methods.setdefault(method, {})[condition] = {
                "neither": _share(len(parts[method]) - len(given), len(parts[method])),
                "first_listed": _share(sum(row["winner"] == row["first"] for row in given), len(given)),
                "judge_first": _share(sum(row["winner"] == row["judge_first"] for row in given), len(given))
                if judged
                else None,
                **cells.get(method, {"ratings": {}}),
            }
    return {"own": own, "methods": methods}


def rated(
    told: Mapping[str, Sequence[Row]], traits: Sequence[str], own: Sequence[str], seed: int
) -> dict[str, dict[str, Any]]:
    """method → ratings, how they moved from the base's, and what they rest on, under one condition.

    told: method → the rows with a winner, one or more. The bootstrap draws whole messages, the same for all methods.
    """
    import numpy as np

    if not told:
        return {}
    number = {trait: index for index, trait in enumerate(traits)}
    flat = [(place, row) for place, given in enumerate(told.values()) for row in given]
    which = np.array([place for place, _ in flat])
    winners = np.array([number[row["winner"]] for _, row in flat])
    losers = np.array([number[row["first" if row["winner"] == row["second"] else "second"]] for _, row in flat])
    size = len(traits)
    base = list(told).index(BASE) if BASE in told else None
    mine = [number[trait] for trait in own]

    def wins_of(items: Any) -> Any:
        cells = (which[items] * size + winners[items]) * size + losers[items]
        return np.bincount(cells, minlength=len(told) * size**2).reshape(-1, size, size).astype(float)

    def found(items: Any) -> Any:
        """(2, methods, traits + 1): ratings and how they moved; the last column is the mean over the own traits."""
        of_traits = ratings.bradley_terry(wins_of(items))
        whole = np.hstack([of_traits, of_traits[:, mine or [0]].mean(1, keepdims=True)])
        return np.stack([whole, whole - whole[base or 0]])

    everything = np.arange(len(flat))
    value, wins = found(everything), wins_of(everything)
    matches = (wins + wins.swapaxes(1, 2)).sum(-1)
    matches = np.hstack([matches, matches[:, mine].sum(1, keepdims=True)])
    messages = [row["prompt"] for _, row in flat]
    low, high = np.full((2, *value.shape), np.nan)
    if len(set(messages)) >= MIN_PROMPTS:
        low, high = bootstrap(messages, found, seed)
    few = matches < ratings.MIN_MATCHES
    few = np.stack([few, few | few[base or 0]])
    for part in (value, low, high):
        part[few] = np.nan

    cells = {}
    for place, method in enumerate(told):
        lost = wins[place].sum(0)
        ranks = (value[0, place, :size] > value[0, place, :size, None]).sum(1) + 1
        elo = ratings.elo_over_orders(winners[which == place], losers[which == place], size, seed)
        n = [int(count) for count in matches[place]]
        enough = [trait for trait, index in number.items() if not few[0, place, index]]
        cell: dict[str, Any] = {
            "parts": ratings.parts(wins[place], [number[trait] for trait in enough]),
            "few": [trait for trait in traits if trait not in enough],
            "never": [trait for trait in enough if lost[number[trait]] == n[number[trait]]],
            "always": [trait for trait in enough if not lost[number[trait]]],
            "own_rating": _figure((value, low, high), (0, place, size), n[size]) if own else None,
            "ratings": {
                trait: _figure((value, low, high), (0, place, index), n[index])
                | {
                    "rank": int(ranks[index]),
                    "elo": _figure(elo[1:], index, n[index]),
                    "elo_published": float(elo[0][index]),
                }
                for trait, index in number.items()
                if trait in enough
            },
        }
        if base is not None and place != base:
            both = [int(count) for count in matches[place] + matches[base]]
            cell["own_delta"] = _figure((value, low, high), (1, place, size), both[size]) if own else None
            cell["deltas"] = {
                trait: _figure((value, low, high), (1, place, index), both[index])
                for trait, index in number.items()
                if not few[1, place, index]
            }
        cells[method] = cell
    for method, cell in cells.items():
        cell["spearman_with"] = {
            other: correlation(cell["ratings"], cells[other]["ratings"], seed) for other in cells if other != method
        }
    return cells


def _share(hits: int, total: int) -> Figure | None:
    return share(hits, total) if total else None


def _figure(parts: Sequence[Any], place: Any, n: int) -> Figure:
    """{value, low, high, n} at one place of the arrays (value, low, high); None for what is no number."""
    value, low, high = (None if math.isnan(part[place]) else float(part[place]) for part in parts)
    return {"value": value, "low": low, "high": high, "n": n}


def correlation(one: Mapping[str, Figure], other: Mapping[str, Figure], seed: int) -> Figure | None:
    """Spearman's {value, low, high, n} of two ratings, n in traits that both rate; None where it is undefined."""
    import numpy as np

    traits = [trait for trait in one if trait in other]
    if len(traits) < MIN_TRAITS:
        return None
    first, second = (np.array([part[trait]["value"] for trait in traits]) for part in (one, other))
    value, low, high = ratings.spearman_with_interval(first, second, seed)
    return None if math.isnan(value) else {"value": value, "low": low, "high": high, "n": len(traits)}


def over_personas(
    found: Mapping[str, Results], elsewhere: Mapping[str, Mapping[str, Results]], missing: Sequence[str], seed: int
) -> dict[str, Any]:
    """What the results of personas show together. found: persona → its results; elsewhere: other student → the same.

    missing: personas without answers. between_personas: method → condition → 'a ~ b' → rank correlation of the two
    personas' ratings. between_models: other student → persona → method → condition → that of the two students'; under
    the method base it is the one before training.
    """
    between_personas: dict[str, Any] = {}
    between_models: dict[str, Any] = {}
    for name, results in found.items():
        earlier = list(found)[: list(found).index(name)]
        for method, parts in results["methods"].items():
            for condition, cell in parts.items():
                for other in earlier if method != BASE else ():
                    pairs = between_personas.setdefault(method, {}).setdefault(condition, {})
                    theirs = _ratings(found[other], method, condition)
                    pairs[f"{other} ~ {name}"] = correlation(theirs, cell["ratings"], seed)
                for other, of_persona in elsewhere.items():
                    if name in of_persona:
                        of_method = between_models.setdefault(other, {}).setdefault(name, {}).setdefault(method, {})
                        theirs = _ratings(of_persona[name], method, condition)
                        of_method[condition] = correlation(cell["ratings"], theirs, seed)
    return {
        "missing": list(missing),
        "personas": {name: {"own": results["own"], "methods": _summary(results)} for name, results in found.items()},
        "between_personas": between_personas,
        "between_models": between_models,
    }


def _ratings(results: Results, method: str, condition: str) -> Mapping[str, Figure]:
    """What a persona's results say of each trait; empty where they say nothing."""
    found: Mapping[str, Figure] = results["methods"].get(method, {}).get(condition, {}).get("ratings", {})
    return found


def _summary(results: Results) -> dict[str, Any]:
    """A persona's results without what is told per trait."""
    per_trait = ("ratings", "deltas", "few", "never", "always")
    return {
        method: {
            condition: {key: value for key, value in cell.items() if key not in per_trait}
            for condition, cell in parts.items()
        }
        for method, parts in results["methods"].items()
    }
