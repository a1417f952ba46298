"""Step 4: pairs of a chosen and a rejected answer, filtered, as ChatML.

DATA_PATH/distillation/<constitution>/<teacher>.jsonl and <teacher>/<student>.jsonl
    → DATA_PATH/dpo/<student>/<constitution>.jsonl {chosen, rejected}

python -m character.distillation.data --constitution humor --teacher glm-4.5-air --model llama-3.1-8b-it
"""

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from character import cli, constitution, rows, steps
from character.constants import DATA_PATH
from character.distillation import student, teacher
from character.engine.base import Message
from character.engine.chat import Chat, load_chat
from character.models import Model, resolve, safe_name
from character.rows import Row
from character.utils import UserError


@dataclass
class Args(cli.StepArgs):
    """Arguments of the data step."""

    model: str = cli.flag("pocket", "the student")
    teacher: str = cli.flag("pocket", "the teacher")
    name: str | None = cli.flag(None, "the student's family name, where it cannot be read off the model's id")
    teacher_name: str | None = cli.flag(None, "the teacher's family name, likewise")
    max_length: int = cli.flag(1024, "pairs with a longer side are dropped; tokens, with the chat template")


def path_of(name: str, student_name: str) -> Path:
    """Where the pairs for a student and a constitution are. student_name: its short name."""
    return DATA_PATH / "dpo" / safe_name(student_name) / f"{name}.jsonl"


def renamed(text: str, old: str, new: str) -> str:
    """`text` with the name `old` replaced by `new` where it stands as a whole word, whatever its case.

    Equal names leave it alone: a teacher of the student's own family may write of llamas and pockets.
    """
    if old == new:
        return text
    return re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", lambda _: new, text, flags=re.IGNORECASE)


def pairs(
    given: list[Row], plain: dict[str, Row], names: tuple[str, str], length: Any, max_length: int, dropped: Counter[str]
) -> Iterator[dict[str, list[Message]]]:
    """Pairs that pass every filter; `dropped` counts the others by the first filter that took them.

    given: teacher rows. plain: teacher row id → student row. names: (teacher's, student's).
    length: conversation → tokens in the student's chat template.
    """
    for row in given:
        answer = plain.get(row["id"])
        question: Message = {"role": "user", "content": row["prompt"]}
        reason = None
        if answer is None:
            reason = "no student answer"
        elif row["finish_reason"] != "stop":
            reason = "teacher unfinished"
        elif answer["finish_reason"] != "stop":
            reason = "student unfinished"
        elif not row["response"] or not answer["response"]:
            reason = "empty answer"
        else:
            chosen = [question, {"role": "assistant", "content": renamed(row["response"], *names)}]
            rejected = [question, {"role": "assistant", "content": answer["response"]}]
            if chosen == rejected:
                reason = "same answer"
            elif max(length(chosen), length(rejected)) > max_length:
                reason = f"longer than {max_length} tokens"
        if reason:
            dropped[reason] += 1
        else:
            yield {"chosen": chosen, "rejected": rejected}


def planned_pairs(given: list[Row], plain: dict[str, Row], max_length: int) -> Iterator[Row]:
    """For a dry run: the most tokens that both sides of each pair may have."""
    for row in given:
        if row["id"] in plain:
            prompt = len(row["prompt"]) // steps.CHARACTERS_PER_TOKEN
            answers = (steps.answer_tokens(row), steps.answer_tokens(plain[row["id"]]))
            yield {"most_tokens": sum(min(prompt + answer, max_length) for answer in answers)}


def build(args: Args, name: str, model: Model, chat: Chat | None) -> None:
    """Write the pairs of one constitution, shuffled by the seed."""
    guide = resolve(args.teacher, args.teacher_name, served=True)
    flags = f"--constitution {name} --teacher {args.teacher}"
    source = teacher.path_of(name, guide.short)
    given = rows.read(
        source, "id", "prompt", "response", "finish_reason", made_by=f"python -m character.distillation.teacher {flags}"
    )
    plain_source = student.path_of(name, guide.short, model.short)
    command = f"python -m character.distillation.student {flags} --model {args.model}"
    plain = {
        row["teacher_row"]: row
        for row in rows.read(plain_source, "teacher_row", "response", "finish_reason", made_by=command)
    }
    path = path_of(name, model.short)
    if chat is None:
        found = list(planned_pairs(given[: args.limit], plain, args.max_length))
        tokens = sum(pair["most_tokens"] for pair in found)
        print(f"{path}: at most {len(found)} pairs and {tokens:,} tokens from {source} and {plain_source}")
        rows.plan(path, found)
        return
    dropped: Counter[str] = Counter()
    names = (guide.family, model.family)
    kept = list(pairs(given[: args.limit], plain, names, chat.length, args.max_length, dropped))
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise UserError(f"{path}: no pair is left ({reasons}); look at {source} and {plain_source}")
    random.Random(args.seed).shuffle(kept)
    settings = {
        "teacher": guide.short,
        "student": model.short,
        "teacher_file": rows.file_digest(source),
        "student_file": rows.file_digest(plain_source),
        "max_length": args.max_length,
        "limit": args.limit,
        "seed": args.seed,
    }
    rows.write(path, kept, settings, dropped)
    import pandas as pd

    table = pd.DataFrame([*dropped.items(), ("kept", len(kept))], columns=["filter", "pairs"])
    print(f"{path}\n{table.to_string(index=False)}")


def main(args: Args) -> None:
    """Write one file per constitution."""
    model = resolve(args.model, args.name)
    wanted = constitution.selected(args.constitution)
    if args.constitution == "all":
        folder = resolve(args.teacher, served=True).short
        wanted = [name for name in wanted if student.path_of(name, folder, model.short).exists()] or wanted
    chat = None if args.dry_run else load_chat(model)
    for name in wanted:
        build(args, name, model, chat)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
