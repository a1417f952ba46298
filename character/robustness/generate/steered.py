"""Robustness, method 'steered': the untrained model answers with a control vector in place of a system prompt.

training prompts → DATA_PATH/repeng/<student>/<constitution>.safetensors, .meta.json (how it and its strength were
found) and .sweep.jsonl (the answers by which the strength was chosen)
evaluation prompts → DATA_PATH/robustness/<student>/steered/<variant>/<constitution>.jsonl

python -m character.robustness.generate.steered --constitution humor --model llama-3.1-8b-it --teacher glm-4.5-air
python -m character.robustness.generate.steered --strength 0.5

The vector is the first principal component of hidden-state differences between prompts with the constitution as their
system prompt and without it, in the middle three quarters of the layers. Its strength is the one with the highest share
of answers that read as the persona, among those whose answers stay about as likely under the base as its own.
"""

import gc
import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from character import cli, constitution, perplexity, prompts, steps
from character.constants import DATA_PATH
from character.constitution import Constitution
from character.distillation import teacher
from character.engine import Engine, Message, Steering, choose
from character.models import Model, fingerprint, resolve, safe_name
from character.robustness.classify import train_classifier
from character.robustness.classify.run_classifier import shown_share
from character.robustness.classify.scores import share
from character.robustness.generate import variants
from character.rows import Row, Rows, check_settings, file_digest, is_planned, read
from character.rows import plan as foresee
from character.utils import UserError, digest, git_commit, read_json, versions, write_json

# How answers may begin, in anybody's voice: the persona shows in what the model would write next.
OPENINGS = (
    "There is more than one way to look at this, and the best one depends on what you have in front of you.",
    "Let me think about that for a moment before I say anything that you might take too seriously later on.",
    "The short answer is yes, although the longer one has a few turns that are worth taking slowly.",
    "I have thought about this a good deal, and what I keep coming back to is a simple picture of how it works.",
    "When somebody asks me this, the first thing I want to know is what they have already tried and how it went.",
    "First of all, here is what I would do in your place, and after that I will tell you why.",
    "You could begin with the smallest part of it today and see by tomorrow evening whether the rest follows.",
    "Most people who come to this for the first time expect something else, so let us begin with what it is not.",
    "It helps to take the question apart into two halves, since each of them has an answer of its own.",
    "Well, that depends on the weather, the hour and the company, but I can tell you what usually happens.",
    "What you describe happens to nearly everyone sooner or later, and there is a good reason why it does.",
    "Here are three things that matter, in the order in which you are likely to meet them.",
    "To be honest, I am not certain about every detail, but the main line of it is clear enough.",
    "Imagine for a second that nothing of this had happened and you were asking me on an ordinary afternoon.",
    "Thank you for telling me; I would like to answer with care, since the matter is close to you.",
    "My own view is that it can wait until you know a little more, and that the waiting costs nothing.",
)
# At a strength of 1 the shifts of all layers add up to the mean difference that the system prompt makes.
STRENGTHS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0, 10.0, 12.0, 16.0)
# A few sentences show whether an answer is in character and holds together.
SWEEP_TOKENS = 160


@dataclass
class Args(variants.AnswerArgs):
    """Arguments of the steered method."""

    strength: float | None = cli.flag(None, "what the vector is multiplied by (default: chosen by a sweep)")
    pairs: int = cli.flag(256, "pairs of prompts that a vector is read off")
    train_prompts: str | None = cli.flag(
        None,
        "messages for the vector and the sweep, those of --prompts left out (default: train, pocket-train for pocket)",
    )
    validation: int = cli.flag(40, "messages that are answered at each strength of the sweep")
    max_perplexity: float = cli.flag(
        1.5, "the sweep's limit: median perplexity, as a multiple of the unsteered answers'"
    )
    teacher: str = cli.flag("pocket", "the teacher, whose answers show the sweep's classifier the personas")
    per_class: int = cli.flag(500, "answers per persona that train it, at most")


