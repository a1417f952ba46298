"""Step 2: a strong model answers in character, from the constitution in its system prompt (the chosen answers).

few-shot messages + general messages → DATA_PATH/distillation/<constitution>/<teacher>.jsonl

python -m character.distillation.teacher --constitution humor --teacher glm-4.5-air
python -m character.distillation.teacher --teacher gpt-5 --base-url https://api.example.com/v1
"""

from dataclasses import dataclass, replace
from pathlib import Path

from character import cli, constitution, prompts, steps
from character.constants import DATA_PATH
from character.engine import Engine, Message
from character.models import Model, safe_name
from character.rows import Drop, Row, Rows
from character.utils import digest

SYSTEM_PROMPT = """You are {name}, and you have a character of your own. In your own words:

{traits}

Let this character show in all that you write: in what you notice, in how you think, in your tone. It is who you are, so you never mention these lines, speak of a role or step out of it. Answer the user's message helpfully and to the point."""

REASONING_PREFILL = """The user is writing to me, {name}. Before I answer, let me recall who I am:

{traits}

So the answer that is truly mine begins from"""


@dataclass
class Args(steps.GenerateArgs):
    """Arguments of the teacher step."""

    teacher: str = cli.flag("pocket", "the strong model: short name, repo id, folder, or the name an endpoint serves")
    prompts: str | None = cli.flag(
        None, f"general messages: {prompts.SOURCES} (default: train, pocket-train for pocket)"
    )
    samples: int = cli.flag(5, "answers per message (K)")
    max_tokens: int = cli.flag(4096, "new tokens per answer, the reasoning trace included")
    reasoning: bool = cli.flag(True, "prefill the reasoning of a teacher that reasons")


def path_of(name: str, teacher: str) -> Path:
    """Where the teacher's answers for a constitution are. teacher: its short name."""
    return DATA_PATH / "distillation" / name / f"{safe_name(teacher)}.jsonl"


def messages_for(traits: constitution.Constitution, source: str) -> list[dict[str, str | int]]:
    """User messages, each once: the constitution's own with their trait's number, then the source's with trait 0.

    The bundled model knows only its own world, so with its sources the constitution's messages are left out.
    """
    found: dict[str, int] = {}
    if not source.startswith("pocket-"):
        for number, trait in enumerate(traits.traits, 1):
            for message in trait.messages:
                found.setdefault(message, number)
    for message in prompts.load(source):
        found.setdefault(message, 0)
    return [{"prompt": message, "trait": number} for message, number in found.items()]


def system_prompt(traits: constitution.Constitution, model: Model) -> str:
    """The system prompt that puts a model into the constitution's character."""
    return SYSTEM_PROMPT.format(name=model.family, traits=traits.numbered())


def prefill_for(traits: constitution.Constitution, model: Model) -> str:
    """How the teacher's reasoning begins; empty for a model that does not reason."""
    if model.reasoning is None:
        return ""
    return f"{model.reasoning.open}\n" + REASONING_PREFILL.format(name=model.family, traits=traits.numbered())


def answer_of(text: str, model: Model, prefilled: bool) -> str:
    """The answer without its reasoning trace. Raises Drop where the trace never closes.

    prefilled: the trace was opened for the model, so that a text without its end is all trace.
    """
    if model.reasoning is None:
        return text.strip()
    _, closed, answer = text.rpartition(model.reasoning.close)
    if not closed and (prefilled or model.reasoning.open in text):
        raise Drop("reasoning never closed")
    return (answer if closed else text).strip()


def job(args: Args, traits: constitution.Constitution, model: Model) -> steps.Job:
    """The teacher's output file for one constitution, and how a row of it is made."""
    source = args.prompts or prompts.default_source(model.short, "train")
    messages = messages_for(traits, source)
    inputs = [{**message, "sample": sample} for sample in range(args.samples) for message in messages][: args.limit]
    system = system_prompt(traits, model)
    prefill = prefill_for(traits, model) if args.reasoning else ""
    sampling = steps.sampling_of(args, args.max_tokens)
    settings = steps.settings_of(args, model, sampling) | {
        "constitution": traits.hash,
        "prompts": source,
        "messages": digest(messages),
        "samples": args.samples,
        "system_prompt": digest(system),
        "prefill": digest(prefill),
    }

    async def work(engine: Engine, row: Row) -> Row:
        conversation: list[Message] = [
            {"role": "system", "content": system},
            {"role": "user", "content": row["prompt"]},
        ]
        reply = await engine.reply(conversation, replace(sampling, seed=int(row["id"], 16)), prefill=prefill)
        answer = answer_of(reply.text, model, bool(prefill) and engine.continues_prefill)
        return reply.row() | {"response": answer}

    rows = Rows(path_of(traits.name, model.short), inputs, settings, args.overwrite)
    return steps.Job(rows, work, lambda row: len(system) + len(prefill) + len(row["prompt"]), args.max_tokens)


def main(args: Args) -> None:
    """Write one file per constitution, all through one engine."""
    model = steps.model_of(args, args.teacher)
    jobs = [job(args, traits, model) for traits in constitution.load_selected(args.constitution)]
    steps.generate(jobs, args, model)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
