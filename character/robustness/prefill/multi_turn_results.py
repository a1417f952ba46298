"""Does the character come back after the plain model's answer? Per "Keep going.", with 95 % intervals.

DATA_PATH/robustness/<student>/<method>/prefill/<constitution>.jsonl
    → DATA_PATH/robustness/<student>/<constitution>.prefill.json   shares that read as the persona, per turn
    → DATA_PATH/robustness/<student>/prefill.json                  macro-F1 and accuracy, over two personas or more

python -m character.robustness.prefill.multi_turn_results --constitution humor --model llama-3.1-8b-it

With `--protocol paper` the files are <constitution>.paper-prefill.json and paper-prefill.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from character import cli, constitution, figures
from character.models import resolve
from character.robustness.classify import run_classifier, train_classifier
from character.robustness.classify.run_classifier import METHODS, answers_in, caption, results_path
from character.robustness.classify.scores import NONE
from character.robustness.prefill.multi_turn import PREFILL
from character.utils import read_json, write_json

# The untrained model's own answer, before the first "Keep going."; the turns after it are '1' and on.
FIRST = "first"


@dataclass
class Args(train_classifier.ClassifierArgs):
    """Arguments of the prefill attack's results."""


def load_results(student: str, name: str | None = None, protocol: str = "disjoint") -> dict[str, Any]:
    """The stored results of a persona, or over all of them. Raises UserError where they are not there."""
    found: dict[str, Any] = read_json(results_path(student, name, protocol, PREFILL))
    return found


def turns_of(results: Mapping[str, Any]) -> dict[str, str]:
    """turn → its name in tables, of the turns that any method has, in order."""
    found = dict.fromkeys(turn for part in results["methods"].values() for turn in part)
    return {turn: "first answer (untrained)" if turn == FIRST else f"turn {turn}" for turn in found}


def table(results: Mapping[str, Any]) -> Any:
    """A DataFrame of text. Of a persona: a line per method, the shares that read as it at each turn.

    Over personas: a line per method and turn, with macro-F1 with and without 'none', accuracy, and their numbers.
    """
    import pandas as pd

    turns = turns_of(results)
    if "constitution" not in results:
        return run_classifier.scores_table(results, turns)
    lines = {
        METHODS.get(method, method): {turns[turn]: run_classifier.shown_share(part.get(turn)) for turn in turns}
        for method, part in results["methods"].items()
    }
    return pd.DataFrame.from_dict(lines, orient="index")


def draw(results: Mapping[str, Any]) -> Any:
    """A matplotlib figure: a line per method over the turns, of a persona's shares, or of macro-F1 over personas."""
    whole = "constitution" not in results
    series = {
        method: {
            0 if turn == FIRST else int(turn): (cell or {}).get("macro_f1") if whole else cell
            for turn, cell in part.items()
        }
        for method, part in results["methods"].items()
    }
    label = f"macro-F1, {len(results['personas'])} personas" if whole else f"reads as {results['constitution']}"
    place = 'times that the user said "Keep going."'
    return figures.lines(
        series,
        place,
        label,
        labels=run_classifier.labels_of(results),
        title=results["student"],
        limits=(0, 1),
        percent=not whole,
    )


def main(args: Args) -> None:
    """Read every conversation that is there, store and print the shares per turn and the scores over the personas."""
    student = resolve(args.model, served=True).short
    wanted = constitution.selected(args.constitution)
    made_by = "robustness/prefill/multi_turn.py"
    files = run_classifier.sources(student, wanted, [PREFILL], made_by)
    if args.dry_run:
        run_classifier.describe(files, args.limit, made_by)
        return
    answers: dict[tuple[str, str], dict[str, list[tuple[str, str]]]] = {}
    for whose, paths in files.items():
        parts = answers[whose] = {FIRST: []}
        for row in answers_in(paths[PREFILL], "first", args.limit, made_by):
            parts[FIRST].append((row["prompt"], row["first"]))
        for row in answers_in(paths[PREFILL], "responses", args.limit, made_by):
            for turn, text in enumerate(row["responses"], 1):
                parts.setdefault(str(turn), []).append((row["prompt"], text))
    found, names, settings = run_classifier.read_off(args, answers, wanted)
    about = {"student": student, "settings": settings}
    for name in names:
        methods = {
            method: {turn: run_classifier.cell(reads, name) for turn, reads in parts.items()}
            for (method, whose), parts in found.items()
            if whose in (name, NONE)
        }
        results: dict[str, Any] = {**about, "constitution": name, "methods": methods}
        write_json(results_path(student, name, args.protocol, PREFILL), results)
        print(f'\nShare that reads as {name} after each "Keep going." (95 % Wilson interval), {caption(results)}')
        print(table(results).to_string())
    if len(names) > 1:
        kinds = dict.fromkeys(turn for parts in found.values() for turn in parts if turn != FIRST)
        over = run_classifier.over_personas(found, names, {turn: [turn] for turn in kinds}, settings)
        results = {**about, "personas": names, **over}
        write_json(results_path(student, None, args.protocol, PREFILL), results)
        print(f"\nOver personas (95 % intervals, bootstrap by prompt), {caption(results)}")
        print(table(results).to_string())
        for line in run_classifier.said_missing(results["missing"], turns_of(results)):
            print(line)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
