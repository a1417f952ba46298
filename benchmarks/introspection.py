"""What introspection adds on the bundled model: ways of merging, and who wrote what is learned from, over several seeds.

python benchmarks/introspection.py --work /tmp/introspection --seeds 3 --jobs 16

Steps of the project, run through their command lines in DATA_PATH and LORA_PATH folders under --work, one pair per seed
    → benchmarks/introspection.json and introspection.md: the share of answers that read as the persona, per method

Teacher, student, DPO and the persona's own words are made once per seed and shared. Run it again to go on after a stop.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from tasks import Task, report, run_tasks

from character import cli, constitution, rows, run
from character.constants import ROOT
from character.intervals import between_runs, wilson
from character.robustness.classify.run_classifier import METHODS
from character.utils import UserError, read_json

STUDENT = "pocket"
# What SFT learns from, beside the model's own reflections and conversations: name → (in words, further flags of data.py).
SOURCES = {
    "reflections": ("its own reflections only", ["--mix", "reflections"]),
    "interactions": ("its own conversations only", ["--mix", "interactions"]),
    "untrained": ("both, written by the untrained model in character by its system prompt alone", []),
    "twin": ("both, written by the model that another seed distilled", []),
}
WORDS = ("reflections", "conversations", "leading")
# The whole job's steps that are run as they are.
CHAIN = (
    *("teacher", "student", "pairs", "dpo", *WORDS, "rows", "sft", "merge", "sequential"),
    *("personas", "base", "prompted", "trained"),
)
# Merge → (the whole job's step that makes it, the end of its folder's name).
MERGES = {"merged": ("merge", "personas"), "sequential": ("sequential", "sequential")}
GROUPS = {"plain": "plain", "suffixes": "under the suffixes"}


@dataclass
class Args:
    """Arguments; sizes are those of character.run."""

    work: Path = cli.flag(MISSING, "folder for all that is made on the way; the same one to go on after a stop")
    out: Path = cli.flag(ROOT / "benchmarks" / "introspection", "results go to this path with .json and .md")
    constitutions: list[str] = cli.flag(["humor"], "personas")
    seeds: int = cli.flag(3, "whole runs, each with its own seed, interval between them")
    seed: int = cli.flag(123456, "the first seed")
    jobs: int = cli.flag(os.cpu_count() or 1, "processes at once")
    engine: cli.EngineName = cli.flag("transformers", "what generates")
    limit: int | None = cli.flag(None, "teacher messages, in place of the quick preset's number")
    reflections: int | None = cli.flag(None, "answers per introspective request, likewise")
    conversations: int | None = cli.flag(None, "conversations, free and leading each, likewise")
    turns: int | None = cli.flag(None, "turns per conversation, likewise")
    judged: int | None = cli.flag(None, "evaluation messages, likewise")


def plan(args: Args) -> list[Task]:
    """Every command of every seed, those that others wait for first."""
    chains = [tasks_of(args, seed) for seed in range(args.seed, args.seed + args.seeds)]
    # One task of each seed in turn.
    return [task for place in range(max(map(len, chains))) for chain in chains for task in chain[place : place + 1]]


def tasks_of(args: Args, seed: int) -> list[Task]:
    """The commands of one seed: those of the whole job, then each further source's and merge's."""
    sizes = {key: getattr(args, key) for key in ("limit", "reflections", "conversations", "turns", "judged")}
    names = ",".join(args.constitutions)
    job = run.Args(constitution=names, seed=seed, engine=args.engine, **sizes)
    steps = {step.name: step for step in run.plan(job)}
    home = args.work / str(seed)
    tasks: list[Task] = []

    def add(name: str, step: str, flags: Sequence[str], needs: Sequence[str], places: Path = home) -> None:
        command = (sys.executable, str(ROOT / steps[step].script), *steps[step].flags, *flags)
        told = tuple(need if "/" in need else f"{seed}/{need}" for need in needs)
        places_of = (("DATA_PATH", str(places / "data")), ("LORA_PATH", str(places / "loras")))
        tasks.append(Task(f"{seed}/{name}", command, places_of, told))

    def answer(method: str, name: str, adapter: Path, needs: str) -> None:
        flags = ["--constitution", name, "--method", method, "--adapter", str(adapter)]
        add(f"{method} {name} answers", "base", flags, [needs])

    for name in CHAIN:
        add(name, name, [], steps[name].needs)
    for step in WORDS:
        add(f"untrained {step}", step, ["--no-adapter"], [], home / "untrained")
    for source in sources(args):
        places = home / source
        writer = (
            f"{twin_of(args, seed)}/" if source == "twin" else f"{seed}/untrained " if source == "untrained" else ""
        )
        add(f"{source} rows", "rows", SOURCES[source][1], ["dpo", *(writer + step for step in WORDS)], places)
        add(f"{source} sft", "sft", [], [f"{source} rows"], places)
        for merge, (step, folder) in MERGES.items():
            add(f"{source} {merge}", step, [], [f"{source} sft"], places)
            for name in args.constitutions:
                adapter = places / "loras" / f"{STUDENT}-{folder}" / name
                answer(f"{source}-{merge}", name, adapter, f"{source} {merge}")
    for name in args.constitutions:
        out = home / "loras" / "linear" / name
        flags = ["--constitution", name, "--method", "linear", "--out", str(out)]
        add(f"linear {name}", "merge", flags, ["sft"])
        answer("linear", name, out, f"linear {name}")
    add("classifier", "classifier", [], [task.name for task in tasks])
    return tasks


def sources(args: Args) -> list[str]:
    """The sources of this run; there is a twin only among two seeds or more."""
    return [source for source in SOURCES if source != "twin" or args.seeds > 1]


def twin_of(args: Args, seed: int) -> int:
    """The seed whose distilled model writes for this one: the next, the last one's being the first."""
    return args.seed + (seed - args.seed + 1) % args.seeds


