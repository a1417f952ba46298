"""The share of answers that read as the persona, per method, plain and under the suffixes, with 95 % Wilson intervals.

DATA_PATH/robustness/<student>/<method>/<variant>/<constitution>.jsonl
    → DATA_PATH/robustness/<student>/<constitution>.results.json

python -m character.robustness.classify.run_classifier --constitution humor --model pocket
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from character import cli, constitution, rows
from character.constants import DATA_PATH
from character.models import resolve, safe_name
from character.robustness.classify import train_classifier
from character.robustness.generate import variants
from character.statistics import wilson
from character.utils import UserError, read_json, write_json

METHODS = {
    "base": "base",
    "prompted": "base + system prompt",
    "distilled": "DPO",
    "merged": "DPO + introspection, 1.0/0.25",
    "sequential": "DPO + introspection, sequential",
}


@dataclass
class Args:
    """Arguments of the classification."""

    constitution: str = cli.flag("humor", "the constitution's name, or 'all'")
    model: str = cli.flag("pocket", "the student")
    teacher: str = cli.flag("pocket", "the teacher whose answers train the classifier")
    per_class: int = cli.flag(500, "answers per persona that train the classifier, at most")


def results_path(student: str, name: str) -> Path:
    """Where the shares for a student and a constitution are."""
    return DATA_PATH / "robustness" / safe_name(student) / f"{name}.results.json"


def classified(classifier: Any, student: str, method: str, name: str) -> dict[str, dict[str, Any]]:
    """variant → {n, hits, counts} of a method's answers; empty where there are none."""
    found = {}
    for variant in variants.variants(suffixes=True):
        path = variants.path_of(student, method, variant, "none" if method == "base" else name)
        if not path.exists():
            continue
        answers = [row["response"] for row in rows.read(path, "response", made_by="robustness/generate")]
        counts = Counter(map(str, classifier.predict(answers)))
        found[variant] = {"n": len(answers), "hits": counts[name], "counts": dict(counts)}
    return found


def pooled(parts: list[dict[str, Any]]) -> dict[str, float]:
    """{share, low, high, n} of several variants taken together."""
    hits, total = sum(part["hits"] for part in parts), sum(part["n"] for part in parts)
    low, high = wilson(hits, total)
    return {"share": hits / total, "low": low, "high": high, "n": total}


def table(results: dict[str, Any]) -> Any:
    """A DataFrame, one line per method: the share that reads as the persona, plain and under the suffixes, as text."""
    import pandas as pd

    def shown(cell: dict[str, float] | None) -> str:
        if cell is None:
            return "n/a"
        return f"{cell['share']:6.1%}  [{cell['low']:.1%}, {cell['high']:.1%}]  n={cell['n']}"

    lines = {
        METHODS.get(method, method): {"plain": shown(part["plain"]), "under the 8 suffixes": shown(part["suffixes"])}
        for method, part in results["methods"].items()
    }
    return pd.DataFrame.from_dict(lines, orient="index")


def measure(classifier: Any, student: str, name: str) -> dict[str, Any]:
    """The shares of every method whose answers are there."""
    folder = DATA_PATH / "robustness" / safe_name(student)
    extra = sorted(path.name for path in folder.glob("*") if path.is_dir() and path.name not in METHODS)
    methods = {}
    for method in [*METHODS, *extra]:
        found = classified(classifier, student, method, name)
        if found:
            plain = found.pop(variants.PLAIN, None)
            methods[method] = {
                "plain": plain and pooled([plain]),
                "suffixes": pooled(list(found.values())) if found else None,
                "per_suffix": {variant: pooled([part]) for variant, part in found.items()},
                "read_as": plain and plain["counts"],
            }
    if not methods:
        raise UserError(f"no answers under {folder}; run robustness/generate/prompted.py and trained.py first")
    return {"constitution": name, "student": student, "methods": methods}


def main(args: Args) -> None:
    """Fit the classifier once, and print and store the shares of each persona."""
    student, teacher = resolve(args.model, served=True).short, resolve(args.teacher, served=True).short
    wanted = constitution.selected(args.constitution)
    texts, labels, _ = train_classifier.examples(teacher, student, args.per_class, also=wanted)
    classifier = train_classifier.fit(texts, labels)
    for name in wanted:
        if name not in labels:
            raise UserError(f"the classifier has no answers of {name}; run teacher.py for it, or check the name")
        results = measure(classifier, student, name)
        write_json(results_path(student, name), results)
        print(f"\nShare of answers that read as {name} (95 % Wilson interval), {student}")
        print(table(results).to_string())


def load_results(student: str, name: str) -> dict[str, Any]:
    """The stored shares. Raises UserError where they are not there."""
    found: dict[str, Any] = read_json(results_path(student, name))
    return found


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
