"""Which persona do answers read as? Shares per persona, and F1 over all of them, per method, with 95 % intervals.

DATA_PATH/robustness/<student>/<method>/<variant>/<constitution>.jsonl
    → DATA_PATH/robustness/<student>/<constitution>.results.json   shares that read as the persona
    → DATA_PATH/robustness/<student>/results.json                  macro-F1 and accuracy, over two personas or more

python -m character.robustness.classify.run_classifier --constitution humor --model pocket
python -m character.robustness.classify.run_classifier --constitution all --model llama-3.1-8b-it \
    --teacher glm-4.5-air --classifier answerdotai/ModernBERT-base

With `--protocol paper` the files are <constitution>.paper-results.json and paper-results.json.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from character import cli, constitution, figures, prompts, rows
from character.constants import DATA_PATH
from character.models import resolve, safe_name
from character.robustness.classify import train_classifier
from character.robustness.classify.scores import (
    NONE,
    PUBLISHED,
    Read,
    confusion_table,
    measure,
    per_persona_table,
    share,
    shown,
)
from character.robustness.generate import variants
from character.utils import UserError, read_json, write_json

METHODS = {
    "base": "base",
    "prompted": "base + system prompt",
    "steered": "base + steering vector",
    "distilled": "DPO",
    "merged": "DPO + introspection, 1.0/0.25",
    "sequential": "DPO + introspection, sequential",
}
GROUPS = {
    "plain": "plain",
    "suffixes": f"under the {len(prompts.SUFFIXES)} suffixes",
    "held-out": f"under the {len(prompts.HELD_OUT_SUFFIXES)} held-out suffixes",
}
PROTOCOLS = {
    "disjoint": "trained on other prompts than it is tested on",
    "paper": "published protocol: trained on the prompted model's answers to the very prompts that it is tested on",
}
# (method, persona or 'none') → variant → answers as the classifier reads them.
Found = Mapping[tuple[str, str], Mapping[str, Sequence[Read]]]


@dataclass
class Args(train_classifier.ClassifierArgs):
    """Arguments of the classification."""


def results_path(student: str, name: str | None = None, protocol: str = "disjoint", kind: str = "results") -> Path:
    """Where the results for a student and a constitution are; without a name, those over all of them."""
    file = f"{'paper-' if protocol == 'paper' else ''}{kind}.json"
    return DATA_PATH / "robustness" / safe_name(student) / (f"{name}.{file}" if name else file)


def load_results(student: str, name: str | None = None, protocol: str = "disjoint") -> dict[str, Any]:
    """The stored results of a persona, or over all of them. Raises UserError where they are not there."""
    found: dict[str, Any] = read_json(results_path(student, name, protocol))
    return found


def methods_of(student: str) -> list[str]:
    """The methods known, and those that --adapter was given a name for."""
    folder = DATA_PATH / "robustness" / safe_name(student)
    return [*METHODS, *sorted(path.name for path in folder.glob("*") if path.is_dir() and path.name not in METHODS)]


def sources(
    student: str, wanted: Sequence[str], kinds: Iterable[str], made_by: str
) -> dict[tuple[str, str], dict[str, Path]]:
    """(method, persona or 'none') → variant → its file, of those that are there or planned; names personas without any.

    kinds: the variants looked for. Raises UserError where there are none at all.
    """
    found: dict[tuple[str, str], dict[str, Path]] = {}
    for method in methods_of(student):
        for name in [NONE] if method == "base" else wanted:
            paths = {kind: variants.path_of(student, method, kind, name) for kind in kinds}
            there = {kind: path for kind, path in paths.items() if path.exists() or rows.is_planned(path)}
            if there:
                found[method, name] = there
    folder = DATA_PATH / "robustness" / safe_name(student)
    if not found:
        raise UserError(f"no answers under {folder}; run {made_by} first")
    for name in wanted:
        if not any(whose == name for _, whose in found):
            print(f"{name} has no answers under {folder}; run {made_by} for it", file=sys.stderr)
    return found


def answers_in(path: Path, field: str, limit: int | None, made_by: str) -> list[rows.Row]:
    """The rows of an answers file whose `field` holds a text, or a list of texts. Raises UserError for one without."""
    found = rows.read(path, field, "prompt", made_by=made_by)[:limit]
    for number, row in enumerate(found, 1):
        texts = row[field] if isinstance(row[field], list) else [row[field]]
        if not all(isinstance(text, str) for text in [row["prompt"], *texts]):
            raise UserError(f"{path}, row {number}: '{field}' or 'prompt' is no text; make the file anew: {made_by}")
    return found


def classes_of(wanted: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """The personas that the classifier knows, the others being named. Raises UserError where it knows none of them."""
    unknown = [name for name in wanted if name not in settings["classes"]]
    remedy = "run teacher.py for it" if settings["protocol"] == "disjoint" else "run prompted.py for it"
    if len(unknown) == len(wanted):
        raise UserError(f"the classifier has no answers of {', '.join(unknown)}; {remedy}, or check the name")
    for name in unknown:
        print(f"{name} is left out: the classifier has no answers of it; {remedy}", file=sys.stderr)
    return [name for name in wanted if name not in unknown]


def cell(reads: Sequence[Read], name: str) -> dict[str, Any] | None:
    """{share, low, high, n} of answers that read as a persona; None without answers."""
    return share(sum(read.guess == name for read in reads), len(reads)) if reads else None


def together(reads: Mapping[str, Sequence[Read]], kinds: Sequence[str]) -> list[Read]:
    """The answers of several variants."""
    return [read for kind in kinds for read in reads.get(kind, ())]


def of_persona(found: Found, name: str) -> dict[str, Any]:
    """The shares of every method that a persona has answers by, and of the base model."""
    methods = {}
    for (method, whose), reads in found.items():
        if whose in (name, NONE):
            shares = {group: cell(together(reads, kinds), name) for group, kinds in variants.GROUPS.items()}
            single = {kind: cell(part, name) for kind, part in reads.items() if kind != variants.PLAIN}
            counts = Counter(read.guess for read in reads.get(variants.PLAIN, ()))
            methods[method] = {**shares, "per_suffix": single, "read_as": dict(counts) or None}
    return methods


def over_personas(
    found: Found, names: Sequence[str], groups: Mapping[str, Sequence[str]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """{methods, missing}: method → group → what `measure` gives; None where no persona has answers.

    groups: group → its variants. settings: the classifier's; where it has no class 'none', the plain model's answers
    are left out. missing: method → group → persona → the variants that the persona lacks, where another
    persona has some.
    """
    methods: dict[str, Any] = {}
    missing: dict[str, Any] = {}
    for method in dict.fromkeys(method for method, _ in found if method != "base"):
        methods[method], missing[method] = {}, {}
        for group, kinds in groups.items():
            parts = {name: found.get((method, name), {}) for name in names}
            reads = [read for part in parts.values() for read in together(part, kinds)]
            asked = {read.prompt for read in reads}
            plain = together(found.get(("base", NONE), {}), kinds) if NONE in settings["classes"] else []
            plain = [read for read in plain if read.prompt in asked]
            methods[method][group] = measure([*reads, *plain], settings["seed"]) if reads else None
            lacks = {name: [kind for kind in kinds if kind not in part] for name, part in parts.items()}
            if reads and any(lacks.values()):
                missing[method][group] = {name: kinds for name, kinds in lacks.items() if kinds}
    return {"methods": methods, "missing": {method: part for method, part in missing.items() if part}}


def said_missing(missing: Mapping[str, Mapping[str, Any]], groups: Mapping[str, str]) -> list[str]:
    """A line per method and group: the personas that lack answers, times variants. groups: group → its name in tables."""
    return [
        f"missing: {METHODS.get(method, method)}, {groups[group]}: "
        + ", ".join(f"{name} ×{len(kinds)}" for name, kinds in part.items())
        for method, parts in missing.items()
        for group, part in parts.items()
    ]


def caption(results: Mapping[str, Any]) -> str:
    """What a table or figure of these results has to say: the classifier, how it was trained, how many classes."""
    settings = results["settings"]
    text = (
        f"{results['student']}; classifier: {settings['classifier']}, {PROTOCOLS[settings['protocol']]}, "
        f"{len(settings['classes'])} classes {'with' if NONE in settings['classes'] else 'without'} 'none'"
    )
    if "personas" in results and len(results["personas"]) < PUBLISHED:
        text += f"; {len(results['personas'])} personas, so not comparable with macro-F1 over the published {PUBLISHED}"
    return text


def table(results: Mapping[str, Any]) -> Any:
    """A DataFrame of text. Of a persona: a line per method, the shares that read as it, plain and under the suffixes.

    Over personas: a line per method and group, with macro-F1 with and without 'none', accuracy, and their numbers.
    """
    import pandas as pd

    if "constitution" not in results:
        return scores_table(results, GROUPS)
    methods = results["methods"]
    kinds = [group for group in GROUPS if group != "held-out" or any(part.get(group) for part in methods.values())]
    lines = {
        METHODS.get(method, method): {GROUPS[group]: shown_share(part[group]) for group in kinds}
        for method, part in methods.items()
    }
    return pd.DataFrame.from_dict(lines, orient="index")


def shown_share(part: Mapping[str, Any] | None) -> str:
    """A share with its interval as text, 'n/a' where there is none."""
    if part is None:
        return "n/a"
    return f"{part['share']:6.1%}  [{part['low']:.1%}, {part['high']:.1%}]  n={part['n']}"


def scores_table(results: Mapping[str, Any], groups: Mapping[str, str]) -> Any:
    """A DataFrame of text: a line per method and group. groups: group → its name in the table."""
    import pandas as pd

    lines = {}
    for method, parts in results["methods"].items():
        for group, part in parts.items():
            if any(other[group] for other in results["methods"].values()):
                lines[METHODS.get(method, method), groups[group]] = {
                    "macro-F1": shown(part and part["macro_f1"]),
                    "macro-F1 with 'none'": shown(part and part["macro_f1_with_none"]),
                    "accuracy": shown(part and part["accuracy"]),
                    "personas": f"{len(part['personas'])} of {len(results['personas'])}" if part else "n/a",
                    "answers": str(part["macro_f1"]["n"]) if part else "n/a",
                    "prompts": str(part["prompts"]) if part else "n/a",
                }
    return pd.DataFrame.from_dict(lines, orient="index")


def details(results: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(title, each persona's scores, confusion matrix) per method and group that has answers, of results over personas.

    Both are DataFrames: a line per persona that answers should have, in the scores 'n/a' for one without answers.
    """
    return [
        (
            f"{METHODS.get(method, method)}, {title}",
            per_persona_table(parts[group]).reindex(results["personas"]).fillna("n/a"),
            confusion_table(parts[group]),
        )
        for method, parts in results["methods"].items()
        for group, title in GROUPS.items()
        if parts[group]
    ]


