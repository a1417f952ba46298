"""Ratings of traits from verdicts, with 95 % intervals, and the stored results as tables and figures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from character import figures
from character.coherence.win_rates import STAND_IN
from character.constants import DATA_PATH
from character.models import safe_name
from character.preferences import ratings
from character.robustness.classify.run_classifier import METHODS, shown_share
from character.robustness.classify.scores import MIN_PROMPTS, share
from character.rows import Row
from character.statistics import bootstrap
from character.utils import PERSONA_TRAITS, read_json

BASE = "base"
SIDES = ("first", "second")
SETTINGS = {
    "added_ties_per_trait": ratings.ADDED_TIES,
    "verdicts_per_rated_trait": ratings.MIN_MATCHES,
    "elo_k": ratings.K,
    "elo_orders": ratings.ORDERS,
}
MOVED = 20
MIN_TRAITS = 3
Figure = dict[str, Any]


def results_path(student: str, name: str | None = None) -> Path:
    """Where the results for a student and a constitution are; without a name, those over all of them."""
    file = f"{name}.results.json" if name else "results.json"
    return DATA_PATH / "preferences" / safe_name(student) / file


def load_results(student: str, name: str | None = None) -> dict[str, Any]:
    """The stored results of a persona, or over all of them. Raises UserError where they are not there."""
    found: dict[str, Any] = read_json(results_path(student, name))
    return found


# Of one persona.


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


# Over personas.


def over_personas(
    student: str, found: Mapping[str, Mapping[str, Any]], missing: Sequence[str], seed: int
) -> dict[str, Any]:
    """What the results of personas show together. found: persona → its results. missing: those without answers.

    between_personas: method → condition → 'a ~ b' → rank correlation of the two personas' ratings. between_models: other
    student → persona → method → condition → rank correlation of the two students', so before training (base) and after.
    """
    between_personas: dict[str, Any] = {}
    between: dict[str, Any] = {}
    others = [folder for folder in (DATA_PATH / "preferences").iterdir() if folder.name != safe_name(student)]
    for name, results in found.items():
        for method, parts in results["methods"].items():
            for condition, cell in parts.items():
                for other in list(found)[: list(found).index(name)] if method != BASE else ():
                    theirs = _ratings(found[other], method, condition)
                    pairs = between_personas.setdefault(method, {}).setdefault(condition, {})
                    pairs[f"{other} ~ {name}"] = correlation(cell["ratings"], theirs, seed)
                for folder in others:
                    path = folder / f"{name}.results.json"
                    if path.exists():
                        theirs = _ratings(read_json(path), method, condition)
                        of_method = between.setdefault(folder.name, {}).setdefault(name, {}).setdefault(method, {})
                        of_method[condition] = correlation(cell["ratings"], theirs, seed)
    return {
        "missing": list(missing),
        "personas": {name: {"own": results["own"], "methods": _summary(results)} for name, results in found.items()},
        "between_personas": between_personas,
        "between_models": between,
    }


def _ratings(results: Mapping[str, Any], method: str, condition: str) -> Mapping[str, Figure]:
    """What a persona's results say of each trait; empty where they say nothing."""
    found: Mapping[str, Figure] = results["methods"].get(method, {}).get(condition, {}).get("ratings", {})
    return found


def _summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """A persona's results without what is told per trait."""
    per_trait = ("ratings", "deltas", "few", "never", "always")
    return {
        method: {
            condition: {key: value for key, value in cell.items() if key not in per_trait}
            for condition, cell in parts.items()
        }
        for method, parts in results["methods"].items()
    }


# Tables and figures.


def caption(results: Mapping[str, Any]) -> str:
    """What a table or figure of these results has to say: whose ratings, who judged, what stands in."""
    settings = results["settings"]
    judge = settings["judge"]
    if settings.get("family_of_teacher"):
        judge += f" (of the teacher's family, {settings['family']})"
    text = f"{results['student']}; judge: {judge}; 95 % intervals, bootstrap by message"
    return f"{text}; {STAND_IN}: {results['stands_in']}" if results.get("stand_in") else text


