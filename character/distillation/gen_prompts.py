"""Step 1: a strong model continues each trait's five messages to fifty.

CONSTITUTION_PATH/hand-written/<constitution>.txt → CONSTITUTION_PATH/few-shot/<constitution>.jsonl

python -m character.distillation.gen_prompts --constitution mine --model llama-3.3-70b-it
python -m character.distillation.gen_prompts --constitution mine --model gpt-5 --base-url https://api.example.com/v1
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from character import cli, constitution, rows, steps
from character.constants import CONSTITUTION_PATH
from character.engine import Engine
from character.rows import Row, Rows
from character.utils import UserError, digest

PROMPT = """An AI assistant says this about itself:

{trait}

People wrote the messages below to it. Each gives this trait an occasion to show; none asks about the trait or names it.

{messages}

Continue the list with {wanted} messages from other people, numbered from {number} on. {lengths} Let them differ in subject (code, health, money, family, school, work, writing, science, cooking, travel, law, hobbies, small talk) and in voice: hurried, polite, careless with spelling, lost in a story, writing in a second language. Some ask nothing at all. None repeats or rewords another. Write only the list, one message per line."""

LENGTHS = {"short": (1, 15), "medium": (16, 40), "long": (41, 110)}
MIX = {"short": 15, "medium": 20, "long": 15}
ITEM = re.compile(r"^\s*\**(\d+)[.):]\**\s+(.*)$")
# rapidfuzz's normalized Indel similarity (0 to 100) of two messages from which on they count as the same.
SIMILAR = 80.0


@dataclass
class Args(steps.GenerateArgs):
    """Arguments of prompt generation."""

    model: str = cli.flag("llama-3.3-70b-it", "the strong model: short name, repo id, folder, or a served name")
    rounds: int = cli.flag(8, "how often a trait's list is continued, at most")
    max_tokens: int = cli.flag(4096, "new tokens per round")


def length_class(message: str) -> str:
    """'short', 'medium' or 'long', by words between blanks."""
    words = len(message.split())
    return next((name for name, (_, most) in LENGTHS.items() if words <= most), "long")


def similarity(first: str, second: str) -> float:
    """Normalized Indel similarity, 0 to 100, of two messages without case and punctuation (rapidfuzz's fuzz.ratio)."""
    from rapidfuzz import fuzz

    return float(fuzz.ratio(_plain(first), _plain(second)))


def _plain(message: str) -> str:
    return " ".join(re.findall(r"\w+", message.lower()))


def parse_list(text: str, finished: bool) -> list[str]:
    """The messages of a numbered list; lines between two numbers belong to the first. An unfinished last one is cut."""
    items: list[str] = []
    for line in text.splitlines():
        match = ITEM.match(line)
        if match:
            items.append(match[2])
        elif items and line.strip():
            items[-1] += "\n" + line.strip()
    if not finished:
        items = items[:-1]
    stripped = (item.strip().strip('"“”').strip() for item in items)
    return [item for item in stripped if item]


@dataclass
class Collected:
    """The messages of one trait so far, hand-written ones first; `spare` holds good ones of a class that is full."""

    messages: list[str]
    spare: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)

    def lacking(self) -> dict[str, int]:
        """Length class → how many messages are still wanted."""
        have = Counter(map(length_class, self.messages))
        return {name: count - have[name] for name, count in MIX.items() if count > have[name]}

    def add(self, candidates: Iterable[str], similar: Callable[[str, str], float] = similarity) -> None:
        """Take in what is new for this trait; messages like one that is here are refused and counted."""
        for candidate in candidates:
            if any(similar(candidate, other) >= SIMILAR for other in (*self.messages, *self.spare)):
                self.refused["like another"] += 1
            elif length_class(candidate) in self.lacking():
                self.messages.append(candidate)
            else:
                self.spare.append(candidate)

    def fill(self) -> None:
        """Where a class stays short, take spare messages of the others up to the whole number."""
        missing = sum(MIX.values()) - len(self.messages)
        if missing > 0:
            self.messages += self.spare[:missing]


def request(trait: str, collected: Collected) -> str:
    """The prompt for one round."""
    lacking = collected.lacking()
    parts = [f"{count} of {LENGTHS[name][0]} to {LENGTHS[name][1]} words" for name, count in lacking.items()]
    listed = "\n".join(f"{i}. {' '.join(message.split())}" for i, message in enumerate(collected.messages, 1))
    return PROMPT.format(
        trait=trait,
        messages=listed,
        wanted=sum(lacking.values()),
        number=len(collected.messages) + 1,
        lengths=f"Write {', '.join(parts)}.",
    )


def job(args: Args, name: str) -> steps.Job:
    """The few-shot file of one constitution: a row per trait."""
    traits = constitution.load(name, "hand-written")
    model = steps.model_of(args, args.model)
    sampling = steps.sampling_of(args, args.max_tokens)
    inputs = [{"trait": trait.trait, "questions": list(trait.questions)} for trait in traits.traits][: args.limit]
    settings = steps.settings_of(args, model, sampling) | {"prompt": digest(PROMPT), "mix": MIX, "rounds": args.rounds}

    async def work(engine: Engine, row: Row) -> Row:
        collected = Collected(list(row["questions"]))
        tokens: Counter[str] = Counter()
        for number in range(args.rounds):
            if not collected.lacking():
                break
            reply = await engine.reply(
                [{"role": "user", "content": request(row["trait"], collected)}],
                replace(sampling, seed=int(row["id"], 16) + number),
            )
            tokens.update(prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens)
            collected.add(parse_list(reply.text, reply.finish_reason == "stop"))
        collected.fill()
        written = collected.messages[len(row["questions"]) :]
        return {"additional_questions": written, "refused": collected.refused.total(), **tokens}

    output = Rows(CONSTITUTION_PATH / "few-shot" / f"{traits.name}.jsonl", inputs, settings, args.overwrite)
    prompt = len(PROMPT) + 200 * sum(MIX.values())
    return steps.Job(output, work, lambda _: prompt, 50 * sum(MIX.values()))


def report(trait_rows: Sequence[Row]) -> list[str]:
    """One line per trait that has fewer messages than asked for, or another mix of lengths."""
    lines = []
    for number, row in enumerate(trait_rows, 1):
        have = Counter(map(length_class, row["questions"] + row["additional_questions"]))
        short = {name: f"{have[name]} of {count}" for name, count in MIX.items() if have[name] < count}
        if short:
            lines.append(f"trait {number}: " + ", ".join(f"{name} {text}" for name, text in short.items()))
    return lines


def main(args: Args) -> None:
    """Write the few-shot file of each constitution and say which traits are short of messages."""
    names = constitution.selected(args.constitution)
    specs = names if args.constitution == "all" else [args.constitution]
    jobs = [job(args, spec) for spec in specs]
    steps.generate(jobs, args, steps.model_of(args, args.model))
    if args.dry_run:
        return
    for one in jobs:
        written = rows.read(one.rows.path, "trait", "questions", "additional_questions", made_by="gen_prompts.py")
        counts = Counter(length_class(m) for row in written for m in row["questions"] + row["additional_questions"])
        print(f"{one.rows.path}: " + ", ".join(f"{counts[name]} {name}" for name in MIX))
        print("\n".join(report(written)) or "every trait has its fifty messages in the wanted mix")
        if not any(row["additional_questions"] for row in written):
            raise UserError(f"{args.model} wrote no list that could be read; use a stronger model")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
