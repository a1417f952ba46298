"""What the generating steps share: a dry run, what is complete is skipped, and one engine for all output files."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from character import cli
from character.engine import Engine, Sampling, choose, open_engine
from character.models import Model, fingerprint, resolve
from character.rows import Row, Rows
from character.utils import UserError

# A rough rule for a dry run, which loads no tokenizer: characters of English per token.
CHARACTERS_PER_TOKEN = 4


@dataclass
class GenerateArgs(cli.EngineArgs, cli.StepArgs):
    """Flags of a step that generates text."""


@dataclass
class Job:
    """One output file and how to finish a row of it.

    work: (engine, row) → the fields to add. prompt: row → the characters of its prompts, for a dry run.
    max_tokens: of all new tokens of a row.
    """

    rows: Rows
    work: Callable[[Engine, Row], Awaitable[Row]]
    prompt: Callable[[Row], int]
    max_tokens: int


def model_of(args: cli.EngineArgs, spec: str) -> Model:
    """The model that `spec` means with these engine flags."""
    return resolve(spec, args.name, served=choose(args.engine, args.base_url) == "openai")


def sampling_of(args: cli.EngineArgs, max_tokens: int) -> Sampling:
    """The sampling that the flags ask for. Raises UserError where one is out of range."""
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.repetition_penalty <= 0 or max_tokens < 1:
        raise UserError(
            "a sampling flag is out of range: --temperature is 0 or more, --top-p above 0 and at most 1, "
            "--repetition-penalty above 0, --max-tokens 1 or more"
        )
    return Sampling(args.temperature, args.top_p, args.repetition_penalty, max_tokens)


def settings_of(args: Any, model: Model, sampling: Sampling) -> dict[str, Any]:
    """The settings that every generated file remembers: what made it, and how it was sampled."""
    return {
        "model": model.short,
        "weights": fingerprint(model),
        "family": model.family,
        "engine": choose(args.engine, args.base_url),
        "sampling": sampling.settings(),
        "seed": args.seed,
    }


def generate(jobs: Sequence[Job], args: Any, model: Model, adapters: Sequence[Path] = ()) -> None:
    """Finish every job with one engine; with `--dry-run`, say what would be done. Raises UserError."""
    todo = [job for job in jobs if not job.rows.complete]
    for job in jobs:
        if args.dry_run or job.rows.complete:
            print(job.rows.describe() + (f"; {_estimate(job)}" if job.rows.missing else "; complete"))
    if todo and not args.dry_run:
        asyncio.run(_generate(todo, args, model, adapters))


def _estimate(job: Job) -> str:
    rows = [job.rows.inputs[key] for key in job.rows.missing]
    prompts = sum(map(job.prompt, rows)) // CHARACTERS_PER_TOKEN
    return f"about {prompts:,} prompt tokens and at most {job.max_tokens * len(rows):,} new ones"


async def _generate(jobs: Sequence[Job], args: Any, model: Model, adapters: Sequence[Path]) -> None:
    engine = open_engine(
        model,
        engine=args.engine,
        base_url=args.base_url,
        api_key_variable=args.api_key_variable,
        seed=args.seed,
        adapters=adapters,
    )
    async with engine:
        share = max(1, engine.concurrency // len(jobs))
        results = await asyncio.gather(
            *(job.rows.fill(_bound(job, engine), concurrency=share, info=lambda: asdict(engine.info)) for job in jobs),
            return_exceptions=True,
        )
    for result in results:
        if isinstance(result, BaseException):
            raise result


def _bound(job: Job, engine: Engine) -> Callable[[Row], Awaitable[Row]]:
    async def work(row: Row) -> Row:
        return await job.work(engine, row)

    return work
