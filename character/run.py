"""The whole job for one persona: data → DPO → evaluation, each step a process of its own, complete ones skipped.

    python -m character.run --constitution humor
    python -m character.run --constitution humor --model llama-3.1-8b-it --teacher glm-4.5-air --preset paper

With no model named it takes the bundled one, on the CPU. It stops at the first failure; run it again to go on.
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

from character import cli, constitution, rows
from character.constants import ROOT
from character.distillation import teacher, train
from character.models import resolve
from character.robustness.classify import run_classifier
from character.robustness.generate import variants

# Sizes. paper: the steps' own defaults. A small model learns from few pairs only with large steps.
SIZES: dict[str, dict[str, int | None]] = {
    "quick": {"messages": 240, "samples": 1, "judged": 60, "per_class": 60, "max_tokens": 160},
    "paper": {"messages": None, "samples": 5, "judged": 500, "per_class": 500, "max_tokens": None},
}
POCKET_TRAINING = ["--rank", "32", "--alpha", "64", "--learning-rate", "1e-3", "--batch-size", "8"]
POCKET_TRAINING += ["--micro-batch-size", "8"]
SAMPLES_SHOWN = 3


@dataclass
class Args:
    """Arguments of the whole job."""

    constitution: str = cli.flag("humor", "the constitution's name or file")
    model: str = cli.flag("pocket", "the student: short name, repo id or folder")
    teacher: str | None = cli.flag(None, "the teacher (default: the student itself, with the constitution)")
    engine: cli.EngineName = cli.flag("auto", "auto: vllm where a GPU and vLLM are present, else transformers")
    base_url: str | None = cli.flag(None, "an OpenAI-compatible endpoint for the teacher")
    preset: Literal["quick", "paper"] = cli.flag("quick", "sizes: quick (minutes on the bundled model) or paper")
    limit: int | None = cli.flag(None, "teacher messages, in place of the preset's number")
    seed: int = cli.flag(123456, "seed of data, shuffles and sampling")
    overwrite: bool = cli.flag(False, "start every step anew")
    dry_run: bool = cli.flag(False, "print the steps with what each would do; load no model")


@dataclass
class Step:
    """A step: its module under `character` and its flags."""

    module: str
    flags: list[str]

    @property
    def command(self) -> list[str]:
        """What to run."""
        return [sys.executable, "-m", f"character.{self.module}", *self.flags]


def plan(args: Args) -> list[Step]:
    """The steps in order."""
    size = SIZES[args.preset]
    guide = args.teacher or args.model
    messages = args.limit or size["messages"]
    limit = ["--limit", str(messages)] if messages else []
    tokens = ["--max-tokens", str(size["max_tokens"])] if size["max_tokens"] else []
    judged = ["--limit", str(size["judged"]), *tokens]
    engine = ["--engine", args.engine] if args.engine != "auto" else []
    endpoint = ["--base-url", args.base_url] if args.base_url else engine
    per_class = ["--per-class", str(size["per_class"])]
    one = ["--constitution", args.constitution]
    everyone = ["--constitution", "all", "--limit", str(size["per_class"])]
    seed = ["--seed", str(args.seed)]
    again = ["--overwrite"] if args.overwrite else []
    dry = ["--dry-run"] if args.dry_run else []
    common = [*seed, *again, *dry]
    pair = ["--teacher", guide, "--model", args.model]
    answers = ["--samples", str(size["samples"]), *tokens]
    pocket = POCKET_TRAINING if resolve(args.model).short == "pocket" else []
    steps = [
        Step("distillation.teacher", [*one, "--teacher", guide, *limit, *answers, *endpoint, *common]),
        Step("distillation.student", [*one, *pair, *tokens, *engine, *common]),
        Step("distillation.data", [*one, *pair, *seed, *dry]),
        Step("distillation.train", [*one, "--model", args.model, *pocket, *common]),
        # The other personas' answers, by which the classifier tells this one from them.
        Step(
            "distillation.teacher",
            [*everyone, "--teacher", guide, *answers, *endpoint, *seed, *dry],
        ),
        Step("robustness.generate.prompted", [*one, "--model", args.model, *judged, *engine, *common]),
    ]
    for method in ("base", "distilled"):
        flags = [*one, "--model", args.model, "--method", method, *judged, *engine, *common]
        steps.append(Step("robustness.generate.trained", flags))
    return [*steps, Step("robustness.classify.run_classifier", [*one, *pair, *per_class])]


def run_steps(steps: list[Step], dry_run: bool) -> None:
    """Run the steps; exit with a failed one's code, its own message being the last line."""
    for number, step in enumerate(steps, 1):
        print(f"\n[{number}/{len(steps)}] {' '.join(['python', *step.command[1:]])}", flush=True)
        if dry_run and step.module.endswith("run_classifier"):
            continue
        begun = time.time()
        code = subprocess.run(step.command, check=False).returncode
        if dry_run:
            continue
        if code:
            sys.exit(code if code > 0 else 128 - code)
        print(f"    {time.time() - begun:.1f} s", flush=True)


def show_samples(student: str, name: str) -> None:
    """Print messages with the base's and the trained model's answers side by side."""
    answers = [
        rows.read(variants.path_of(student, method, variants.PLAIN, of), "prompt", "response", made_by="trained.py")
        for method, of in (("base", "none"), ("distilled", name))
    ]
    for base, trained in list(zip(*answers, strict=True))[:SAMPLES_SHOWN]:
        print(f"\nuser     {base['prompt']}\nbase     {base['response']}\ntrained  {trained['response']}")


def main(args: Args) -> None:
    """Run every step, then say what came of it and where the files are."""
    name = constitution.load(args.constitution).name
    student = resolve(args.model).short
    begun = time.time()
    run_steps(plan(args), args.dry_run)
    if args.dry_run:
        return
    show_samples(student, name)
    guide = resolve(args.teacher or args.model, served=True).short
    print(f"\nadapter  {_short(train.path_of(name, student))}")
    print(f"answers  {_short(teacher.path_of(name, guide))}")
    print(f"results  {_short(run_classifier.results_path(student, name))}")
    print(f"{time.time() - begun:.0f} s in all")


def _short(path: object) -> str:
    return str(path).removeprefix(f"{ROOT}/")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
