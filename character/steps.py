"""What the generating steps share: a dry run, what is complete is skipped, and one engine for all output files."""

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from character import cli, rows
from character.engine import Engine, Message, Sampling, choose, has_gpu, open_engine
from character.models import Model, fingerprint, resolve
from character.rows import Row, Rows
from character.utils import UserError

# A rough rule for a dry run, which loads no tokenizer: characters of English per token.
CHARACTERS_PER_TOKEN = 4
# How long replies are in the mean, as a share of the most tokens that they may have.
MEAN_REPLY = 0.4
# Rows in flight, however little memory there is: a GPU that writes fewer replies at once is hardly faster at each.
FEWEST_ROWS = 16


@dataclass
class GenerateArgs(cli.EngineArgs, cli.StepArgs):
    """Flags of a step that generates text."""

    concurrency: int | None = cli.flag(
        None, "requests at once to an endpoint (default: 256); about 1,000 per GPU of one that you serve yourself"
    )
    tokens_per_second: float | None = cli.flag(None, "of your machine; --dry-run then tells the time")


@dataclass
class Job:
    """One output file and how to finish a row of it.

    work: (engine, row) → the fields to add. prompt: row → the characters of its prompts, for a dry run.
    max_tokens: new tokens of a reply. replies: of a row.
    """

    rows: Rows
    work: Callable[[Engine, Row], Awaitable[Row]]
    prompt: Callable[[Row], int]
    max_tokens: int
    replies: int = 1


@dataclass
class Kept:
    """The engine that is open now, if any: what it was opened with, and the event loop that it lives in."""

    loop: asyncio.Runner
    engine: Engine | None = None
    opened_with: tuple[Model, dict[str, Any]] | None = None
    adapters: Sequence[Path] = ()

    async def open(self, model: Model, adapters: Sequence[Path], options: dict[str, Any]) -> Engine:
        """The engine for a model, adapters and further options of `open_engine`: the open one if it serves them.

        Else that one is closed first. Raises UserError as entering an engine does.
        """
        fits = self.opened_with == (model, options) and set(adapters) <= set(self.adapters)
        if self.engine is None or not fits:
            await self.close()
            self.engine = await open_engine(model, adapters=adapters, **options).__aenter__()
            self.opened_with, self.adapters = (model, options), adapters
        return self.engine

    async def close(self) -> None:
        """Give back what the open engine holds."""
        if self.engine is not None:
            engine, self.engine = self.engine, None
            await engine.close()


_kept: ContextVar[Kept | None] = ContextVar("_kept", default=None)


@contextlib.contextmanager
def keeping_engine() -> Iterator[Kept]:
    """Within the block `generate` leaves its engine open for the next call that it serves.

    A block inside another one changes nothing.
    """
    if outer := _kept.get():
        yield outer
        return
    with asyncio.Runner() as loop:
        kept = Kept(loop)
        token = _kept.set(kept)
        try:
            yield kept
        finally:
            _kept.reset(token)
            loop.run(kept.close())


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
        **precision_of(args),
    }


def precision_of(args: cli.EngineArgs) -> dict[str, str]:
    """vLLM's arguments for weights, and for keys and values, in 8 bits; empty where no flag asks for it.

    Raises UserError where the engine is not vLLM on a GPU.
    """
    asked: dict[str, str | None] = {"quantization": args.quantization, "kv_cache_dtype": args.kv_cache_dtype}
    found = {name: value for name, value in asked.items() if value}
    engine = choose(args.engine, args.base_url)
    if found and (engine != "vllm" or not has_gpu()):
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in found)
        here = "there is no GPU here" if engine == "vllm" else f"this is --engine {engine}"
        raise UserError(f"{flags}: for vLLM on a GPU alone, and {here}; leave it out")
    return found


def generate(
    jobs: Sequence[Job],
    args: Any,
    model: Model,
    adapters: Sequence[Path] = (),
    steered: bool = False,
    folded: bool = False,
) -> None:
    """Finish every job with one engine; with `--dry-run`, say what would be done. steered, folded: as for `open_engine`.

    Raises UserError.
    """
    todo = [job for job in jobs if not job.rows.complete]
    if args.dry_run:
        _foresee(jobs, args.tokens_per_second)
        return
    for job in jobs:
        if job.rows.complete:
            print(f"{job.rows.describe()}; complete")
    if todo:
        with keeping_engine() as kept:
            uses = {"steered": steered, "folded": folded and choose(args.engine, args.base_url) == "vllm"}
            kept.loop.run(_generate(kept, todo, args, model, adapters, uses))


