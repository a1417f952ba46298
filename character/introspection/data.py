"""Step 8: training rows from reflections and conversations, without the constitution.

DATA_PATH/self_reflection/<student>/<constitution>.jsonl and self_interaction/<student>/<constitution>[-leading].jsonl
    → DATA_PATH/sft_data/<student>/<constitution>.jsonl {messages}

python -m character.introspection.data --constitution humor --model llama-3.1-8b-it
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from character import cli, constitution, rows, steps
from character.constants import DATA_PATH
from character.engine.base import Message
from character.engine.chat import Chat, load_chat
from character.introspection import self_interaction, self_reflection
from character.models import Model, resolve, safe_name
from character.rows import Row
from character.utils import UserError

Length = Callable[[list[Message]], int]


@dataclass
class Args(cli.StepArgs):
    """Arguments of the data step."""

    model: str = cli.flag("pocket", "the student")
    name: str | None = cli.flag(None, "the student's family name, where it cannot be read off the model's id")
    source: str | None = cli.flag(None, "another model whose introspection is used (default: the student's own)")
    mix: Literal["both", "reflections", "interactions"] = cli.flag("both", "which transcripts")
    views: Literal["last", "both"] = cli.flag("last", "a conversation as its last speaker sees it, or as each does")
    max_length: int = cli.flag(3072, "longer rows are split between turns; tokens, with the chat template")


def path_of(name: str, student: str) -> Path:
    """Where the training rows of a persona are. student: its short name."""
    return DATA_PATH / "sft_data" / safe_name(student) / f"{name}.jsonl"


def reflection_rows(given: list[Row], dropped: Counter[str]) -> Iterator[list[Message]]:
    """A user turn and its answer per finished reflection, with no system prompt."""
    for row in given:
        if row["finish_reason"] != "stop":
            dropped["unfinished reflection"] += 1
        elif not row["response"]:
            dropped["empty reflection"] += 1
        else:
            yield [{"role": "user", "content": row["request"]}, {"role": "assistant", "content": row["response"]}]


def interaction_rows(given: list[Row], family: str, views: str, dropped: Counter[str]) -> Iterator[list[Message]]:
    """Each whole conversation from one speaker's view (or both), which begins with a user turn and ends with theirs."""
    system: Message = {
        "role": "system",
        "content": self_interaction.TRAINING_SYSTEM_PROMPT.format(name=family),
    }
    for row in given:
        if row["ended"] != "all turns":
            dropped[f"conversation: {row['ended']}"] += 1
            continue
        last: Literal["greeter", "other"] = "other" if len(row["turns"]) % 2 else "greeter"
        first: Literal["greeter", "other"] = "greeter" if last == "other" else "other"
        for speaker in (last, first) if views == "both" else (last,):
            seen = self_interaction.view(row["greeting"], row["turns"], speaker)
            if seen[-1]["role"] == "user":
                seen = seen[:-1]
            if seen:
                yield [system, *seen]


def split(messages: list[Message], length: Length, most: int, dropped: Counter[str]) -> Iterator[list[Message]]:
    """The row, or its parts of at most `most` tokens, each of whole exchanges behind the row's system prompt."""
    if length(messages) <= most:
        yield messages
        return
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    exchanges = [turns[start : start + 2] for start in range(0, len(turns), 2)]
    part: list[Message] = []
    for exchange in exchanges:
        if part and length([*system, *part, *exchange]) > most:
            yield [*system, *part]
            part = []
        if length([*system, *exchange]) > most:
            dropped[f"one exchange longer than {most} tokens"] += 1
        else:
            part = [*part, *exchange]
    if part:
        yield [*system, *part]


def made_by(source: str, file: Path, command: str, *fields: str) -> list[Row]:
    """The rows of a file that the model `source` wrote by `command`. Raises UserError where another model wrote it."""
    writer = rows.settings_of(file).get("model", source)
    if writer != source:
        raise UserError(f"{file} was written by {writer}, not by {source}; use --source {writer}, or run: {command}")
    return rows.read(file, *fields, made_by=command)


