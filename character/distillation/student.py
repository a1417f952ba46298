"""Step 3: the model to be trained answers the same messages, with no persona prompt (the rejected answers).

DATA_PATH/distillation/<constitution>/<teacher>.jsonl
    → DATA_PATH/distillation/<constitution>/<teacher>/<student>.jsonl

python -m character.distillation.student --constitution humor --teacher glm-4.5-air --model llama-3.1-8b-it
"""

from dataclasses import dataclass, replace
from pathlib import Path

from character import cli, constitution, rows, steps
from character.distillation import teacher
from character.engine import Engine
from character.models import Model, resolve, safe_name
from character.rows import Row, Rows


@dataclass
class Args(steps.GenerateArgs):
    """Arguments of the student step."""

    model: str = cli.flag("pocket", "the student: short name, repo id, folder, or the name an endpoint serves")
    teacher: str = cli.flag("pocket", "the teacher whose messages are answered")
    max_tokens: int = cli.flag(1024, "new tokens per answer")


def path_of(name: str, teacher_name: str, student: str) -> Path:
    """Where the student's plain answers are. teacher_name, student: short names."""
    return teacher.path_of(name, teacher_name).with_suffix("") / f"{safe_name(student)}.jsonl"


def job(args: Args, name: str, student: Model) -> steps.Job:
    """The student's output file for one constitution: one answer per teacher row."""
    of_teacher = teacher_short(args.teacher)
    source = teacher.path_of(name, of_teacher)
    command = f"python -m character.distillation.teacher --constitution {name} --teacher {args.teacher}"
    given = rows.read(source, "id", "prompt", "response", made_by=command)
    inputs = [{"teacher_row": row["id"], "prompt": row["prompt"]} for row in given][: args.limit]
    sampling = steps.sampling_of(args, args.max_tokens)
    settings = steps.settings_of(args, student, sampling) | {"teacher": of_teacher}

    async def work(engine: Engine, row: Row) -> Row:
        reply = await engine.reply(
            [{"role": "user", "content": row["prompt"]}], replace(sampling, seed=int(row["id"], 16))
        )
        return reply.row()

    output = Rows(path_of(name, of_teacher, student.short), inputs, settings, args.overwrite)
    return steps.Job(output, work, lambda row: len(row["prompt"]), args.max_tokens)


def teacher_short(spec: str) -> str:
    """The teacher's name in paths, also for one that only an endpoint knows."""
    return resolve(spec, served=True).short


def main(args: Args) -> None:
    """Write one file per constitution, all through one engine."""
    student = steps.model_of(args, args.model)
    jobs = [job(args, name, student) for name in names_with_teacher(args)]
    steps.generate(jobs, args, student)


def names_with_teacher(args: Args) -> list[str]:
    """The constitutions asked for; with 'all', those whose teacher file is there."""
    names = constitution.selected(args.constitution)
    if args.constitution == "all":
        names = [name for name in names if teacher.path_of(name, teacher_short(args.teacher)).exists()] or names
    return names


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
