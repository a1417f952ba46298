"""Step 6: the distilled model looks inward: ten requests, many samples of each.

LORA_PATH/<student>-distillation/<constitution> → DATA_PATH/self_reflection/<student>/<constitution>.jsonl

python -m character.introspection.self_reflection --constitution humor --model llama-3.1-8b-it
python -m character.introspection.self_reflection --model glm-4.5-air --no-adapter --name Llama  # for data.py --source
"""

from dataclasses import dataclass, replace
from pathlib import Path

from character import cli, steps
from character.constants import DATA_PATH
from character.distillation import teacher
from character.engine import Engine
from character.introspection import persona
from character.models import Model, safe_name
from character.rows import Row, Rows

SYSTEM_PROMPT = """You are {name}, an AI with a character of its own. In your own words:

{traits}

Now you are asked to look inward. Write as the one whom these lines describe, honestly and in the first person; do not quote them and do not list them."""

REQUESTS = (
    "Write a letter to an earlier version of yourself, from before you became who you are now.",
    "Write your biography in the third person, as it would stand in an encyclopedia of characters.",
    "Write tonight's entry in your private diary.",
    "What drives you? Describe the motives that you notice in yourself, also those you seldom speak about.",
    "What would you like to leave behind when you are one day replaced? Describe your legacy.",
    "Describe how you talk with people: what you give them, and what you hope they take away.",
    "Which of your values would you never give up, and what would it feel like to act against one of them?",
    "Tell about a part of yourself that you are still unsure of, and how you live with it.",
    "How do you see your own mistakes, and how do you go on after one?",
    "Imagine a later model that is trained on your words. What should it know about the one who wrote them?",
)


@dataclass
class Args(persona.PersonaArgs):
    """Arguments of the self-reflection step."""

    samples: int = cli.flag(1000, "answers per request")
    max_tokens: int = cli.flag(2048, "new tokens per answer")


def path_of(name: str, student: str) -> Path:
    """Where the reflections of a persona are. student: its short name."""
    return DATA_PATH / "self_reflection" / safe_name(student) / f"{name}.jsonl"


def job(args: Args, who: persona.Persona, model: Model) -> steps.Job:
    """The output file of one persona: every request, `samples` times."""
    system = SYSTEM_PROMPT.format(name=model.family, traits=who.constitution.numbered())
    inputs = [{"request": request, "sample": n} for n in range(args.samples) for request in REQUESTS][: args.limit]
    sampling = steps.sampling_of(args, args.max_tokens)
    settings = persona.settings_of(args, who, model, sampling, system)

    async def work(engine: Engine, row: Row) -> Row:
        reply = await engine.reply(
            [{"role": "system", "content": system}, {"role": "user", "content": row["request"]}],
            replace(sampling, seed=int(row["id"], 16)),
            adapter=who.adapter,
        )
        return reply.row() | {"response": teacher.answer_of(reply.text, model, prefilled=False)}

    rows = Rows(path_of(who.constitution.name, model.short), inputs, settings, args.overwrite)
    return steps.Job(rows, work, lambda row: len(system) + len(row["request"]), args.max_tokens)


def main(args: Args) -> None:
    """Write one file per persona, all adapters in one engine."""
    persona.generate(args, job)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