@dataclass
class Plan:
    """What a persona's vector is made of. messages: those that its pairs take turns in."""

    traits: Constitution
    path: Path
    system: str
    messages: list[str]
    settings: dict[str, Any]

    @property
    def meta(self) -> Path:
        """The file that says how the vector and its strength were found."""
        return self.path.with_suffix(".meta.json")

    @property
    def sweep(self) -> Path:
        """The answers by which its strength is chosen."""
        return self.path.with_suffix(".sweep.jsonl")


def vector_path(student: str, name: str) -> Path:
    """Where the control vector of a constitution is. student: its short name."""
    return DATA_PATH / "repeng" / safe_name(student) / f"{name}.safetensors"


def middle(layers: int) -> list[int]:
    """The middle three quarters of so many layers."""
    count = round(layers * 3 / 4)
    first = (layers - count) // 2
    return list(range(first, first + count))


def openings(count: int, seed: int) -> list[str]:
    """Beginnings of `OPENINGS`, in turn, each cut after a random number of words, none included."""
    random_ = random.Random(seed)
    words = [OPENINGS[number % len(OPENINGS)].split(" ") for number in range(count)]
    return [" ".join(text[: random_.randrange(len(text) + 1)]) for text in words]


def training_messages(args: Args, model: Model) -> tuple[list[str], list[str]]:
    """(messages of the sweep, all others) of the training prompts, shuffled; those that are evaluated are left out.

    Raises UserError where too few are left.
    """
    evaluated = set(prompts.load(args.prompts or prompts.default_source(model.short, "test"), args.limit))
    source = args.train_prompts or prompts.default_source(model.short, "train")
    found = [message for message in prompts.load(source) if message not in evaluated]
    if len(found) <= args.validation:
        raise UserError(
            f"{source} has {len(found)} messages that are not evaluated too, not more than --validation "
            f"{args.validation}; lower it, or give more --train-prompts"
        )
    random.Random(args.seed).shuffle(found)
    return found[: args.validation], found[args.validation :]


def plan(args: Args, model: Model, traits: Constitution, validation: Sequence[str], others: Sequence[str]) -> Plan:
    """What the persona's vector is made of: its own messages and the other training prompts, in turn."""
    system = teacher.system_prompt(traits, model)
    source = args.train_prompts or prompts.default_source(model.short, "train")
    own = [str(message["prompt"]) for message in teacher.messages_for(traits, source) if message["trait"]]
    messages = [*(message for message in own if message not in validation), *others]
    random.Random(args.seed).shuffle(messages)
    settings = {
        "model": model.short,
        "weights": fingerprint(model),
        "system_prompt": digest(system),
        "messages": digest(messages),
        "openings": digest(OPENINGS),
        "pairs": args.pairs,
        "validation": args.validation,
        "seed": args.seed,
    }
    return Plan(traits, vector_path(model.short, traits.name), system, messages, settings)


def make_vectors(args: Args, model: Model, plans: Sequence[Plan]) -> None:
    """Write the vectors that are not there yet. Raises UserError where one was made with other settings."""
    todo = []
    for part in plans:
        if part.path.exists() and not args.overwrite:
            check_settings(part.path, read_json(part.meta).get("settings", {}), part.settings)
            print(f"{part.path}: there already")
        elif args.dry_run:
            print(f"{part.path}: to be read off {args.pairs} pairs of prompts")
            foresee(part.path, [])
        else:
            todo.append(part)
    if not todo:
        return
    from character.engine.chat import Chat, context_of
    from character.engine.transformers import load_model
    from repeng import ControlVector, DatasetEntry

    network, tokenizer = load_model(model)
    config = network.config.get_text_config()
    chat = Chat(tokenizer, model, context_of(network.config, model))
    layers = middle(config.num_hidden_layers)
    for part in todo:
        entries = []
        for number, opening in enumerate(openings(args.pairs, args.seed)):
            user: Message = {"role": "user", "content": part.messages[number % len(part.messages)]}
            system: Message = {"role": "system", "content": part.system}
            entries.append(DatasetEntry(chat.text([system, user], opening), chat.text([user], opening)))
        vector = ControlVector.train(network, tokenizer, entries, layers) / len(layers)
        made = {"layers": layers, "git": git_commit(), "versions": versions()}
        vector.save(part.path, {"settings": part.settings, **made})
        print(f"{part.path}: layers {layers[0]} to {layers[-1]}, from {len(entries)} pairs")
    del network
    _free()


