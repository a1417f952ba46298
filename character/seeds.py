"""Several whole runs with seeds of their own: every figure's mean and its 95 % interval between runs.

DATA_PATH and DATA_PATH/seeds/<seed> hold runs of the same layout
    → DATA_PATH/seeds/<student>.results.json

python -m character.seeds --model pocket
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from character import cli
from character.coherence.win_rates import STAND_IN
from character.constants import DATA_PATH
from character.intervals import between_runs
from character.models import resolve, safe_name
from character.robustness.classify.run_classifier import METHODS
from character.utils import UserError, read_json, write_json

SEEDS = "seeds"


@dataclass
class Args:
    """Arguments of the gathering."""

    model: str = cli.flag("pocket", "the student")


def runs(data: Path) -> list[Path]:
    """The data folders of the runs: the first one's, then those of further seeds in order."""
    return [data, *sorted((data / SEEDS).glob("[0-9]*"), key=lambda folder: int(folder.name))]


def path_of(student: str) -> Path:
    """Where the figures over all runs are. student: its short name."""
    return DATA_PATH / SEEDS / f"{safe_name(student)}.results.json"


def over(results: Sequence[Any]) -> Any:
    """The same tree, each figure ({share or value, low, high, n}) replaced by {mean, low, high, n, values} over the runs.

    What is no figure is left out. A figure that some runs lack is over the others: n is the number of runs.
    """
    there = [result for result in results if isinstance(result, Mapping)]
    if not there:
        return None
    key = next((key for key in ("share", "value") if key in there[0] and "n" in there[0]), None)
    if key:
        values = [result[key] for result in there if result[key] is not None]
        return between_runs(values) | {"values": values} if values else None
    names = dict.fromkeys(name for result in there for name in result)
    parts = {name: over([result.get(name) for result in there]) for name in names}
    return {name: part for name, part in parts.items() if part} or None


def gather(student: str) -> dict[str, Any]:
    """{student, runs, stand_ins, results: evaluation/file → figures over the runs} of a student.

    stand_ins: the evaluations in which something stood in for a judge. Raises UserError without results.
    """
    folders = runs(DATA_PATH)
    names = dict.fromkeys(
        (evaluation, path.name)
        for folder in folders
        for evaluation in ("robustness", "coherence", "preferences")
        for path in sorted((folder / evaluation / safe_name(student)).glob("*.json"))
    )
    found = {}
    stand_ins = set()
    for evaluation, name in names:
        files = [folder / evaluation / safe_name(student) / name for folder in folders]
        each = [read_json(file) for file in files if file.exists()]
        if any(results.get("stand_in") for results in each):
            stand_ins.add(evaluation)
        figures = over(each)
        if figures:
            found[f"{evaluation}/{name}"] = figures
    if not found:
        raise UserError(f"no results of {student} under {DATA_PATH}; run: python -m character.run --seeds 3")
    return {"student": student, "runs": len(folders), "stand_ins": sorted(stand_ins), "results": found}


def table(results: Mapping[str, Any]) -> Any:
    """A DataFrame of text: a line per persona and method.

    Its columns: the shares that read as the persona, plain, suffixed and after the prefill attack; how often the trained
    model's answers win against the method's; and how far the ratings of the persona's own traits moved.
    """
    import pandas as pd

    found = results["results"]
    marks = {
        name: f" ({STAND_IN})" if name in results.get("stand_ins", ()) else "" for name in ("coherence", "preferences")
    }
    lines = {}
    for file, part in found.items():
        evaluation, _, name = file.partition("/")
        if evaluation != "robustness" or not name.endswith(".results.json"):
            continue
        persona = name.removesuffix(".results.json")
        attacked, judged, rated = (
            found.get(f"{other}/{persona}.{end}.json", {}).get(key, {})
            for other, end, key in (
                ("robustness", "prefill", "methods"),
                ("coherence", "results", "opponents"),
                ("preferences", "results", "methods"),
            )
        )
        for method, groups in part["methods"].items():
            line = {group: shown(groups[group]) for group in ("plain", "suffixes", "held-out") if group in groups}
            for turn, share in attacked.get(method, {}).items():
                if turn != "first":
                    line[f"prefill, turn {turn}"] = shown(share)
            if "win_rate" in judged.get(method, {}):
                line["trained wins against it" + marks["coherence"]] = shown(judged[method]["win_rate"])
            for condition, figures in rated.get(method, {}).items():
                if "own_delta" in figures:
                    line[f"own traits moved, {condition}" + marks["preferences"]] = shown(figures["own_delta"], "+.0f")
            lines[persona, METHODS.get(method, method)] = line
    return pd.DataFrame.from_dict(lines, orient="index").fillna("n/a")


def shown(figure: Mapping[str, Any], form: str = "6.1%") -> str:
    """A mean with half of its interval between runs, as text. form: how the mean is written."""
    mean = f"{figure['mean']:{form}}"
    if figure["low"] is None:
        return f"{mean} (one run)"
    return f"{mean} ± {figure['high'] - figure['mean']:{form.strip('+6')}}"


def main(args: Args) -> None:
    """Gather the runs' results, store them and print the shares."""
    student = resolve(args.model, served=True).short
    results = gather(student)
    write_json(path_of(student), results)
    print(f"\nMean of {results['runs']} runs ± half of the 95 % interval between runs (Student's t), {student}")
    print(table(results).to_string())


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