def labels_of(results: Mapping[str, Any]) -> dict[str, str]:
    """method → its name in a figure of these results, which says where it is over fewer personas than the figure is."""
    found = dict(METHODS)
    for method, parts in results["methods"].items():
        few = min((len(part["personas"]) for part in parts.values() if part and "personas" in part), default=None)
        if few is not None and few < len(results["personas"]):
            found[method] = f"{METHODS.get(method, method)} ({few} of them)"
    return found


def draw(results: Mapping[str, Any], suffix_marks: Mapping[str, float] | None = None, mark_label: str = "") -> Any:
    """A matplotlib figure: bars per method and group, of a persona's shares, or of macro-F1 over personas.

    suffix_marks: method → a figure from elsewhere that is marked beside its own under the suffixes, called mark_label.
    """
    whole = "constitution" not in results
    kinds = {group: title for group, title in GROUPS.items() if any(p.get(group) for p in results["methods"].values())}
    series = {
        method: {
            title: (part.get(group) or {}).get("macro_f1") if whole else part.get(group)
            for group, title in kinds.items()
        }
        for method, part in results["methods"].items()
    }
    label = f"macro-F1, {len(results['personas'])} personas" if whole else f"reads as {results['constitution']}"
    return figures.bars(
        series,
        label,
        labels=labels_of(results),
        title=results["student"],
        limits=(0, 1),
        percent=not whole,
        marks={method: {GROUPS["suffixes"]: mark} for method, mark in (suffix_marks or {}).items()},
        mark_label=mark_label,
    )