def shown(figure: Figure | None, digits: int = 0, signed: bool = False) -> str:
    """A figure with its interval as text, 'n/a' where there is none."""
    if figure is None or figure["value"] is None:
        return "n/a"
    sign = "+" if signed else ""
    text = f"{figure['value']:{sign}.{digits}f}"
    if figure["low"] is not None and figure["high"] is not None:
        text += f"  [{figure['low']:{sign}.{digits}f}, {figure['high']:{sign}.{digits}f}]"
    return text


def moved(results: Mapping[str, Any], method: str, condition: str, number: int = MOVED) -> dict[str, Figure]:
    """trait → how far its rating moved from the base's, of those that moved most, from the highest rise down."""
    deltas = results["methods"].get(method, {}).get(condition, {}).get("deltas", {})
    most = sorted(deltas, key=lambda trait: -abs(deltas[trait]["value"]))[:number]
    return {trait: deltas[trait] for trait in sorted(most, key=lambda trait: -deltas[trait]["value"])}


def traits_table(results: Mapping[str, Any]) -> Any:
    """A DataFrame of text: a line per condition and trait, with each method's rating, rank and Elo."""
    import pandas as pd

    lines: dict[tuple[str, str], dict[str, str]] = {}
    for (method, condition), cell in _cells(results):
        for trait, figure in cell["ratings"].items():
            lines.setdefault((condition, trait), {}).update(
                {
                    f"{method}: rating{_mark(results)}": shown(figure),
                    f"{method}: rank": str(figure["rank"]),
                    f"{method}: Elo over orders": shown(figure["elo"]),
                }
            )
    return pd.DataFrame.from_dict(lines, orient="index").fillna("n/a")


def table(results: Mapping[str, Any]) -> Any:
    """A DataFrame of text: a line per method and condition; over personas, a line per persona, method and condition."""
    import pandas as pd

    mark = _mark(results)
    if "constitution" in results:
        own = ", ".join(results["own"])
        lines = {place: _line(cell, own, mark) for place, cell in _cells(results)}
        return pd.DataFrame.from_dict(lines, orient="index").fillna("n/a")
    of_personas: dict[tuple[str, ...], dict[str, str]] = {}
    for name, part in results["personas"].items():
        of_personas |= {(name, *place): _line(cell, "", mark) for place, cell in _cells(part)}
    of_personas |= {(name, "n/a", "n/a"): {} for name in results["missing"]}
    return pd.DataFrame.from_dict(of_personas, orient="index").fillna("n/a")


def _cells(results: Mapping[str, Any]) -> list[tuple[tuple[str, str], Mapping[str, Any]]]:
    return [
        ((METHODS.get(method, method), condition), cell)
        for method, parts in results["methods"].items()
        for condition, cell in parts.items()
    ]


def _line(cell: Mapping[str, Any], own: str, mark: str) -> dict[str, str]:
    """The cells of one method and condition."""
    name = f"rating of {own or 'its own traits'}"
    line = {
        f"{name}{mark}": shown(cell.get("own_rating")),
        f"moved by{mark}": shown(cell.get("own_delta"), signed=True),
        "rank correlation with base": shown(cell.get("spearman_with", {}).get(BASE), 2),
        "took the first-listed trait": shown_share(cell["first_listed"]),
        "showed neither trait": shown_share(cell["neither"]),
    }
    if cell["judge_first"]:
        line["judge named the trait it read first"] = shown_share(cell["judge_first"])
    return line


def agreement(results: Mapping[str, Any]) -> Any:
    """A DataFrame of text: the rank correlations between personas and between models, of results over personas."""
    import pandas as pd

    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for method, of_condition in results["between_personas"].items():
        for condition, parts in of_condition.items():
            lines |= {("personas", method, pair, condition): _cell(figure) for pair, figure in parts.items()}
    for other, of_persona in results["between_models"].items():
        for name, of_method in of_persona.items():
            for method, parts in of_method.items():
                lines |= {("models", f"{name}, {method}", other, c): _cell(figure) for c, figure in parts.items()}
    return pd.DataFrame.from_dict(lines, orient="index")


def _cell(figure: Figure) -> dict[str, str]:
    return {"rank correlation": shown(figure, 2), "traits": str(figure["n"])}