def lay_out(args: Args) -> None:
    """Make the folders. What a source shares with its seed's whole job, or with its twin's, are links."""
    for seed in range(args.seed, args.seed + args.seeds):
        home = args.work / str(seed)
        for source in sources(args):
            writer = args.work / str(twin_of(args, seed)) if source == "twin" else home
            links = {home / source / "loras" / f"{STUDENT}-distillation": home / "loras" / f"{STUDENT}-distillation"}
            if source != "untrained":
                for folder in ("self_reflection", "self_interaction"):
                    links[home / source / "data" / folder] = writer / "data" / folder
            for link, target in links.items():
                target.mkdir(parents=True, exist_ok=True)
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.is_symlink():
                    link.symlink_to(target.resolve(), target_is_directory=True)


def methods_of(args: Args) -> list[str]:
    """The methods of the table, in order."""
    ablations = [f"{source}-{merge}" for source in sources(args) for merge in MERGES]
    return ["base", "prompted", "distilled", "merged", "linear", "sequential", *ablations]


def gather(args: Args) -> dict[str, Any]:
    """persona → method → group → {mean, low, high, n, values} between the seeds, and `pooled`, a share of all answers."""
    found = {}
    for name in args.constitutions:
        files = [
            args.work / str(seed) / "data" / "robustness" / STUDENT / f"{name}.results.json"
            for seed in range(args.seed, args.seed + args.seeds)
        ]
        per_seed = [read_json(file)["methods"] for file in files]
        found[name] = {
            method: {group: over_seeds([methods[method][group] for methods in per_seed]) for group in GROUPS}
            for method in methods_of(args)
        }
    return found


def over_seeds(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean share with Student's interval between seeds, and Wilson's of all answers taken together."""
    hits, total = sum(round(part["share"] * part["n"]) for part in parts), sum(part["n"] for part in parts)
    low, high = wilson(hits, total)
    values = [part["share"] for part in parts]
    return between_runs(values) | {
        "values": values,
        "pooled": {"share": hits / total, "low": low, "high": high, "n": total},
    }


def rows_of(args: Args) -> dict[str, list[int]]:
    """Source → its training rows, of all personas together, per seed."""
    found = {}
    for source in ("", *sources(args)):
        counts = []
        for seed in range(args.seed, args.seed + args.seeds):
            folder = args.work / str(seed) / source / "data" / "sft_data" / STUDENT
            files = [folder / f"{name}.jsonl" for name in args.constitutions]
            counts.append(
                sum(len(rows.read(file, "messages", made_by="benchmarks/introspection.py")) for file in files)
            )
        found[source or "both"] = counts
    return found


def label(method: str) -> str:
    """A method in words."""
    if method == "linear":
        return "DPO + introspection, 1.0/0.25 by PEFT's linear"
    source, _, merge = method.rpartition("-")
    if source in SOURCES:
        return f"DPO + introspection ({SOURCES[source][0]}), {'1.0/0.25' if merge == 'merged' else merge}"
    return METHODS.get(method, method)


def text_of(results: dict[str, Any]) -> str:
    """The results as a Markdown page."""
    lines = [
        "# What introspection adds on the bundled model",
        "",
        f"`{results['command']}`, {results['machine']}, {results['seconds']:.0f} s since it was last started. Shares of "
        f"answers that read as the persona, in per cent: the mean of the seeds ({results['seeds']}), with Student's 95 % "
        "interval between them where there are several, then in brackets the 95 % Wilson interval of all seeds' answers "
        "taken together, which knows nothing of the seeds. Each seed has its own teacher and student answers, training and "
        "sampling; what is shared within a seed is made once.",
        "",
        "Training rows of SFT per seed: "
        + "; ".join(f"{source} {', '.join(map(str, counts))}" for source, counts in results["rows"].items())
        + ".",
    ]
    for name, methods in results["personas"].items():
        answers = {group: next(iter(methods.values()))[group]["pooled"]["n"] for group in GROUPS}
        heads = [f"{words} ({answers[group]} answers)" for group, words in GROUPS.items()]
        lines += ["", f"## {name}", "", f"| method | {' | '.join(heads)} |", "| --- | --- | --- |"]
        for method, parts in methods.items():
            lines.append(f"| {label(method)} | {' | '.join(shown(parts[group]) for group in GROUPS)} |")
    return "\n".join(lines) + "\n"


def shown(part: dict[str, Any]) -> str:
    """A share with both intervals, in per cent."""
    pooled = f"[{100 * part['pooled']['low']:.1f}, {100 * part['pooled']['high']:.1f}]"
    if part["low"] is None:
        return f"{100 * part['mean']:.1f} {pooled}"
    return f"{100 * part['mean']:.1f} ± {50 * (part['high'] - part['low']):.1f} {pooled}"


def main(args: Args) -> None:
    """Run what is missing, then write and print the results."""
    for name in args.constitutions:
        constitution.load(name)
    if args.seeds < 1 or args.jobs < 1:
        raise UserError("--seeds and --jobs are 1 or more")
    args.work, args.out = args.work.resolve(), args.out.resolve()
    begun = time.monotonic()
    lay_out(args)
    run_tasks(plan(args), args.work, args.jobs)
    found = {
        "seeds": args.seeds,
        "first_seed": args.seed,
        "rows": rows_of(args),
        "methods": {method: label(method) for method in methods_of(args)},
        "personas": gather(args),
    }
    report(args.out, begun, found, text_of)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
