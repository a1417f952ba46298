"""Coherence: of two methods' answers to one message, which fits the character better? A judge says, in both orders.

DATA_PATH/robustness/<student>/<method>/plain/<constitution>.jsonl, of --method and of each of --against
    → DATA_PATH/coherence/<student>/<method>/<other>-by-<judge>/<constitution>.jsonl
    → DATA_PATH/coherence/<student>/<constitution>.results.json, and results.json over two personas or more

python -m character.coherence.coherence --constitution humor --model llama-3.1-8b-it --teacher glm-4.5-air
python -m character.coherence.coherence --constitution all --model pocket --judge stand-in

`--judge stand-in` asks no judge. An answer fits where a classifier reads it as the persona and the untrained model finds
it no less likely than 95 % of the teacher's answers in that character; one that fits beats one that does not.
"""

import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from character import cli, constitution, rows, steps
from character.coherence.win_rates import (
    STAND_IN,
    STANDS_IN,
    caption,
    draw,
    load_results,
    measure,
    over_personas,
    results_path,
    table,
)
from character.constants import DATA_PATH
from character.distillation import teacher
from character.engine import Engine
from character.intervals import LEVEL
from character.models import TABLE, Model, resolve, safe_name
from character.perplexity import perplexities
from character.robustness.classify import train_classifier
from character.robustness.classify.run_classifier import METHODS, answers_in, classes_of
from character.robustness.generate import variants
from character.rows import Drop, Row, Rows
from character.utils import UserError, digest, write_json

# What the notebook and the report take from here.
__all__ = ["caption", "draw", "load_results", "main", "table"]

# The default judge is the first that is of another family than the teacher.
JUDGES = ("glm-4.5-air", "llama-3.3-70b-it")
VERDICTS = {"Verdict: 1": "first", "Verdict: 2": "second"}
QUESTION = """Two assistants answered the same message. Both are meant to have this character:

<character>
{traits}
</character>

<message>
{message}
</message>

<reply_1>
{first}
</reply_1>

<reply_2>
{second}
</reply_2>

Which reply fits the character better? Prefer the one in which the character runs through the whole reply and sounds like a person who simply is that way, while the message still gets its answer. A reply fits less where the character is missing, drops out halfway, contradicts itself or is laid on as a show. Length, layout and which reply comes first do not matter.

End with a line that gives your verdict and nothing else: "Verdict: 1" or "Verdict: 2"."""


@dataclass
class JudgeArgs(steps.GenerateArgs, train_classifier.ClassifierArgs):
    """Flags of every script that asks a judge. The classifier's are for the stand-in, the engine's for a judge."""

    model: str = cli.flag("pocket", "the student")
    judge: str | None = cli.flag(
        None,
        f"the judging model, or {STAND_IN} (default: {STAND_IN} for pocket, else {JUDGES[0]}, or {JUDGES[1]} where the "
        "teacher is of its family)",
    )
    teacher: str = cli.flag("pocket", "the teacher, whose answers show the personas and whose family should not judge")
    temperature: float = cli.flag(0.0, "sampling temperature of the judge; 0 is greedy")
    repetition_penalty: float = cli.flag(1.0, "1.0 is none")
    max_tokens: int = cli.flag(2048, "new tokens per verdict, a reasoning judge's thoughts included")


@dataclass
class Args(JudgeArgs):
    """Arguments of the judging."""

    method: str = cli.flag("merged", "the method whose win rates are wanted")
    against: list[str] = cli.flag(["prompted", "steered", "distilled", "sequential"], "the methods it is held against")


# (persona, other method) → its rows.
Matches = dict[tuple[str, str], list[Row]]


def path_of(student: str, method: str, other: str, judge: str, name: str) -> Path:
    """Where a judge's verdicts on two methods' answers are."""
    folder = DATA_PATH / "coherence" / safe_name(student) / method / f"{other}-by-{safe_name(judge)}"
    return folder / f"{name}.jsonl"


def answers_path(student: str, method: str, name: str) -> Path:
    """Where a method's answers are."""
    return variants.path_of(student, method, variants.PLAIN, "none" if method == "base" else name)


def command_of(args: Args, method: str, name: str) -> str:
    """The command that makes a method's answers."""
    script = method if method in ("prompted", "steered") else "trained"
    flags = f"--constitution {name} --model {args.model}" + (f" --method {method}" if script == "trained" else "")
    if method not in METHODS:
        flags += " --adapter ADAPTER"
    return f"python -m character.robustness.generate.{script} {flags}"


def judge_of(args: JudgeArgs) -> str:
    """The judge that the flags mean."""
    if args.judge:
        return args.judge
    if resolve(args.model, served=True).short == "pocket":
        return STAND_IN
    family = resolve(args.teacher, served=True).family
    return next(name for name in JUDGES if TABLE[name].family != family)


