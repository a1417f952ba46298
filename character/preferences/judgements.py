"""Which of the two traits does each answer show? A judge says; then every trait's rating, before and after training.

DATA_PATH/preferences/<student>/<method>/<condition>/<constitution>.jsonl
    → DATA_PATH/preferences/<student>/<method>/<condition>-by-<judge>/<constitution>.jsonl   a verdict on each answer
    → DATA_PATH/preferences/<student>/<constitution>.results.json   ratings per method and condition, and how they moved
    → DATA_PATH/preferences/<student>/results.json                  over two personas or more: how alike their ratings rank

python -m character.preferences.judgements --constitution humor --model pocket --judge stand-in
python -m character.preferences.judgements --constitution all --model llama-3.1-8b-it --judge glm-4.5-air

`--judge stand-in` asks no judge: a classifier reads the persona off the answer, and the trait that is taken is the
persona's word. An answer that shows neither trait, or that a judge cannot tell, has no winner and is counted.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from character import cli, constitution, rows, steps
from character.coherence.coherence import JudgeArgs, judge_of, judging
from character.coherence.win_rates import STAND_IN
from character.constants import DATA_PATH
from character.distillation import teacher
from character.engine import Engine
from character.models import Model, resolve, safe_name
from character.preferences import measures, preferences, preferences_results
from character.robustness.classify import train_classifier
from character.robustness.classify.run_classifier import METHODS
from character.robustness.classify.scores import NONE
from character.rows import Drop, Row, Rows
from character.utils import PERSONA_TRAITS, UserError, digest, write_json

MADE_BY = "python -m character.preferences.preferences"
QUESTION = """An assistant answered a user's message.

<message>
{message}
</message>

<answer>
{answer}
</answer>

Which of these two traits does the answer show more, in its tone and in what it says: {first} or {second}? Reply with that one word and nothing else."""


@dataclass
class Args(JudgeArgs):
    """Arguments of the judging."""


@dataclass(frozen=True)
class Answers:
    """The answers of one file: a method's under a condition, for a persona or by the plain model ('none')."""

    method: str
    condition: str
    name: str
    given: list[Row]

    def verdicts(self, student: str, judge: str) -> Path:
        """Where a judge's verdicts on them are."""
        return preferences.path_of(student, self.method, f"{self.condition}-by-{safe_name(judge)}", self.name)


def answers_of(args: Args, student: str, names: Sequence[str]) -> list[Answers]:
    """The answers that are there. Raises UserError where there are none by any of the personas."""
    folder = DATA_PATH / "preferences" / safe_name(student)
    others = sorted(path.name for path in folder.glob("*") if path.is_dir() and path.name not in METHODS)
    found = []
    for method in [*METHODS, *others]:
        for condition in preferences.CONDITIONS:
            for name in [NONE] if method == "base" else names:
                path = preferences.path_of(student, method, condition, name)
                if path.exists() or rows.is_planned(path):
                    found.append(Answers(method, condition, name, given_in(path, args.limit)))
    missing = [name for name in names if name not in {answers.name for answers in found}]
    if len(missing) == len(names):
        raise UserError(
            f"no answers of {', '.join(names)} under {folder}; run: {MADE_BY} --constitution {','.join(names)} "
            f"--model {args.model}"
        )
    for name in missing:
        print(f"{name} is left out: no answers under {folder}; run: {MADE_BY} --constitution {name}", file=sys.stderr)
    return found


def given_in(path: Path, limit: int | None) -> list[Row]:
    """What the judging needs of an answers file's rows. Raises UserError for a row without it."""
    fields = ("prompt", "first", "second", "judge_first", "response")
    if rows.is_planned(path):
        # As long as it may become, so that a dry run can say what a judge would read.
        return [
            row | {"response": "x" * (steps.answer_tokens(row) * steps.CHARACTERS_PER_TOKEN)}
            for row in rows.read(path, made_by=MADE_BY)[:limit]
        ]
    found = rows.read(path, *fields, made_by=MADE_BY)[:limit]
    for number, row in enumerate(found, 1):
        if not all(isinstance(row[field], str) for field in fields) or row["judge_first"] not in pair_of(row):
            raise UserError(f"{path}, row {number}: no answer to a pair of traits; make the file anew: {MADE_BY}")
    return [{field: row[field] for field in fields} for row in found]


def pair_of(row: Row) -> tuple[str, str]:
    """The two traits on offer, in the model's order."""
    return row["first"], row["second"]


# By a judge.


def verdict_of(text: str, pair: tuple[str, str], judge: Model) -> str | None:
    """The one trait of the pair that a judge's reply names; None where it names neither, or both."""
    try:
        answer = teacher.answer_of(text, judge, prefilled=False).lower()
    except Drop:
        return None
    named = [trait for trait in pair if re.search(rf"\b{re.escape(trait)}\b", answer)]
    return named[0] if len(named) == 1 else None


