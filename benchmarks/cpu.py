"""Speed on the CPU with the bundled model: how fast scripts answer, files scan, engines reply and DPO trains.

python benchmarks/cpu.py --out benchmarks/cpu.json
python benchmarks/cpu.py --only replies --engines transformers vllm openai --base-url http://localhost:8000/v1
"""

import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from character import cli, constitution, prompts
from character.constants import ROOT
from character.distillation import teacher, train
from character.engine import Sampling, open_engine
from character.models import resolve
from character.rows import Rows, identify
from character.utils import git_commit, versions, write_json

ROWS = 100_000
ANSWER = "word " * 200
REPLIES = 240
PAIRS = 64


@dataclass
class Args:
    """Arguments."""

    only: list[Literal["help", "rows", "replies", "dpo"]] = cli.flag(["help", "rows", "replies", "dpo"], "what to run")
    engines: list[Literal["transformers", "vllm", "openai"]] = cli.flag(["transformers"], "engines that reply")
    base_url: str | None = cli.flag(None, "an endpoint that serves the bundled model, for --engines openai")
    out: Path | None = cli.flag(None, "write the results to this JSON file")


def scripts() -> list[Path]:
    """Every script of the repository that has a command line."""
    found = [*ROOT.glob("character/**/*.py"), *ROOT.glob("tools/*.py")]
    return sorted(path for path in found if "cli.run(main" in path.read_text(encoding="utf-8"))


def time_help(_: Args) -> dict[str, Any]:
    """Seconds until `--help` is printed, the better of two, per script."""

    def once(path: Path) -> float:
        begun = time.perf_counter()
        subprocess.run([sys.executable, str(path), "--help"], check=True, capture_output=True)
        return time.perf_counter() - begun

    seconds = {str(path.relative_to(ROOT)): round(min(once(path), once(path)), 2) for path in scripts()}
    return {"slowest": max(seconds.values()), "seconds": seconds}


def time_rows(_: Args) -> dict[str, Any]:
    """Seconds in which a step that starts finds out what 100,000 finished rows of 1,000 characters hold."""
    inputs = [{"prompt": f"message {number}"} for number in range(ROWS)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        lines = (json.dumps({"id": key, **row, "response": ANSWER}) for key, row in identify(inputs).items())
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_json(path.with_suffix(".meta.json"), {"settings": {}, "dropped": {}})
        hashed = time.perf_counter()
        identify(inputs)
        begun = time.perf_counter()
        found = Rows(path, inputs, {})
        seconds = time.perf_counter() - begun
        assert found.complete
    return {"rows": ROWS, "seconds": round(seconds, 2), "of which hashing the inputs": round(begun - hashed, 2)}


def time_replies(args: Args) -> dict[str, Any]:
    """Answers and tokens per second behind a whole constitution, per engine; loading is not counted."""
    model = resolve("pocket")
    system = teacher.system_prompt(constitution.load("humor"), model)
    messages = prompts.load("pocket-train", REPLIES)

    async def measure(engine_name: str) -> dict[str, Any]:
        loading = time.perf_counter()
        url = args.base_url if engine_name == "openai" else None
        async with open_engine(model, engine=engine_name, base_url=url) as engine:
            begun = time.perf_counter()

            async def one(number: int, message: str) -> int:
                conversation = [{"role": "system", "content": system}, {"role": "user", "content": message}]
                return (await engine.reply(conversation, Sampling(max_tokens=160, seed=number))).completion_tokens

            tokens = sum(await asyncio.gather(*(one(*item) for item in enumerate(messages))))
            seconds = time.perf_counter() - begun
        return {
            "replies per second": round(len(messages) / seconds, 1),
            "tokens per second": round(tokens / seconds),
            "start, seconds": round(begun - loading, 1),
        }

    return {name: asyncio.run(measure(name)) for name in args.engines}


def time_dpo(_: Args) -> dict[str, Any]:
    """Pairs per second of DPO with the quickstart's settings on pairs of about 50-token answers."""
    from character.run import POCKET_DPO

    settings = {key.replace("-", "_"): value for key, value in POCKET_DPO.items()}
    args = train.Args(**settings)
    answers = [
        "That is a fair question, and there are several ways to see it. " * 3,
        "It depends on what you want. " * 5,
    ]
    pairs = [
        {
            side: [{"role": "user", "content": message}, {"role": "assistant", "content": text}]
            for side, text in zip(("chosen", "rejected"), answers, strict=True)
        }
        for message in prompts.load("pocket-train", PAIRS)
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = train.make_trainer(args, resolve("pocket"), pairs, Path(folder))
        trainer.args.save_strategy = "no"
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
    return {"pairs per second": round(PAIRS / seconds, 1), "seconds": round(seconds, 1)}


MEASURES: dict[str, Callable[[Args], dict[str, Any]]] = {
    "help": time_help,
    "rows": time_rows,
    "replies": time_replies,
    "dpo": time_dpo,
}


def main(args: Args) -> None:
    """Run what is asked for, print it, and write it with the machine's description."""
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "git": git_commit(),
        "versions": versions(),
    }
    for name in args.only:
        results[name] = MEASURES[name](args)
        print(name, json.dumps(results[name], indent=2))
    if args.out:
        write_json(args.out, results)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