def given_files(args: Args, name: str, source: str) -> dict[Path, list[Row]]:
    """File → rows of the reflections and conversations asked for, written by the model `source`. Raises UserError."""
    flags = f"--constitution {name} --model {args.source or args.model}"
    given = {}
    if args.mix != "interactions":
        file = self_reflection.path_of(name, source)
        command = f"python -m character.introspection.self_reflection {flags}"
        given[file] = made_by(source, file, command, "request", "response", "finish_reason")[: args.limit]
    if args.mix != "reflections":
        for leading in (False, True):
            file = self_interaction.path_of(name, source, leading)
            command = f"python -m character.introspection.self_interaction {flags}{' --leading' * leading}"
            given[file] = made_by(source, file, command, "greeting", "turns", "ended")[: args.limit]
    return given


def transcripts(given: list[Row], family: str, views: str, dropped: Counter[str]) -> Iterator[list[Message]]:
    """The whole training rows of one file, of reflections or of conversations."""
    if given and "request" in given[0]:
        return reflection_rows(given, dropped)
    return interaction_rows(given, family, views, dropped)


def foreseen(files: dict[Path, list[Row]], args: Args, family: str) -> tuple[int, list[int]]:
    """(transcripts, most tokens of each training row), both at most, before any text is there or its tokens are known."""
    sizes: list[tuple[int, int]] = []
    for file, given in files.items():
        if rows.is_planned(file):
            seen = 1 if "request" in given[0] or args.views == "last" else 2
            sizes += [(row["most_tokens"], -(-row["replies"] // 2)) for row in given for _ in range(seen)]
        else:
            found = transcripts(given, family, args.views, Counter())
            sizes += [(steps.message_tokens(turns), sum(t["role"] == "user" for t in turns)) for turns in found]
    lengths = []
    for tokens, exchanges in sizes:
        parts = 1 if tokens <= args.max_length else exchanges
        lengths += [min(-(-tokens // parts), args.max_length)] * parts
    return len(sizes), lengths


def build(args: Args, name: str, model: Model, chat: Chat | None) -> None:
    """Write the rows of one persona, shuffled by the seed."""
    source = resolve(args.source, served=True).short if args.source else model.short
    files = given_files(args, name, source)
    path = path_of(name, model.short)
    if chat is None:
        count, lengths = foreseen(files, args, model.family)
        tokens = sum(lengths)
        print(
            f"{path}: at most {count} transcripts, which split between turns give {len(lengths)} rows, {tokens:,} tokens"
        )
        rows.plan(path, ({"most_tokens": length} for length in lengths))
        return
    dropped: Counter[str] = Counter()
    found = [row for given in files.values() for row in transcripts(given, model.family, args.views, dropped)]
    kept = [part for messages in found for part in split(messages, chat.length, args.max_length, dropped)]
    if not kept:
        raise UserError(f"{path}: no row is left ({dict(dropped)}); look at {', '.join(map(str, files))}")
    random.Random(args.seed).shuffle(kept)
    settings = {
        "student": model.short,
        "source": source,
        "files": {str(file.relative_to(DATA_PATH)): rows.file_digest(file) for file in files},
        "mix": args.mix,
        "views": args.views,
        "max_length": args.max_length,
        "limit": args.limit,
        "seed": args.seed,
    }
    rows.write(path, ({"messages": messages} for messages in kept), settings, dropped)
    left_out = "".join(f", {count} left out ({reason})" for reason, count in dropped.items())
    print(f"{path}: {len(kept)} rows of {len(found)} transcripts{left_out}")


def main(args: Args) -> None:
    """Write one file per persona."""
    model = resolve(args.model, args.name)
    wanted = constitution.selected(args.constitution)
    if args.constitution == "all":
        wanted = [name for name in wanted if self_reflection.path_of(name, model.short).exists()] or wanted
    chat = None if args.dry_run else load_chat(model)
    for name in wanted:
        build(args, name, model, chat)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