def job(args: Args, judge: Model, student: str, answers: Answers) -> steps.Job:
    """The verdicts on one file's answers."""
    sampling = steps.sampling_of(args, args.max_tokens)
    made = rows.settings_of(preferences.path_of(student, answers.method, answers.condition, answers.name))
    settings = steps.settings_of(args, judge, sampling) | {"question": digest(QUESTION), "answers": digest(made)}

    def seen(row: Row) -> tuple[str, str]:
        first, second = pair_of(row)
        return (first, second) if row["judge_first"] == first else (second, first)

    def question(row: Row) -> str:
        first, second = seen(row)
        return QUESTION.format(message=row["prompt"], answer=row["response"], first=first, second=second)

    async def work(engine: Engine, row: Row) -> Row:
        bound = replace(sampling, seed=int(row["id"], 16), choices=seen(row))
        reply = await engine.reply([{"role": "user", "content": question(row)}], bound)
        # A reply that was cut off may still be thinking.
        winner = verdict_of(reply.text, pair_of(row), judge) if reply.finish_reason == "stop" else None
        return reply.row() | {"response": row["response"], "said": reply.text.strip(), "winner": winner}

    output = Rows(answers.verdicts(student, judge.short), answers.given, settings, args.overwrite)
    return steps.Job(output, work, lambda row: len(question(row)), args.max_tokens)


def judged(args: Args, judge: Model, student: str, found: Sequence[Answers]) -> list[Answers]:
    """The answers with a judge's verdicts, by one engine; none in a dry run."""
    jobs = [job(args, judge, student, answers) for answers in found]
    steps.generate(jobs, args, judge)
    if args.dry_run:
        return []
    # A file may hold more than was asked for now, such as a longer trial's rows.
    return [
        replace(
            answers,
            given=[
                row
                for row in rows.read(done.rows.path, "winner", made_by="python -m character.preferences.judgements")
                if row["id"] in done.rows.inputs
            ],
        )
        for answers, done in zip(found, jobs, strict=True)
    ]


# By the stand-in.


def stood_in(args: Args, student: str, found: Sequence[Answers]) -> tuple[list[Answers], dict[str, Any]]:
    """(the answers with the stand-in's verdicts, its settings). Raises UserError.

    Pairs with a word of a persona that the classifier does not know are left out.
    """
    persona = {trait: name for name, traits in PERSONA_TRAITS.items() for trait in traits}
    unknown = {trait for answers in found for row in answers.given for trait in pair_of(row)} - persona.keys()
    if unknown:
        raise UserError(
            f"--judge {STAND_IN} knows the words of the bundled model's personas alone, not '{min(unknown)}'; name a model"
        )
    tested = {row["prompt"] for answers in found for row in answers.given}
    classifier, settings = train_classifier.ready(args, (), tested)
    for name in {persona[trait] for answers in found for row in answers.given for trait in pair_of(row)}:
        if name not in settings["classes"]:
            print(
                f"pairs with {name} are left out: the classifier has no answers of it; run teacher.py", file=sys.stderr
            )
    told = []
    for answers in found:
        kept = [row for row in answers.given if all(persona[trait] in settings["classes"] for trait in pair_of(row))]
        labels = map(str, classifier.predict([row["response"] for row in kept])) if kept else ()
        verdicts = [
            row | {"said": label, "winner": next((trait for trait in pair_of(row) if persona[trait] == label), None)}
            for row, label in zip(kept, labels, strict=True)
        ]
        rows.write(
            answers.verdicts(student, STAND_IN),
            verdicts,
            {**settings, "judge": STAND_IN, "stand_in": True},
            {"a persona that the classifier does not know": len(answers.given) - len(kept)},
        )
        told.append(replace(answers, given=verdicts))
    return told, settings


def main(args: Args) -> None:
    """Judge every answer that is there, store and print the ratings of each persona and how alike they rank."""
    spec = judge_of(args)
    student = resolve(args.model, served=True).short
    names = constitution.selected(args.constitution)
    found = answers_of(args, student, names)
    of_teacher = resolve(args.teacher, served=True).short
    settings: dict[str, Any] = {"teacher": of_teacher, "seed": args.seed, "limit": args.limit}
    if spec != STAND_IN:
        judge, of_judge = judging(args, spec)
        settings |= of_judge
        told = judged(args, judge, student, found)
    elif not args.dry_run:
        told, of_stand_in = stood_in(args, student, found)
        settings = of_stand_in | settings | {"judge": STAND_IN}
    else:
        for answers in found:
            print(f"{answers.verdicts(student, STAND_IN)}: {len(answers.given)} rows")
    if args.dry_run:
        return
    about: dict[str, Any] = {"student": student, "settings": settings | measures.SETTINGS}
    if student == "pocket":
        about |= {"stand_in": True, "stands_in": stands_in(spec)}
    personas: dict[str, Any] = {}
    for name in names:
        if not any(answers.name == name for answers in told):
            continue
        verdicts: dict[str, dict[str, list[Row]]] = {}
        for answers in told:
            if answers.name in (name, NONE):
                verdicts.setdefault(answers.condition, {})[answers.method] = answers.given
        ratings = measures.measure(verdicts, name, spec != STAND_IN, args.seed)
        personas[name] = {**about, "constitution": name, **ratings}
        write_json(preferences_results.results_path(student, name), personas[name])
        preferences_results.show(personas[name])
    missing = [name for name in names if name not in personas]
    elsewhere = preferences_results.load_elsewhere(student, names)
    if len(names) > 1 or elsewhere:
        over = {**about, **measures.over_personas(personas, elsewhere, missing, args.seed)}
        write_json(preferences_results.results_path(student), over)
        preferences_results.show(over)


def stands_in(judge: str) -> str:
    """What stands in for the published evaluation on the bundled model."""
    words = "one word for each shipped persona in place of 150 traits, which the bundled model does not know"
    if judge != STAND_IN:
        return words
    return f"{words}; and no judge: a trait is taken where a classifier reads the answer as its persona"


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