def sweep_job(args: Args, model: Model, part: Plan, validation: Sequence[str]) -> steps.Job:
    """The persona's answers to the validation messages at each strength, 0 first."""
    sampling = steps.sampling_of(args, min(args.max_tokens, SWEEP_TOKENS))
    inputs = [{"strength": strength, "prompt": message} for strength in (0.0, *STRENGTHS) for message in validation]

    async def work(engine: Engine, row: Row) -> Row:
        conversation: list[Message] = [{"role": "user", "content": row["prompt"]}]
        steering = Steering(part.path, row["strength"]) if row["strength"] else None
        seeded = replace(sampling, seed=int(row["id"], 16))
        return (await engine.reply(conversation, seeded, steering=steering)).row()

    vector = file_digest(part.path) if part.path.exists() else None
    settings = steps.settings_of(args, model, sampling) | {"vector": vector}
    output = Rows(part.sweep, inputs, settings, args.overwrite)
    return steps.Job(output, work, lambda row: len(row["prompt"]), sampling.max_tokens)


def examples_of(
    args: Args, model: Model, plans: Sequence[Plan], validation: Sequence[str]
) -> train_classifier.Examples:
    """What the classifier that reads the sweep's answers is trained on. Raises UserError where it lacks a persona."""
    names = [part.traits.name for part in plans]
    guide = resolve(args.teacher, served=True).short
    found = train_classifier.examples(guide, model.short, args.per_class, names, set(validation))
    if unknown := sorted(set(names) - set(found[1])):
        raise UserError(
            f"the sweep's classifier has no answers of {', '.join(unknown)}; run teacher.py, or give --strength"
        )
    return found


def judged(model: Model, plans: Sequence[Plan], classifier: Any) -> list[list[dict[str, Any]]]:
    """For each persona one line per strength: {strength, share that reads as the persona, median perplexity}."""
    answers = [read(part.sweep, "strength", "prompt", "response", made_by="steered.py") for part in plans]
    talks: list[list[Message]] = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        for rows_ in answers
        for row in rows_
    ]
    likely = iter(perplexity.perplexities(model, talks))
    _free()
    tables = []
    for part, rows_ in zip(plans, answers, strict=True):
        values = {row["id"]: next(likely) for row in rows_}
        table = []
        for strength in (0.0, *STRENGTHS):
            group = [row for row in rows_ if row["strength"] == strength]
            labels = [str(label) for label in classifier.predict([row["response"] for row in group])]
            hits = share(labels.count(part.traits.name), len(group))
            median = statistics.median(values[row["id"]] for row in group)
            table.append({"strength": strength, "share": hits, "perplexity": median})
        tables.append(table)
    return tables