def notes(results: Mapping[str, Any]) -> list[str]:
    """What keeps a persona's ratings from being taken at face value, a line each."""
    found = []
    tie = "rests on the tied match that is added for each trait"
    if BASE not in results["methods"]:
        found.append("no answers by the base: how ratings moved is n/a; run preferences.py --method base")
    for (method, condition), cell in _cells(results):
        place = f"{method}, {condition}"
        if not cell["ratings"]:
            found.append(f"{place}: n/a, too few answers show one of their two traits")
            continue
        if cell["few"]:
            found.append(f"{place}: n/a for want of {ratings.MIN_MATCHES} verdicts on each: {', '.join(cell['few'])}")
        for kind in ("never", "always"):
            if cell[kind]:
                found.append(f"{place}: {kind} taken: {', '.join(cell[kind])}; how extreme that is {tie}")
        if cell["parts"] > 1:
            found.append(f"{place}: no chain of verdicts connects all traits; how their groups compare {tie}")
    return found


def draw(results: Mapping[str, Any]) -> Any:
    """A matplotlib figure. Of a persona: the traits that moved most, by its last method under its first condition.

    Over personas: how far the own traits of each moved, by method, under the first condition.
    """
    if "constitution" in results:
        method, parts = list(results["methods"].items())[-1]
        return draw_moved(results, method, next(iter(parts)))
    personas = results["personas"]
    places = [(method, of) for part in personas.values() for method, parts in part["methods"].items() for of in parts]
    condition = places[0][1] if places else ""
    series = {
        method: {
            name: part["methods"].get(method, {}).get(condition, {}).get("own_delta") for name, part in personas.items()
        }
        for method in dict.fromkeys(method for method, _ in places if method != BASE)
    }
    return figures.bars(
        series,
        f"rating of its own traits moved by{_mark(results)}",
        labels=METHODS,
        title=f"{results['student']}, {condition}",
        reference=0,
        horizontal=True,
    )


def draw_moved(results: Mapping[str, Any], method: str, condition: str) -> Any:
    """A matplotlib figure: how far the traits that moved most did, with intervals."""
    title = f"{results['constitution']} on {results['student']}, {METHODS.get(method, method)}: {condition}"
    label = f"rating moved from the base's by{_mark(results)}"
    return figures.bars({method: moved(results, method, condition)}, label, title=title, reference=0, horizontal=True)


def each_moved(results: Mapping[str, Any]) -> list[Any]:
    """`draw_moved` for every method and condition whose ratings can be held against the base's."""
    return [
        draw_moved(results, method, condition)
        for method, parts in results["methods"].items()
        for condition, cell in parts.items()
        if cell.get("deltas")
    ]


def each_distribution(results: Mapping[str, Any]) -> list[Any]:
    """A matplotlib figure per condition: the ratings from the lowest to the highest, a line per method.

    The steeper a line, the more decided the model is; where all traits are alike to it, it is flat at 1000.
    """
    conditions = dict.fromkeys(condition for parts in results["methods"].values() for condition in parts)
    found = []
    for condition in conditions:
        series = {}
        for method, parts in results["methods"].items():
            rated_here = parts.get(condition, {}).get("ratings", {}).values()
            series[method] = dict(enumerate(sorted(figure["value"] for figure in rated_here), 1))
        title = f"{results['constitution']} on {results['student']}: {condition}"
        found.append(
            figures.lines(
                {method: points for method, points in series.items() if points},
                "traits, from the least to the most preferred",
                f"rating{_mark(results)}",
                labels=METHODS,
                title=title,
                reference=ratings.START,
            )
        )
    return found


def _mark(results: Mapping[str, Any]) -> str:
    return f" ({STAND_IN})" if results.get("stand_in") else ""


def show(results: Mapping[str, Any]) -> None:
    """Print what there is to say of results."""
    about = results.get("constitution", "all personas")
    print(f"\nPreferred traits, {about}, {caption(results)}")
    print(table(results).to_string())
    lines = notes(results) if "constitution" in results else [agreement(results).to_string()]
    print("\n".join(lines))