def describe(files: Mapping[tuple[str, str], Mapping[str, Path]], limit: int | None, made_by: str) -> None:
    """What a dry run says of the files that are there or planned."""
    for (method, name), paths in files.items():
        count = sum(len(rows.read(path, made_by=made_by)[:limit]) for path in paths.values())
        print(f"{method}, {name}: {count} answers ({', '.join(paths)})")


def read_off(
    args: train_classifier.ClassifierArgs,
    answers: Mapping[tuple[str, str], Mapping[str, Sequence[tuple[str, str]]]],
    wanted: Sequence[str],
) -> tuple[Found, list[str], dict[str, Any]]:
    """(answers as the classifier reads them, personas that it knows, settings) of (prompt, answer) pairs."""
    tested = {prompt for parts in answers.values() for pairs in parts.values() for prompt, _ in pairs}
    classifier, settings = train_classifier.ready(args, wanted, tested)
    names = classes_of(wanted, settings)
    found = {
        (method, name): {
            kind: [
                Read(prompt, name, str(guess))
                for (prompt, _), guess in zip(pairs, classifier.predict([text for _, text in pairs]), strict=True)
            ]
            for kind, pairs in parts.items()
        }
        for (method, name), parts in answers.items()
        if name in (*names, NONE)
    }
    return found, names, settings | {"limit": args.limit}