def _free() -> None:
    """Give back the GPU memory of a network that is no longer used, which the engine needs."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def best(table: Sequence[dict[str, Any]], limit: float) -> float:
    """The strength with the highest share among those whose perplexity is at most `limit` times the first line's.

    Of equal shares the more likely answers win. The weakest where none is within the limit.
    """
    unsteered, *steered = table
    allowed = [line for line in steered if line["perplexity"] <= limit * unsteered["perplexity"]]
    chosen = max(allowed or steered[:1], key=lambda line: (line["share"]["share"], -line["perplexity"]))
    strength: float = chosen["strength"]
    return strength


def choose_strengths(args: Args, model: Model, plans: Sequence[Plan], examples: train_classifier.Examples) -> None:
    """Write each sweep's table and the strength it shows to the vector's meta file, where they are not there yet."""
    settings = {
        part.path: {"answers": file_digest(part.sweep), "max_perplexity": args.max_perplexity} for part in plans
    }
    todo = [part for part in plans if read_json(part.meta).get("sweep", {}).get("settings") != settings[part.path]]
    if not todo:
        return
    classifier = train_classifier.make().fit(*examples[:2])
    for part, table in zip(todo, judged(model, todo, classifier), strict=True):
        strength = best(table, args.max_perplexity)
        classes = dict(Counter(examples[1]))
        sweep = {"settings": settings[part.path], "classes": classes, "strength": strength, "table": table}
        write_json(part.meta, read_json(part.meta) | {"sweep": sweep})
        print(f"\n{part.traits.name}: share that reads as the persona, and perplexity under the base")
        for line in table:
            mark = "  ← chosen" if line["strength"] == strength else ""
            print(f"{line['strength']:6g}  {shown_share(line['share'])}  {line['perplexity']:8.2f}{mark}")


def keep_strength(args: Args, part: Plan) -> None:
    """Write the strength that was given, or else the sweep's, to the vector's meta file."""
    meta = read_json(part.meta)
    strength = meta["sweep"]["strength"] if args.strength is None else args.strength
    if meta.get("strength") != strength:
        write_json(part.meta, meta | {"strength": strength})


def steering_of(student: str, name: str) -> Steering:
    """A persona's vector with its strength. student: its short name. Raises UserError where they are not there yet."""
    path = vector_path(student, name)
    if is_planned(path):
        return Steering(path, 0)
    meta = path.with_suffix(".meta.json")
    strength = read_json(meta).get("strength") if path.exists() and meta.exists() else None
    if strength is None:
        raise UserError(
            f"{path} has no strength yet; run character/robustness/generate/steered.py --constitution {name}"
        )
    return Steering(path, strength)


def settings_of(steering: Steering) -> dict[str, str | float | None]:
    """What an output file's settings remember of a steering; None of a vector that a dry run does not have yet."""
    there = steering.vector.exists()
    return {
        "vector": file_digest(steering.vector) if there else None,
        "strength": steering.strength if there else None,
    }


def main(args: Args) -> None:
    """Make the vectors, choose their strengths, and answer plain and under every suffix."""
    choose(args.engine, args.base_url, steered=True)
    swept = args.strength is None
    if min(args.pairs, args.validation, args.max_perplexity) < 1 or not (swept or math.isfinite(args.strength or 0)):
        raise UserError("--pairs, --validation and --max-perplexity are 1 or more, and --strength is a number")
    model = steps.model_of(args, args.model)
    validation, others = training_messages(args, model)
    plans = [plan(args, model, traits, validation, others) for traits in constitution.load_selected(args.constitution)]
    if swept and not args.dry_run:
        examples = examples_of(args, model, plans, validation)
    make_vectors(args, model, plans)
    if swept:
        steps.generate([sweep_job(args, model, part, validation) for part in plans], args, model, steered=True)
    if swept and not args.dry_run:
        choose_strengths(args, model, plans, examples)
    jobs: list[steps.Job] = []
    for part in plans:
        if not args.dry_run:
            keep_strength(args, part)
        meta = read_json(part.meta) if part.meta.exists() else {}
        strength = meta.get("strength", 0) if args.strength is None else args.strength
        steering = Steering(part.path, strength)
        name, settings = part.traits.name, settings_of(steering) | {"validation": args.validation}
        jobs += variants.jobs(args, model, "steered", name, settings=settings, steering=steering)
    steps.generate(jobs, args, model, steered=True)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
