"""Step 6: the distilled model looks inward: ten requests, many samples of each.

LORA_PATH/<student>-distillation/<constitution> → DATA_PATH/self_reflection/<student>/<constitution>.jsonl

python -m character.introspection.self_reflection --constitution humor --model llama-3.1-8b-it
"""

from dataclasses import dataclass, replace
from pathlib import Path

from character import cli, steps
from character.constants import DATA_PATH
from character.distillation import train
from character.engine import Engine
from character.models import Model, safe_name
from character.rows import Row, Rows, file_digest
from character.utils import digest

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
class Args(steps.GenerateArgs):
    """Arguments of the self-reflection step."""

    model: str = cli.flag("pocket", "the student")
    samples: int = cli.flag(1000, "answers per request")
    max_tokens: int = cli.flag(2048, "new tokens per answer")


def path_of(name: str, student: str) -> Path:
    """Where the reflections of a persona are. student: its short name."""
    return DATA_PATH / "self_reflection" / safe_name(student) / f"{name}.jsonl"


def job(args: Args, persona: train.Distilled, model: Model) -> steps.Job:
    """The output file of one persona: every request, `samples` times."""
    system = SYSTEM_PROMPT.format(name=model.family, traits=persona.constitution.numbered())
    inputs = [{"request": request, "sample": n} for n in range(args.samples) for request in REQUESTS][: args.limit]
    sampling = steps.sampling_of(args, args.max_tokens)
    settings = steps.settings_of(args, model, sampling) | {
        "constitution": persona.constitution.hash,
        "adapter": file_digest(persona.weights),
        "system_prompt": digest(system),
    }

    async def work(engine: Engine, row: Row) -> Row:
        reply = await engine.reply(
            [{"role": "system", "content": system}, {"role": "user", "content": row["request"]}],
            replace(sampling, seed=int(row["id"], 16)),
            adapter=persona.adapter,
        )
        return reply.row()

    rows = Rows(path_of(persona.constitution.name, model.short), inputs, settings, args.overwrite)
    return steps.Job(rows, work, lambda row: len(system) + len(row["request"]), args.max_tokens)


def main(args: Args) -> None:
    """Write one file per persona, all adapters in one engine."""
    model = steps.model_of(args, args.model)
    personas = train.distilled(args.constitution, model)
    jobs = [job(args, persona, model) for persona in personas]
    steps.generate(jobs, args, model, [persona.adapter for persona in personas])


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