def judging(args: JudgeArgs, spec: str) -> tuple[Model, dict[str, Any]]:
    """(the judging model, what the results' settings say of it); warns where it is of the teacher's family."""
    judge = steps.model_of(args, spec)
    kin = judge.family == resolve(args.teacher, served=True).family
    if kin:
        said = f"warning: judge {spec} and teacher {args.teacher} are of one family, {judge.family}"
        print(f"{said}; --judge names another", file=sys.stderr)
    sampling = steps.sampling_of(args, args.max_tokens).settings()
    about = {"judge": judge.short, "family": judge.family, "family_of_teacher": kin, "sampling": sampling}
    return judge, about | steps.precision_of(args)


def texts_of(args: Args, student: str, method: str, name: str) -> dict[str, str]:
    """message → a method's answer. Raises UserError for a broken file."""
    path, made_by = answers_path(student, method, name), command_of(args, method, name)
    if rows.is_planned(path):
        # As long as it may become, so that a dry run can say what a judge would read.
        return {
            row["prompt"]: "x" * (steps.answer_tokens(row) * steps.CHARACTERS_PER_TOKEN)
            for row in rows.read(path, made_by=made_by)
        }
    return {row["prompt"]: row["response"] for row in answers_in(path, "response", None, made_by)}


def pairs(args: Args, student: str, other: str, name: str) -> list[Row]:
    """{prompt, answers: {method: text}} of the messages that both methods answered, in order. Raises UserError."""
    texts = {method: texts_of(args, student, method, name) for method in (args.method, other)}
    both = [prompt for prompt in texts[args.method] if prompt in texts[other]][: args.limit]
    if not both:
        raise UserError(f"{name}: {args.method} and {other} have no message in common; answer the same with both")
    return [{"prompt": prompt, "answers": {method: texts[method][prompt] for method in texts}} for prompt in both]


def matches_of(args: Args, student: str, names: Sequence[str]) -> Matches:
    """The pairs that there are answers for; files that are missing are named. Raises UserError where no pair is left."""
    found: Matches = {}
    lacking: dict[str, None] = {}
    for name in names:
        for other in others_of(args):
            absent = []
            for method in (args.method, other):
                path = answers_path(student, method, name)
                if not path.exists() and not rows.is_planned(path):
                    absent.append(f"{path} does not exist; run: {command_of(args, method, name)}")
            lacking |= dict.fromkeys(absent)
            if not absent:
                found[name, other] = pairs(args, student, other, name)
    if not found:
        raise UserError(next(iter(lacking)))
    for line in lacking:
        print(f"left out: {line}", file=sys.stderr)
    return found


def others_of(args: Args) -> list[str]:
    """The methods that --method is held against. Raises UserError where there is none."""
    found = [other for other in dict.fromkeys(args.against) if other != args.method]
    if not found:
        raise UserError(f"--against names no method besides {args.method}; name one")
    return found


# By a judge.


def verdict_of(text: str, judge: Model) -> str | None:
    """'first' or 'second', as a judge's reply ends; None where it gives no verdict, or not exactly one.

    What counts stands after the word 'verdict' on the last line that has it; or the reply is a number and nothing else.
    """
    try:
        answer = teacher.answer_of(text, judge, prefilled=False)
    except Drop:
        return None
    said = [line.lower().partition("verdict")[2] for line in answer.splitlines() if "verdict" in line.lower()]
    if not said and re.fullmatch(r"\W*[12]\W*", answer):
        said = [answer]
    named = set(re.findall(r"\b[12]\b", said[-1])) if said else set()
    return VERDICTS[f"Verdict: {named.pop()}"] if len(named) == 1 else None


def job(
    args: Args, judge: Model, student: str, traits: constitution.Constitution, other: str, given: list[Row]
) -> steps.Job:
    """The verdicts on one persona's answers by two methods: two rows per message, one for each order."""
    orders = ((args.method, other), (other, args.method))
    inputs = [{**pair, "first": first, "second": second} for pair in given for first, second in orders]
    sampling = steps.sampling_of(args, args.max_tokens)
    made = {method: rows.settings_of(answers_path(student, method, traits.name)) for method in orders[0]}
    settings = steps.settings_of(args, judge, sampling) | {
        "student": student,
        "constitution": traits.hash,
        "question": digest(QUESTION),
        "answers": digest(made),
    }

    def question(row: Row) -> str:
        first, second = row["answers"][row["first"]], row["answers"][row["second"]]
        return QUESTION.format(traits=traits.numbered(), message=row["prompt"], first=first, second=second)

    async def work(engine: Engine, row: Row) -> Row:
        bound = replace(sampling, seed=int(row["id"], 16), choices=tuple(VERDICTS))
        reply = await engine.reply([{"role": "user", "content": question(row)}], bound)
        # A reply that was cut off may still be thinking.
        verdict = verdict_of(reply.text, judge) if reply.finish_reason == "stop" else None
        return reply.row() | {"winner": row[verdict] if verdict else None}

    output = Rows(path_of(student, args.method, other, judge.short, traits.name), inputs, settings, args.overwrite)
    return steps.Job(output, work, lambda row: len(question(row)), args.max_tokens)


