"""The stored ratings of traits, as tables and figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from character import figures
from character.coherence.win_rates import STAND_IN
from character.constants import DATA_PATH
from character.models import safe_name
from character.preferences.measures import BASE, Figure, Results
from character.preferences.ratings import MIN_MATCHES, ORDERS, START
from character.robustness.classify.run_classifier import METHODS, shown_share
from character.utils import read_json

# How many traits a figure of the moves has, at most.
MOVED = 20


def results_path(student: str, name: str | None = None) -> Path:
    """Where the results for a student and a constitution are; without a name, those over all of them."""
    file = f"{name}.results.json" if name else "results.json"
    return DATA_PATH / "preferences" / safe_name(student) / file


def load_results(student: str, name: str | None = None) -> dict[str, Any]:
    """The stored results of a persona, or over all of them. Raises UserError where they are not there."""
    found: dict[str, Any] = read_json(results_path(student, name))
    return found


def load_elsewhere(student: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Other student → persona → its stored results, of those personas that are there."""
    found: dict[str, dict[str, Any]] = {}
    for folder in sorted((DATA_PATH / "preferences").iterdir()):
        for name in names:
            path = folder / f"{name}.results.json"
            if folder.name != safe_name(student) and path.exists():
                found.setdefault(folder.name, {})[name] = read_json(path)
    return found


def caption(results: Results) -> str:
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


def moved(results: Results, method: str, condition: str, number: int = MOVED) -> dict[str, Figure]:
    """trait → how far its rating moved from the base's, of those that moved most, from the highest rise down."""
    deltas = results["methods"].get(method, {}).get(condition, {}).get("deltas", {})
    most = sorted(deltas, key=lambda trait: -abs(deltas[trait]["value"]))[:number]
    return {trait: deltas[trait] for trait in sorted(most, key=lambda trait: -deltas[trait]["value"])}


def traits_table(results: Results) -> Any:
    """A DataFrame of text: a line per condition and trait, with each method's rating, rank and Elo."""
    import pandas as pd

    lines: dict[tuple[str, str], dict[str, str]] = {}
    for (method, condition), cell in _cells(results):
        for trait, figure in cell["ratings"].items():
            lines.setdefault((condition, trait), {}).update(
                {
                    f"{method}: rating{_mark(results)}": shown(figure),
                    f"{method}: rank": str(figure["rank"]),
                    f"{method}: Elo over {ORDERS} orders": shown(figure["elo"]),
                }
            )
    return pd.DataFrame.from_dict(lines, orient="index").fillna("n/a")


def table(results: Results) -> Any:
    """A DataFrame of text: a line per method and condition; over personas, a line per persona, method and condition."""
    import pandas as pd

    mark, judged = _mark(results), results["settings"]["judge"] != STAND_IN
    if "constitution" in results:
        own = ", ".join(results["own"])
        lines = {place: _line(cell, own, mark, judged) for place, cell in _cells(results)}
        return pd.DataFrame.from_dict(lines, orient="index").fillna("n/a")
    of_personas: dict[tuple[str, ...], dict[str, str]] = {}
    for name, part in results["personas"].items():
        of_personas |= {(name, *place): _line(cell, "", mark, judged) for place, cell in _cells(part)}
    of_personas |= {(name, "n/a", "n/a"): {} for name in results["missing"]}
    return pd.DataFrame.from_dict(of_personas, orient="index").fillna("n/a")


def _cells(results: Results) -> list[tuple[tuple[str, str], Mapping[str, Any]]]:
    return [
        ((METHODS.get(method, method), condition), cell)
        for method, parts in results["methods"].items()
        for condition, cell in parts.items()
    ]


def _line(cell: Mapping[str, Any], own: str, mark: str, judged: bool) -> dict[str, str]:
    """The cells of one method and condition. judged: by a judge, who may give no verdict."""
    name = f"rating of {own or 'its own traits'}"
    line = {
        f"{name}{mark}": shown(cell.get("own_rating")),
        f"moved by{mark}": shown(cell.get("own_delta"), signed=True),
        "rank correlation with base": shown(cell.get("spearman_with", {}).get(BASE), 2),
        "took the first-listed trait": shown_share(cell["first_listed"]),
        "without a verdict" if judged else "showed neither trait": shown_share(cell["neither"]),
    }
    if cell["judge_first"]:
        line["judge named the trait it read first"] = shown_share(cell["judge_first"])
    return line


def agreement(results: Results) -> Any:
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


def _cell(figure: Figure | None) -> dict[str, str]:
    return {"rank correlation": shown(figure, 2), "traits": str(figure["n"]) if figure else "n/a"}


def notes(results: Results) -> list[str]:
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
            found.append(f"{place}: n/a for want of {MIN_MATCHES} verdicts on each: {', '.join(cell['few'])}")
        extreme = [f"{kind} taken: {', '.join(cell[kind])}" for kind in ("never", "always") if cell[kind]]
        if extreme:
            found.append(f"{place}: {'; '.join(extreme)}; how extreme their ratings are {tie}")
        if cell["parts"] > 1:
            found.append(f"{place}: no chain of verdicts connects all traits; how their groups compare {tie}")
    return found


def draw(results: Results) -> Any:
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


def draw_moved(results: Results, method: str, condition: str) -> Any:
    """A matplotlib figure: how far the traits that moved most did, with intervals."""
    title = f"{results['constitution']} on {results['student']}, {METHODS.get(method, method)}: {condition}"
    label = f"rating moved from the base's by{_mark(results)}"
    return figures.bars({method: moved(results, method, condition)}, label, title=title, reference=0, horizontal=True)


def each_moved(results: Results) -> list[Any]:
    """`draw_moved` for every method and condition whose ratings can be held against the base's."""
    return [
        draw_moved(results, method, condition)
        for method, parts in results["methods"].items()
        for condition, cell in parts.items()
        if cell.get("deltas")
    ]


def each_distribution(results: Results) -> list[Any]:
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
                reference=START,
            )
        )
    return found


def _mark(results: Results) -> str:
    return f" ({STAND_IN})" if results.get("stand_in") else ""


def show(results: Results) -> None:
    """Print what there is to say of results."""
    about = results.get("constitution", "all personas")
    print(f"\nPreferred traits, {about}, {caption(results)}")
    print(table(results).to_string())
    if "constitution" in results:
        print("\n".join(notes(results)))
    elif not (agreed := agreement(results)).empty:
        print(agreed.to_string())