def _foresee(jobs: Sequence[Job], rate: float | None) -> None:
    """Say what each file still takes, and plan its rows, each with the most tokens that it may have."""
    sums: Counter[str] = Counter()
    for job in jobs:
        if job.rows.complete:
            print(f"{job.rows.describe()}; complete")
            continue
        before = {row["id"] for row in rows.planned.get(job.rows.path, [])} if rows.planned else set()
        fields = {"most_tokens": job.max_tokens * job.replies, "replies": job.replies}
        new = ({"id": key, **row, **fields} for key, row in job.rows.inputs.items() if key not in before)
        rows.plan(job.rows.path, new)
        missing = [job.rows.inputs[key] for key in job.rows.missing if key not in before]
        prompts = sum(map(job.prompt, missing)) // CHARACTERS_PER_TOKEN
        tokens = {"prompt": prompts, "new": job.max_tokens * job.replies * len(missing)}
        sums.update(tokens)
        shown = _amount(tokens, rate) if missing else "nothing more to generate"
        print(f"{job.rows.describe()}; {shown}")
    if len(jobs) > 1:
        print(f"in all {_amount(sums, rate)}")


def _amount(tokens: Mapping[str, int], rate: float | None) -> str:
    new = tokens["new"]
    return f"about {tokens['prompt']:,} prompt tokens and at most {new:,} new ones{duration(new, rate)}"


def answer_tokens(row: Row) -> int:
    """Roughly the tokens of a row's answer; of a planned row, the most it may have."""
    most: int = row["most_tokens"] if "most_tokens" in row else len(row["response"]) // CHARACTERS_PER_TOKEN
    return most


def message_tokens(messages: Sequence[Message]) -> int:
    """Roughly the tokens of a conversation."""
    return sum(len(message["content"]) for message in messages) // CHARACTERS_PER_TOKEN


def duration(tokens: float, rate: float | None) -> str:
    """ ", at most 1.50 hours" for so many tokens at `rate` tokens per second; empty without a rate. Raises UserError."""
    if rate is None:
        return ""
    if rate <= 0:
        raise UserError("--tokens-per-second must be above 0")
    return f", at most {tokens / rate / 3600:.2f} hours"


async def _generate(
    kept: Kept, jobs: Sequence[Job], args: Any, model: Model, adapters: Sequence[Path], uses: dict[str, bool]
) -> None:
    options = {
        "engine": args.engine,
        "base_url": args.base_url,
        "api_key_variable": args.api_key_variable,
        "concurrency": args.concurrency,
        "seed": args.seed,
        "precision": precision_of(args),
        **uses,
    }
    engine = await kept.open(model, adapters, options)
    at_once = min(rows_at_once(engine, job.replies, job.max_tokens) for job in jobs)
    free = asyncio.Semaphore(at_once)
    under_way = [asyncio.Event() for _ in jobs]

    async def fill(number: int, job: Job) -> None:
        """Finish a file, once every row of the one before it is under way: rows of one file begin with the same text."""
        if number:
            await under_way[number - 1].wait()
        waiting = len(job.rows.missing)

        async def work(row: Row) -> Row:
            nonlocal waiting
            async with free:
                waiting -= 1
                if not waiting:
                    under_way[number].set()
                return await job.work(engine, row)

        try:
            await job.rows.fill(work, concurrency=at_once, info=lambda: asdict(engine.info))
        finally:
            under_way[number].set()

    results = await asyncio.gather(*itertools.starmap(fill, enumerate(jobs)), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


def rows_at_once(engine: Engine, replies: int, max_tokens: int) -> int:
    """Rows in flight: as many as keep the engine busy. replies: of a row. max_tokens: of a reply.

    A row of several replies comes back with a longer prompt each time. What was computed of it is reused only while its
    keys and values are in memory, of both speakers' views of what was said: half of all in the mean over a conversation.
    """
    if engine.room is None or replies == 1:
        return engine.concurrency
    held = MEAN_REPLY * max_tokens * replies
    return min(engine.concurrency, max(FEWEST_ROWS, int(engine.room / held)))