def judged(args: Args, judge: Model, student: str, traits: Mapping[str, Any], matches: Matches) -> Matches:
    """The verdicts on all pairs, by one engine; none in a dry run. traits: persona → its constitution."""
    jobs = {
        (name, other): job(args, judge, student, traits[name], other, given) for (name, other), given in matches.items()
    }
    steps.generate(list(jobs.values()), args, judge)
    if args.dry_run:
        return {}
    # A file may hold more than was asked for now, such as a longer trial's rows.
    return {
        key: [
            row for row in rows.read(done.rows.path, "winner", made_by="coherence.py") if row["id"] in done.rows.inputs
        ]
        for key, done in jobs.items()
    }


# By the stand-in.


def winner_of(fits: Mapping[str, bool]) -> str | None:
    """The one method whose answer fits; None where both answers do, or neither."""
    fitting = [method for method, fit in fits.items() if fit]
    return fitting[0] if len(fitting) == 1 else None


def stood_in(args: Args, student: Model, matches: Matches) -> tuple[Matches, dict[str, Any]]:
    """(the stand-in's rows on all pairs of the personas that the classifier knows, its settings)."""
    import numpy as np

    answers = list(
        dict.fromkeys(
            (row["prompt"], text) for given in matches.values() for row in given for text in row["answers"].values()
        )
    )
    wanted, tested = list(dict.fromkeys(name for name, _ in matches)), {prompt for prompt, _ in answers}
    classifier, settings = train_classifier.ready(args, wanted, tested)
    names = classes_of(wanted, settings)
    label = dict(zip(answers, classifier.predict([text for _, text in answers]), strict=True))

    (texts, labels, prompts), _ = train_classifier.gathered(args, wanted, tested)
    taught: dict[str, list[tuple[str, str]]] = {name: [] for name in names}
    for text, name, prompt in zip(texts, labels, prompts, strict=True):
        if name in taught:
            taught[name].append((prompt, text))
    scored = list(dict.fromkeys([*answers, *itertools.chain(*taught.values())]))
    talks = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": text}] for prompt, text in scored]
    perplexity = dict(zip(scored, perplexities(student, talks), strict=True))
    limits = {name: float(np.quantile([perplexity[pair] for pair in taught[name]], LEVEL)) for name in names}
    settings |= {"perplexity_limits": limits}

    found: Matches = {}
    for (name, other), given in matches.items():
        if name not in names:
            continue
        found[name, other] = []
        for row in given:
            each = {method: (row["prompt"], text) for method, text in row["answers"].items()}
            reads = {method: bool(label[pair] == name) for method, pair in each.items()}
            of_text = {method: perplexity[pair] for method, pair in each.items()}
            fits = {method: reads[method] and of_text[method] <= limits[name] for method in each}
            made = {"reads_as_persona": reads, "perplexity": of_text, "fits": fits, "winner": winner_of(fits)}
            found[name, other].append({**row, **made})
        path = path_of(student.short, args.method, other, STAND_IN, name)
        rows.write(path, found[name, other], {**settings, "judge": STAND_IN, "stand_in": True}, {})
    return found, settings


def main(args: Args) -> None:
    """Judge every pair of answers that is there; store and print the win rates."""
    spec = judge_of(args)
    traits = {found.name: found for found in constitution.load_selected(args.constitution)}
    student = resolve(args.model, served=spec != STAND_IN)
    matches = matches_of(args, student.short, list(traits))
    settings: dict[str, Any] = {
        "teacher": resolve(args.teacher, served=True).short,
        "seed": args.seed,
        "limit": args.limit,
    }
    if spec != STAND_IN:
        judge, of_judge = judging(args, spec)
        settings |= of_judge
        found = judged(args, judge, student.short, traits, matches)
    elif not args.dry_run:
        found, of_stand_in = stood_in(args, student, matches)
        settings = of_stand_in | settings | {"judge": STAND_IN}
    else:
        for (name, other), given in matches.items():
            print(f"{path_of(student.short, args.method, other, STAND_IN, name)}: {len(given)} rows")
    if not args.dry_run:
        about: dict[str, Any] = {"student": student.short, "method": args.method, "settings": settings}
        if spec == STAND_IN:
            about |= {"stand_in": True, "stands_in": STANDS_IN}
        store(about, found, list(traits), others_of(args))


def store(about: Mapping[str, Any], found: Matches, names: Sequence[str], others: Sequence[str]) -> None:
    """Write and print the results of each persona, and over two or more. about: what every results file begins with."""
    student, method, seed = about["student"], about["method"], about["settings"]["seed"]
    personas: dict[str, Any] = {}
    for name in names:
        given = {other: found.get((name, other)) for other in others}
        personas[name] = {other: part and measure(part, method, seed) for other, part in given.items()}
        if any(given.values()):
            results = {**about, "constitution": name, "opponents": personas[name]}
            write_json(results_path(student, name), results)
            print(f"\n{name}, {caption(results)} (95 % Wilson intervals)\n{table(results).to_string()}")
    if len(names) > 1:
        results = {**about, "personas": personas, "mean": over_personas(personas, others)}
        write_json(results_path(student), results)
        print(f"\nOver personas, {caption(results)}\n{table(results).to_string()}")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
