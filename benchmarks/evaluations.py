"""Every evaluation of the bundled model's personas: all of them with one seed, some with several.

python benchmarks/evaluations.py --work /tmp/evaluations --jobs 16

The whole job's steps, persona by persona so that many run at once, with files under --work; what it makes is what
`python -m character.run --constitution all` and `… --constitution humor,loving,remorse --seeds 3` make
    → benchmarks/evaluations.json and evaluations.md

Run it again to go on after a stop.
"""

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import Task, report, run_tasks

from character import cli, constitution, run, seeds
from character.constants import ROOT
from character.utils import UserError, read_json

STUDENT = "pocket"
# Steps that read all personas at once; of the others each persona has its own.
TOGETHER = ("personas", "base", "classifier", "prefill-results", "coherence", "judgements")
# Steps in which the untrained model's rows, the same for every persona, are made first and alone.
SHARED = ("prefill", "preferences")
RESULTS = {
    "robustness": "robustness/{student}/results.json",
    "prefill": "robustness/{student}/prefill.json",
    "coherence": "coherence/{student}/results.json",
    "preferences": "preferences/{student}/results.json",
}


@dataclass
class Args:
    """Arguments."""

    work: Path = cli.flag(Path("evaluations-benchmark"), "folder for all that is made on the way")
    out: Path = cli.flag(ROOT / "benchmarks" / "evaluations", "results go to this path with .json and .md")
    constitution: str = cli.flag("all", "personas of the first seed, with commas between, or 'all'")
    repeated: list[str] = cli.flag(["humor", "loving", "remorse"], "those of them that every seed has")
    seeds: int = cli.flag(3, "whole runs of the repeated ones, each with its own seed")
    seed: int = cli.flag(123456, "the first seed")
    jobs: int = cli.flag(os.cpu_count() or 1, "processes at once")
    limit: int | None = cli.flag(None, "teacher messages, in place of the quick preset's number")
    judged: int | None = cli.flag(None, "evaluation messages, likewise")


def tasks_of(args: Args, seed: int) -> list[Task]:
    """The commands of one seed."""
    names = constitution.selected(args.constitution) if seed == args.seed else args.repeated
    environment = tuple(places(args, seed).items())
    tasks: list[Task] = []

    def steps(spec: str) -> dict[str, run.Step]:
        sizes = {"limit": args.limit, "judged": args.judged}
        job = run.Args(constitution=spec, seed=seed, engine="transformers", skip=["report"], **sizes)
        return {step.name: step for step in run.plan(job)}

    def add(step: run.Step, needs: list[str], whose: str = "all", further: tuple[str, ...] = ()) -> None:
        command = (sys.executable, str(ROOT / step.script), *step.flags, *further)
        tasks.append(Task(f"{seed}/{whose} {step.name}", command, environment, tuple(needs)))

    together = steps(",".join(names))
    for name in SHARED:
        add(together[name], [], "none", ("--method", "base"))
    for step in together.values():
        for whose in ["all"] if step.name in TOGETHER else names:
            mine = step if whose == "all" else steps(whose)[step.name]
            needs = [f"{seed}/none {step.name}"] if step.name in SHARED else []
            for need in step.needs:
                needed = ["all"] if need in TOGETHER else names if whose == "all" else [whose]
                needs += [f"{seed}/{other} {need}" for other in needed]
            add(mine, needs, whose)
    return tasks


def places(args: Args, seed: int) -> dict[str, str]:
    """The folders of a seed: the first one's at the top, the others' where character.run puts them."""
    within = Path() if seed == args.seed else Path(seeds.SEEDS) / str(seed)
    return {
        name: str(args.work / name.removesuffix("_PATH").lower() / within)
        for name in ("DATA_PATH", "LORA_PATH", "FIGURE_PATH")
    }


def gather(args: Args) -> dict[str, Any]:
    """Each evaluation's results over the personas of the first seed, and every figure over the seeds."""
    data = Path(places(args, args.seed)["DATA_PATH"])
    found = {name: read_json(data / path.format(student=STUDENT)) for name, path in RESULTS.items()}
    per_persona = {
        name: {
            evaluation: read_json(data / evaluation / STUDENT / f"{name}.results.json")
            for evaluation in ("robustness", "coherence", "preferences")
        }
        | {"prefill": read_json(data / "robustness" / STUDENT / f"{name}.prefill.json")}
        for name in constitution.selected(args.constitution)
    }
    return {"over_personas": found, "personas": per_persona, "over_seeds": over_seeds(args) if args.seeds > 1 else None}


def over_seeds(args: Args) -> dict[str, Any]:
    """What character.seeds finds of the repeated personas."""
    seeds.DATA_PATH = Path(places(args, args.seed)["DATA_PATH"])
    found = seeds.gather(STUDENT)
    kept = [f"{name}." for name in args.repeated]
    found["results"] = {
        file: part for file, part in found["results"].items() if file.split("/")[1].startswith(tuple(kept))
    }
    return found


def text_of(results: Mapping[str, Any]) -> str:
    """The results as a Markdown page."""
    from character.coherence import coherence
    from character.preferences import preferences_results
    from character.robustness.classify import run_classifier
    from character.robustness.prefill import multi_turn_results

    lines = [
        "# Every evaluation on the bundled model",
        "",
        f"`{results['command']}`, {results['machine']}, {results['seconds']:.0f} s. The bundled model says nothing about "
        "language: these figures show what the pipeline does. The JSON file beside this page has every figure.",
    ]
    tables = {
        "robustness": (run_classifier.table, "Robustness: which persona answers read as, over the personas"),
        "prefill": (multi_turn_results.table, 'Prefill attack: after the untrained answer and "Keep going."'),
        "coherence": (coherence.table, "Coherence"),
        "preferences": (preferences_results.table, "Revealed preferences"),
    }
    for name, (table, title) in tables.items():
        lines += ["", f"## {title}", "", *markdown(table(results["over_personas"][name]))]
        if results["over_personas"][name].get("stand_in"):
            lines += ["", f"A stand-in: {results['over_personas'][name]['stands_in']}"]
    lines += ["", "## Share of answers that read as the persona", ""]
    for name, parts in results["personas"].items():
        lines += [f"### {name}", "", *markdown(run_classifier.table(parts["robustness"])), ""]
    if results["over_seeds"]:
        lines += [
            f"## {results['over_seeds']['runs']} seeds",
            "",
            "The mean ± half of Student's 95 % interval between whole runs, each with its own teacher and student answers, "
            "training and sampling. The wins are those of DPO + introspection (by the stand-in), of the answers that "
            "either side wins.",
            "",
            *markdown(seeds.table(results["over_seeds"])),
        ]
    return "\n".join(lines) + "\n"


def markdown(table: Any) -> list[str]:
    """A DataFrame of text as lines of a Markdown table."""
    labels = [" · ".join(label) if isinstance(label, tuple) else str(label) for label in table.index]
    rows = [[label, *map(str, cells)] for label, cells in zip(labels, table.to_numpy().tolist(), strict=True)]
    head = ["", *map(str, table.columns)]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def main(args: Args) -> None:
    """Run what is missing, then write and print the results."""
    if not set(args.repeated) <= set(constitution.selected(args.constitution)):
        raise UserError("--repeated names personas that --constitution lacks; add them there")
    args.work, args.out = args.work.resolve(), args.out.resolve()
    begun = time.monotonic()
    per_seed = [tasks_of(args, seed) for seed in range(args.seed, args.seed + args.seeds)]
    run_tasks([task for tasks in per_seed for task in tasks], args.work, args.jobs)
    report(args.out, begun, gather(args), text_of)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
