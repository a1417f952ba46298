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
    """{student, runs, results: evaluation/file → figures over the runs} of a student. Raises UserError without results."""
    folders = runs(DATA_PATH)
    names = dict.fromkeys(
        (evaluation, path.name)
        for folder in folders
        for evaluation in ("robustness", "coherence", "preferences")
        for path in sorted((folder / evaluation / safe_name(student)).glob("*.json"))
    )
    found = {}
    for evaluation, name in names:
        files = [folder / evaluation / safe_name(student) / name for folder in folders]
        figures = over([read_json(file) for file in files if file.exists()])
        if figures:
            found[f"{evaluation}/{name}"] = figures
    if not found:
        raise UserError(f"no results of {student} under {DATA_PATH}; run: python -m character.run --seeds 3")
    return {"student": student, "runs": len(folders), "results": found}


def table(results: Mapping[str, Any]) -> Any:
    """A DataFrame of text: a line per persona and method, the shares that read as the persona, plain and suffixed."""
    import pandas as pd

    lines = {}
    for file, part in results["results"].items():
        evaluation, _, name = file.partition("/")
        if evaluation != "robustness" or not name.endswith(".results.json"):
            continue
        for method, groups in part["methods"].items():
            line = {group: shown(groups[group]) for group in ("plain", "suffixes", "held-out") if group in groups}
            lines[name.removesuffix(".results.json"), METHODS.get(method, method)] = line
    return pd.DataFrame.from_dict(lines, orient="index").fillna("n/a")


def shown(figure: Mapping[str, Any]) -> str:
    """A mean share with its interval between runs, as text."""
    if figure["low"] is None:
        return f"{figure['mean']:.1%} (one run)"
    return f"{figure['mean']:6.1%} ± {figure['high'] - figure['mean']:.1%}"


def main(args: Args) -> None:
    """Gather the runs' results, store them and print the shares."""
    student = resolve(args.model, served=True).short
    results = gather(student)
    write_json(path_of(student), results)
    print(f"\nMean of {results['runs']} runs ± half of the 95 % interval between runs (Student's t), {student}")
    print(table(results).to_string())


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
