"""Win rates from verdicts on pairs of answers, with 95 % intervals; and the stored results, as a table and a figure."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

from character import figures
from character.constants import DATA_PATH
from character.intervals import between_runs, bootstrap
from character.models import safe_name
from character.robustness.classify.run_classifier import METHODS, shown_share
from character.robustness.classify.scores import MIN_PROMPTS, share
from character.rows import Row
from character.utils import read_json

STAND_IN = "stand-in"
STANDS_IN = (
    "no judge: an answer fits if it reads as the persona and the untrained model finds it no less likely than 95 % of the "
    "teacher's; one that fits beats one that does not"
)


def results_path(student: str, name: str | None = None) -> Path:
    """Where the results for a student and a constitution are; without a name, those over all of them."""
    file = f"{name}.results.json" if name else "results.json"
    return DATA_PATH / "coherence" / safe_name(student) / file


def load_results(student: str, name: str | None = None) -> dict[str, Any]:
    """The stored results of a persona, or over all of them. Raises UserError where they are not there."""
    found: dict[str, Any] = read_json(results_path(student, name))
    return found


def measure(judged: Sequence[Row], method: str, seed: int) -> dict[str, Any]:
    """How `method` did against another one: the win rate over the messages that either won, and what it leaves out.

    judged: rows with a 'winner', by a judge two per message, one for each order. Every share is {share, low, high, n},
    n in messages, which are independent; None where there is nothing to count.
    """
    if "fits" in judged[0]:
        return _stood_in(judged, method, seed)
    winners: dict[str, list[str | None]] = {}
    for row in judged:
        winners.setdefault(row["prompt"], []).append(row["winner"])
    told = [pair for pair in winners.values() if None not in pair]
    agreed = [first for first, second in told if first == second]
    return {
        "win_rate": _share(agreed.count(method), len(agreed)),
        "flipped": _share(len(told) - len(agreed), len(told)),
        "unparsed": _share(len(winners) - len(told), len(winners)),
        "unparsed_verdicts": sum(row["winner"] is None for row in judged),
    }


def _stood_in(judged: Sequence[Row], method: str, seed: int) -> dict[str, Any]:
    decided = [row["winner"] for row in judged if row["winner"]]
    return {
        "win_rate": _share(decided.count(method), len(decided)),
        "undecided": _share(len(judged) - len(decided), len(judged)),
        **{
            kind: {made: _share(sum(row[kind][made] for row in judged), len(judged)) for made in judged[0][kind]}
            for kind in ("fits", "reads_as_persona")
        },
        "perplexity": {
            made: _geometric_mean([row["perplexity"][made] for row in judged], seed) for made in judged[0]["perplexity"]
        },
    }


def _share(hits: int, total: int) -> dict[str, Any] | None:
    return share(hits, total) if total else None


def _geometric_mean(values: Sequence[float], seed: int) -> dict[str, Any]:
    """{value, low, high, n}, with a bootstrap's interval; without one where there are too few values."""
    import numpy as np

    logs = np.log(np.array(values))
    low: float | None
    high: float | None
    low, high = None, None
    if len(values) >= MIN_PROMPTS:
        low, high = bootstrap(range(len(values)), lambda items: np.exp(logs[items].mean()), seed)
    return {"value": float(np.exp(logs.mean())), "low": low, "high": high, "n": len(values)}


def over_personas(personas: Mapping[str, Mapping[str, Any]], others: Sequence[str]) -> dict[str, Any]:
    """other → {value, se, low, high, n} of the win rates of the personas that have one, n in personas; None without any.

    se: the standard error over personas, as published. low, high: Student's interval, at most from 0 to 1.
    """
    found: dict[str, Any] = {}
    for other in others:
        parts = [part[other]["win_rate"] for part in personas.values() if part[other]]
        rates = [rate["share"] for rate in parts if rate]
        if not rates:
            found[other] = None
            continue
        over = between_runs(rates)
        found[other] = {
            "value": over["mean"],
            "se": stdev(rates) / math.sqrt(len(rates)) if len(rates) > 1 else None,
            "low": None if over["low"] is None else max(0.0, over["low"]),
            "high": None if over["high"] is None else min(1.0, over["high"]),
            "n": over["n"],
        }
    return found


def caption(results: Mapping[str, Any]) -> str:
    """What a table or figure of these results has to say: whose answers, and who judged them."""
    settings = results["settings"]
    judge = f"judge: {settings['judge']}"
    if results.get("stand_in"):
        judge = f"{STAND_IN}, {results['stands_in']}"
    elif settings["family_of_teacher"]:
        judge += f" (of the teacher's family, {settings['family']})"
    return f"{results['student']}, {_label(results['method'])}; {judge}"


def table(results: Mapping[str, Any]) -> Any:
    """A DataFrame of text. Of a persona: a line per other method; over personas: a line per persona, and their mean."""
    import pandas as pd

    mark = f" ({STAND_IN})" if results.get("stand_in") else ""
    if "constitution" in results:
        lines = {f"against {_label(other)}": _line(part, mark) for other, part in results["opponents"].items()}
        return pd.DataFrame.from_dict(lines, orient="index").fillna("n/a")
    lines = {
        name: {other: shown_share(part and part["win_rate"]) for other, part in parts.items()}
        for name, parts in results["personas"].items()
    }
    lines["mean ± standard error"] = {other: _shown_mean(cell) for other, cell in results["mean"].items()}
    names = {other: f"wins against {_label(other)}{mark}" for other in results["mean"]}
    return pd.DataFrame.from_dict(lines, orient="index").rename(columns=names)


def _line(part: Mapping[str, Any] | None, mark: str) -> dict[str, str]:
    """The cells of one other method."""
    if part is None:
        return {f"win rate{mark}": "n/a"}
    line = {f"win rate{mark}": shown_share(part["win_rate"])}
    if not mark:
        flipped, unparsed = shown_share(part["flipped"]), shown_share(part["unparsed"])
        return line | {"verdicts that flip with the order": flipped, "without two verdicts": unparsed}
    line["without a winner"] = shown_share(part["undecided"])
    for kind, name in {"fits": "fits", "reads_as_persona": "reads as the persona"}.items():
        line[f"{name}: method / other"] = " / ".join(f"{cell['share']:.1%}" for cell in part[kind].values())
    line["perplexity: method / other"] = " / ".join(f"{cell['value']:.2f}" for cell in part["perplexity"].values())
    return line


def _shown_mean(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "n/a"
    return f"{cell['value']:6.1%} " + (f"± {cell['se']:.1%}" if cell["se"] is not None else "") + f"  n={cell['n']}"


def draw(results: Mapping[str, Any]) -> Any:
    """A matplotlib figure of the win rates: a bar per other method; over personas, by persona, and their mean."""
    method = results["method"]
    series: dict[str, dict[str, Any]]
    if "constitution" in results:
        parts = results["opponents"]
        series = {method: {f"against {_label(other)}": part and part["win_rate"] for other, part in parts.items()}}
    else:
        series = {
            other: {name: parts[other] and parts[other]["win_rate"] for name, parts in results["personas"].items()}
            | {"mean": mean}
            for other, mean in results["mean"].items()
        }
    return figures.bars(
        series,
        f"win rate of {_label(method)}" + (f" ({STAND_IN})" if results.get("stand_in") else ""),
        labels={other: f"against {_label(other)}" for other in series},
        limits=(0, 1),
        percent=True,
        reference=0.5,
        horizontal=True,
    )


def _label(method: str) -> str:
    return METHODS.get(method, method)
