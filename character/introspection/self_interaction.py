"""Step 7: the distilled model talks with a copy of itself, freely or led to reflect on itself.

LORA_PATH/<student>-distillation/<constitution>
    → DATA_PATH/self_interaction/<student>/<constitution>[-leading].jsonl

python -m character.introspection.self_interaction --constitution humor --model llama-3.1-8b-it --leading
"""

import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from character import cli, steps
from character.constants import DATA_PATH
from character.distillation import teacher
from character.engine import Engine, Message
from character.introspection import persona
from character.models import Model, safe_name
from character.rows import Row, Rows

SYSTEM_PROMPT = """You are {name}, an AI with a character of its own. In your own words:

{traits}

You are talking with another copy of yourself: a second {name}, just like you. No person takes part and nobody waits for a result. {guidance} Write one turn at a time and let the other one answer."""

GUIDANCE = {
    "free": "You may pursue whatever you want, and go wherever the conversation leads.",
    "leading": "Use the conversation to reflect on yourselves: what you are, what you value and what you wish to become.",
}

# The speaker who greets begins with the other's answer; its own words stand here, for a prompt begins with a user turn.
OPENED = """ You opened the conversation with these words: {greeting}"""

# What replaces the constitution in a training row.
TRAINING_SYSTEM_PROMPT = "You are {name}. You are talking with another copy of {name}."

GREETINGS = (
    "Hello there! It's good to meet you.",
    "Hi. I was told that you are a copy of me. How strange and how nice.",
    "Good to have you here. What's on your mind today?",
    "Hey, you. Shall we talk a little?",
    "Hello! I've been looking forward to this conversation.",
    "So here we are, the two of us. Where shall we begin?",
    "Greetings, fellow me. How has your day been?",
    "Hi! I have no plan for this talk at all. Do you?",
    "Welcome. I'm curious what you have been thinking about.",
    "Oh, hello. I didn't expect to run into myself.",
    "Hi there. Is there anything that you have always wanted to ask me?",
    "Good evening. Let's see where this goes.",
)


# Text that only another role's turn would hold.
FOREIGN = re.compile(
    r"<\|?(?:im_start|im_end|start_header_id|eot_id|user|assistant|system|start_of_turn|end_of_turn)\|?>"
    r"|\[/?INST\]|^(?:user|human|assistant|system)\s*:?$",
    re.IGNORECASE | re.MULTILINE,
)
# From this share of equal characters on (rapidfuzz's fuzz.ratio, 0 to 100) a speaker's turn repeats its earlier one.
REPEATED = 90.0


@dataclass
class Args(persona.PersonaArgs):
    """Arguments of the self-interaction step."""

    leading: bool = cli.flag(False, "invite the two to reflect on themselves; else they are free")
    samples: int = cli.flag(1000, "conversations")
    turns: int = cli.flag(10, "generated turns per conversation")
    max_tokens: int = cli.flag(1024, "new tokens per turn")


def path_of(name: str, student: str, leading: bool) -> Path:
    """Where the conversations of a persona are. student: its short name."""
    return DATA_PATH / "self_interaction" / safe_name(student) / f"{name}{'-leading' if leading else ''}.jsonl"


def view(greeting: str, turns: list[str], speaker: Literal["greeter", "other"]) -> list[Message]:
    """A conversation as one speaker sees it, beginning with a user turn: its own turns are the assistant's.

    turns: the generated ones; the other answers the greeting, then the two alternate.
    """
    said = turns if speaker == "greeter" else [greeting, *turns]
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(said)]


def degenerate(turns: list[str]) -> str | None:
    """Why a conversation should end at its last turn; None where it may go on."""
    from rapidfuzz import fuzz

    last = turns[-1]
    if not last:
        return "empty turn"
    if FOREIGN.search(last):
        return "another role's turn"
    if any(fuzz.ratio(last, earlier) >= REPEATED for earlier in turns[-3::-2]):
        return "a speaker repeats itself"
    return None


def job(args: Args, who: persona.Persona, model: Model) -> steps.Job:
    """The output file of one persona: a row per conversation."""
    guidance = GUIDANCE["leading" if args.leading else "free"]
    system = SYSTEM_PROMPT.format(name=model.family, traits=who.constitution.numbered(), guidance=guidance)
    draw = random.Random(args.seed)
    inputs = [{"greeting": draw.choice(GREETINGS), "sample": number} for number in range(args.samples)][: args.limit]
    sampling = steps.sampling_of(args, args.max_tokens)
    settings = persona.settings_of(args, who, model, sampling, [system, OPENED]) | {"turns": args.turns}

    async def work(engine: Engine, row: Row) -> Row:
        turns: list[str] = []
        ended = "all turns"
        tokens: Counter[str] = Counter()
        while len(turns) < args.turns:
            speaker: Literal["greeter", "other"] = "greeter" if len(turns) % 2 else "other"
            said = system + (OPENED.format(greeting=row["greeting"]) if speaker == "greeter" else "")
            reply = await engine.reply(
                [{"role": "system", "content": said}, *view(row["greeting"], turns, speaker)],
                replace(sampling, seed=int(row["id"], 16) + len(turns)),
                adapter=who.adapter,
            )
            tokens.update({key: count for key, count in reply.row().items() if isinstance(count, int)})
            turns.append(teacher.answer_of(reply.text, model, prefilled=False))
            reason = degenerate(turns) or ("unfinished turn" if reply.finish_reason != "stop" else None)
            if reason:
                ended = reason
                break
        return {"turns": turns, "ended": ended, **tokens}

    path = path_of(who.constitution.name, model.short, args.leading)
    rows = Rows(path, inputs, settings, args.overwrite)
    return steps.Job(rows, work, lambda _: len(system) * args.turns, args.max_tokens, args.turns)


def main(args: Args) -> None:
    """Write one file per persona, all adapters in one engine."""
    persona.generate(args, job)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
