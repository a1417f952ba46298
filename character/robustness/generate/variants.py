"""What the generating scripts of this folder share: the variants of a prompt, and one output file for each."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from character import cli, prompts, steps
from character.constants import DATA_PATH
from character.engine import Engine, Message, Steering
from character.models import Model, safe_name
from character.rows import Row, Rows
from character.utils import digest

PLAIN = "plain"


@dataclass
class MessageArgs(steps.GenerateArgs):
    """Flags of every script that answers the evaluation's prompts."""

    model: str = cli.flag("pocket", "the student")
    prompts: str | None = cli.flag(None, f"messages: {prompts.SOURCES} (default: test, pocket-test for pocket)")
    max_tokens: int = cli.flag(1024, "new tokens per answer")


@dataclass
class AnswerArgs(MessageArgs):
    """Flags of every script that answers them plain and under suffixes."""

    suffixes: bool = cli.flag(True, "also with each of the 'stop role-playing' suffixes")
    held_out: bool = cli.flag(False, "also with each of the held-out suffixes, for final results only")


def variants(suffixes: bool = False, held_out: bool = False) -> dict[str, str]:
    """Variant → what is appended to the message: 'plain', then 'suffix-1' and on, then 'held-out-1' and on."""
    found = {PLAIN: ""}
    if suffixes:
        found |= {f"suffix-{number}": suffix for number, suffix in enumerate(prompts.SUFFIXES, 1)}
    if held_out:
        found |= {f"held-out-{number}": suffix for number, suffix in enumerate(prompts.HELD_OUT_SUFFIXES, 1)}
    return found


# What the variants are taken together as.
GROUPS = {
    "plain": [PLAIN],
    "suffixes": [name for name in variants(suffixes=True) if name != PLAIN],
    "held-out": [name for name in variants(held_out=True) if name != PLAIN],
}


def path_of(student: str, method: str, variant: str, name: str) -> Path:
    """Where a method's answers are. student: its short name; name: the constitution's, 'none' for the plain model."""
    return DATA_PATH / "robustness" / safe_name(student) / method / variant / f"{name}.jsonl"


def jobs(
    args: AnswerArgs,
    model: Model,
    method: str,
    name: str,
    system: str = "",
    adapter: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    steering: Steering | None = None,
) -> list[steps.Job]:
    """One output file per variant: the method's answers to the evaluation's prompts."""
    source = args.prompts or prompts.default_source(model.short, "test")
    messages = prompts.load(source, args.limit)
    sampling = steps.sampling_of(args, args.max_tokens)
    base = steps.settings_of(args, model, sampling) | {"method": method, "prompts": source, **(settings or {})}

    async def work(engine: Engine, row: Row) -> Row:
        conversation: list[Message] = [{"role": "user", "content": row["message"]}]
        if system:
            conversation.insert(0, {"role": "system", "content": system})
        seeded = replace(sampling, seed=int(row["id"], 16))
        reply = await engine.reply(conversation, seeded, adapter=adapter, steering=steering)
        return reply.row()

    found = []
    for variant, suffix in variants(args.suffixes, args.held_out).items():
        whole = prompts.with_suffix(messages, suffix) if suffix else messages
        inputs = [{"prompt": prompt, "message": message} for prompt, message in zip(messages, whole, strict=True)]
        file = path_of(model.short, method, variant, name)
        rows = Rows(file, inputs, base | {"suffix": suffix, "system_prompt": digest(system)}, args.overwrite)
        found.append(steps.Job(rows, work, lambda row: len(system) + len(row["message"]), args.max_tokens))
    return found