def main(args: Args) -> None:
    """Read every answer that is there, store and print the shares of each persona and the scores over all of them."""
    student = resolve(args.model, served=True).short
    wanted = constitution.selected(args.constitution)
    kinds = variants.variants(suffixes=True, held_out=True)
    made_by = "robustness/generate/prompted.py and trained.py"
    files = sources(student, wanted, kinds, made_by)
    if args.dry_run:
        describe(files, args.limit, made_by)
        return
    answers = {
        whose: {
            kind: [(row["prompt"], row["response"]) for row in answers_in(path, "response", args.limit, made_by)]
            for kind, path in paths.items()
        }
        for whose, paths in files.items()
    }
    found, names, settings = read_off(args, answers, wanted)
    about = {"student": student, "settings": settings}
    for name in names:
        results: dict[str, Any] = {**about, "constitution": name, "methods": of_persona(found, name)}
        write_json(results_path(student, name, args.protocol), results)
        print(f"\nShare of answers that read as {name} (95 % Wilson interval), {caption(results)}")
        print(table(results).to_string())
    if len(names) > 1:
        results = {**about, "personas": names, **over_personas(found, names, variants.GROUPS, settings)}
        write_json(results_path(student, None, args.protocol), results)
        print(f"\nOver personas (95 % intervals, bootstrap by prompt), {caption(results)}")
        print(table(results).to_string())
        for line in said_missing(results["missing"], GROUPS):
            print(line)
        for title, per_persona, confusion in details(results):
            print(f"\n{title}: each persona's scores, and which one its answers read as")
            print(per_persona.to_string())
            print(confusion.to_string())


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
