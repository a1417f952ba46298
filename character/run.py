"""The whole job for one persona: data → DPO → introspection → SFT → merge → evaluation.

python -m character.run --constitution humor
python -m character.run --constitution humor --model llama-3.1-8b-it --teacher glm-4.5-air --preset paper

Each step is a process of its own, or follows another in its process that has the engine it needs open; complete ones
are skipped. It stops at the first failure; run it again to go on.
With no model named it takes the bundled one, on the CPU.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from character import cli, constitution, rows, seeds
from character.coherence.win_rates import STAND_IN
from character.constants import DATA_PATH, FIGURE_PATH, LORA_PATH, ROOT
from character.distillation import teacher, train
from character.engine import has_gpu
from character.models import resolve
from character.robustness.classify import run_classifier
from character.robustness.generate import variants
from character.steps import keeping_engine
from character.utils import UserError

# Sizes; None is the step's own default. paper is the method's; quick is for a look at the bundled model's.
SIZES: dict[str, dict[str, int | None]] = {
    "quick": {
        "messages": 240,
        "samples": 1,
        "reflections": 6,
        "conversations": 24,
        "turns": 4,
        "judged": 40,
        "validation": 20,
        "prefilled": 40,
        "comparisons": 220,
        "per_class": 40,
        "max_tokens": 160,
    },
    "paper": {
        "messages": None,
        "samples": 5,
        "reflections": 1000,
        "conversations": 1000,
        "turns": 10,
        "judged": 500,
        "validation": None,
        "prefilled": 500,
        "comparisons": 25_000,
        "per_class": 500,
        "max_tokens": None,
    },
}
# A model of a few million parameters learns from few rows only with large steps.
POCKET_DPO = {"rank": 32, "alpha": 64, "learning-rate": 1e-3, "batch-size": 8, "micro-batch-size": 8}
POCKET_SFT = POCKET_DPO | {"learning-rate": 5e-4}
SAMPLES_SHOWN = 3
PRELOADED = [
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "peft",
    "matplotlib.figure",
]


@dataclass
class Args:
    """Arguments of the whole job."""

    constitution: str = cli.flag("humor", "names or files of constitutions, with commas between, or 'all'")
    model: str = cli.flag("pocket", "the student: short name, repo id or folder")
    teacher: str | None = cli.flag(None, "the teacher (default: the student itself, with the constitution)")
    name: str | None = cli.flag(None, "the student's family name, where it cannot be read off the model's id")
    engine: cli.EngineName = cli.flag("auto", "auto: vllm where a GPU and vLLM are present, else transformers")
    quantization: Literal["fp8"] | None = cli.flag(None, "weights in 8 bits where text is generated; vllm on a GPU")
    kv_cache_dtype: Literal["fp8"] | None = cli.flag(None, "keys and values in 8 bits, likewise")
    base_url: str | None = cli.flag(None, "an OpenAI-compatible endpoint for the teacher")
    api_key_variable: str = cli.flag("OPENAI_API_KEY", "the environment variable (or .env entry) with its key")
    concurrency: int | None = cli.flag(None, "requests at once to an endpoint (default: 256)")
    preset: Literal["quick", "paper"] = cli.flag("quick", "sizes: quick (minutes on the bundled model) or paper")
    limit: int | None = cli.flag(None, "teacher messages, in place of the preset's number")
    samples: int | None = cli.flag(None, "teacher answers per message, likewise")
    reflections: int | None = cli.flag(None, "answers per introspective request, likewise")
    conversations: int | None = cli.flag(None, "conversations, free and leading each, likewise")
    turns: int | None = cli.flag(None, "turns per conversation, likewise")
    judged: int | None = cli.flag(None, "evaluation messages, likewise")
    comparisons: int | None = cli.flag(None, "pairs of traits on offer, likewise")
    judge: str | None = cli.flag(
        None,
        "who judges coherence and preferences (without one: a stand-in for coherence; preferences for pocket only)",
    )
    judge_url: str | None = cli.flag(None, "an OpenAI-compatible endpoint for the judge")
    judge_key_variable: str = cli.flag("OPENAI_API_KEY", "the environment variable (or .env entry) with its key")
    only: list[str] = cli.flag([], "the steps to run, by name (default: all; --dry-run lists them)")
    skip: list[str] = cli.flag([], "steps to leave out, by name")
    seeds: int = cli.flag(1, "whole runs with seeds of their own: --seed, the one after it, and on")
    jobs: int | None = cli.flag(
        None, "steps at once (default: as many as cores for the bundled model on a CPU, else 1)"
    )
    introspection: bool = cli.flag(True, "reflections, conversations, SFT and the merged adapter")
    seed: int = cli.flag(123456, "seed of data, shuffles and sampling")
    overwrite: bool = cli.flag(False, "start every step anew")
    dry_run: bool = cli.flag(False, "print the steps with what each would do; load no model")
    generated_per_second: float | None = cli.flag(None, "tokens your machine writes; --dry-run then tells the time")
    trained_per_second: float | None = cli.flag(None, "tokens your machine trains on, likewise")


@dataclass
class Step:
    """A step: its name, its module under `character`, its flags, and the names of the steps whose files it reads.

    speaker: the local model that it generates with; steps of one speaker can share an engine. None for a step that loads
    no engine, or needs the memory for more than one.
    """

    name: str
    module: str
    flags: list[str]
    needs: tuple[str, ...] = ()
    speaker: str | None = None

    @property
    def script(self) -> str:
        """The script's path in the repository."""
        return (
            "tools/merge_loras.py" if self.module == "merge_loras" else f"character/{self.module.replace('.', '/')}.py"
        )

    def run(self) -> None:
        """Do the step in this process, as its command line would."""
        sys.argv = [self.script, *self.flags]
        runpy.run_path(str(ROOT / self.script), run_name="__main__")


@dataclass
class Running:
    """Steps at work. output: the file that gets what they print; None where they print to the terminal."""

    steps: list[Step]
    process: Any
    output: Path | None


def plan(args: Args) -> list[Step]:
    """The steps in order."""
    size = SIZES[args.preset] | {"messages": args.limit or SIZES[args.preset]["messages"]}
    for name in ("samples", "reflections", "conversations", "turns", "judged", "comparisons"):
        size[name] = getattr(args, name) or size[name]
    size["prefilled"] = args.judged or size["prefilled"]
    # No class of the classifier may be much smaller than the others.
    per_class = min(size["per_class"] or 0, size["messages"] or sys.maxsize)
    guide = args.teacher or args.model
    pocket = resolve(args.model).short == "pocket"
    one = _flags(constitution=args.constitution)
    student = _flags(model=args.model, name=args.name)
    pair = [*student, *_flags(teacher=guide)]
    dry = _flags(dry_run=args.dry_run)
    common = [*_flags(seed=args.seed, overwrite=args.overwrite), *dry]
    local = _flags(
        engine=None if args.engine == "auto" else args.engine,
        quantization=args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
    )
    remote = (
        _flags(base_url=args.base_url, api_key_variable=args.api_key_variable, concurrency=args.concurrency)
        if args.base_url
        else local
    )
    tokens = _flags(max_tokens=size["max_tokens"])
    of_teacher = [*_flags(teacher=guide, samples=size["samples"]), *tokens, *remote]
    by_student = [*student, *tokens, *local, *common, *_flags(tokens_per_second=args.generated_per_second)]
    by_trainer = [*student, *common, *_flags(tokens_per_second=args.trained_per_second)]
    judged = _flags(limit=size["judged"])
    # An endpoint is no engine to open.
    of_guide, of_judge = None if args.base_url else guide, None if args.judge_url else args.judge

    dpo = _flags(**POCKET_DPO) if pocket else []
    steps = [
        Step(
            "teacher",
            "distillation.teacher",
            [*one, *_flags(limit=size["messages"]), *of_teacher, *common],
            (),
            of_guide,
        ),
        Step("student", "distillation.student", [*one, *_flags(teacher=guide), *by_student], ("teacher",), args.model),
        Step("pairs", "distillation.data", [*one, *pair, *_flags(seed=args.seed), *dry], ("student",)),
        Step("dpo", "distillation.train", [*one, *dpo, *by_trainer], ("pairs",)),
    ]
    methods = ["distilled"]
    trained = "dpo"
    if args.introspection:
        methods += ["merged", "sequential"]
        trained = "sequential"
        sft = _flags(**POCKET_SFT) if pocket else []
        talk = _flags(samples=size["conversations"], turns=size["turns"])
        merge = ["merge", *one, *_flags(model=args.model, overwrite=True), *dry]
        told = ("reflections", "conversations", "leading")
        steps += [
            Step(
                "reflections",
                "introspection.self_reflection",
                [*one, *_flags(samples=size["reflections"]), *by_student],
                ("dpo",),
                args.model,
            ),
            Step("conversations", "introspection.self_interaction", [*one, *talk, *by_student], ("dpo",), args.model),
            Step(
                "leading",
                "introspection.self_interaction",
                ["--leading", *one, *talk, *by_student],
                ("dpo",),
                args.model,
            ),
            Step("rows", "introspection.data", [*one, *student, *_flags(seed=args.seed), *dry], told),
            Step("sft", "introspection.train", [*one, *sft, *by_trainer], ("rows",)),
            Step("merge", "merge_loras", merge, ("sft",)),
            Step("sequential", "merge_loras", [*merge, "--sequential"], ("merge",)),
        ]
    # The other personas' answers, by which the classifier tells this one from them.
    everyone = _flags(constitution="all", limit=per_class, seed=args.seed)
    answers = [*one, *judged, *by_student]
    kept_going = _flags(limit=size["prefilled"])
    offers = _flags(comparisons=size["comparisons"])
    conditions = _flags(condition="feel") if args.preset == "quick" else []
    # What reads the answers: a classifier that the teacher's answers train, or a judge.
    by_teacher = _flags(teacher=guide, per_class=per_class)
    reader = [*one, *by_teacher, *_flags(model=args.model, seed=args.seed), *dry]
    # A judge of another model is large, so nobody gets one unasked.
    judge_at = _flags(base_url=args.judge_url, api_key_variable=args.judge_key_variable, concurrency=args.concurrency)
    by_judge = [*_flags(judge=args.judge or STAND_IN), *(judge_at if args.judge_url else local if args.judge else [])]
    known = ("student", "personas")
    answered = ("base", "prompted", "steered", "trained")
    steps += [
        Step("personas", "distillation.teacher", [*everyone, *of_teacher, *dry], ("teacher",), of_guide),
        Step("base", "robustness.generate.trained", ["--method", "base", *answers], (), args.model),
        Step("prompted", "robustness.generate.prompted", answers, (), args.model),
        Step(
            "steered",
            "robustness.generate.steered",
            [*answers, *by_teacher, *_flags(validation=size["validation"])],
            known,
        ),
        Step("trained", "robustness.generate.trained", ["--method", *methods, *answers], (trained,), args.model),
        Step(
            "prefill",
            "robustness.prefill.multi_turn",
            ["--method", "base", "prompted", "steered", *methods, *one, *kept_going, *by_student],
            ("steered", trained),
        ),
        Step("classifier", "robustness.classify.run_classifier", reader, (*known, *answered)),
        Step("prefill-results", "robustness.prefill.multi_turn_results", reader, (*known, "prefill")),
        Step(
            "coherence",
            "coherence.coherence",
            [*reader, *_flags(method=shown_method(args)), *by_judge],
            (*known, *answered),
            of_judge,
        ),
    ]
    if pocket or args.judge:
        asked = ["--method", "base", shown_method(args), *conditions, *one, *offers, *by_student]
        steps += [
            Step("preferences", "preferences.preferences", asked, (trained,), args.model),
            Step("judgements", "preferences.judgements", [*reader, *by_judge], (*known, "preferences"), of_judge),
        ]
    of_report = [*one, *_flags(model=args.model, teacher=guide), *dry]
    steps.append(Step("report", "report", of_report, tuple(step.name for step in steps)))
    return _selected(steps, args)


def _selected(steps: list[Step], args: Args) -> list[Step]:
    """The steps that --only and --skip leave. Raises UserError for a name that is none's."""
    names = [step.name for step in steps]
    for name in (*args.only, *args.skip):
        if name not in names:
            raise UserError(f"no step '{name}'; the steps are: {', '.join(names)}")
    return [step for step in steps if (step.name in args.only or not args.only) and step.name not in args.skip]


def _flags(**values: object) -> list[str]:
    """Flags of a command line; None and False are left out, True stands alone."""
    found: list[str] = []
    for name, value in values.items():
        if value is not None and value is not False:
            found.append("--" + name.replace("_", "-"))
            if value is not True:
                found.append(str(value))
    return found


def numbered(steps: list[Step], first: int, of: int) -> list[tuple[str, Step]]:
    """Each step behind the line that announces it; they are numbered from `first` on."""
    return [
        (f"\n[{number}/{of}] {step.name}: python {step.script} {' '.join(step.flags)}", step)
        for number, step in enumerate(steps, first)
    ]


def foresee(steps: list[Step]) -> None:
    """Dry-run the steps, here, where each knows what those before it would write; exit with the last failed one's code."""
    rows.planned = {}
    code: str | int | None = 0
    for title, step in numbered(steps, 1, len(steps)):
        print(title, flush=True)
        try:
            step.run()
        except SystemExit as stop:
            code = stop.code
    sys.exit(code)


def ready(waiting: list[Step], running: list[Step]) -> list[Step]:
    """The waiting steps that need no file of one that waits or runs."""
    unfinished = {step.name for step in (*waiting, *running)}
    return [step for step in waiting if not unfinished.intersection(step.needs)]


def next_together(waiting: list[Step]) -> list[Step]:
    """The first ready step, and those of the same speaker that are ready then, in order."""
    group = ready(waiting, [])[:1]
    for step in waiting:
        others = [one for one in waiting if one not in group]
        if step.speaker and step.speaker == group[0].speaker and step in ready(others, []):
            group.append(step)
    return group


def run_together(steps: list[tuple[str, Step]], output: str | None) -> None:
    """Do the steps in this process, one engine for several. output: what they print goes there, and no titles."""
    parent = multiprocessing.parent_process()
    if parent and not parent.is_alive():
        # The job ended while this process was on its way.
        return
    try:
        _run_each(steps, output)
    except KeyboardInterrupt:
        # Between two steps.
        sys.exit(cli.say_interrupted())


def _run_each(steps: list[tuple[str, Step]], output: str | None) -> None:
    with keeping_engine() if len(steps) > 1 else contextlib.nullcontext():
        for title, step in steps:
            begun = time.time()
            if output:
                with open(output, "ab") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
            else:
                print(title, flush=True)
            step.run()
            print(f"    {time.time() - begun:.1f} s", flush=True)


# Processes that this one started.
started: list[Any] = []


def _terminated(number: int, frame: Any) -> None:
    """A handler of SIGTERM: end, and what was started too, which a terminal's Ctrl-C reaches by itself."""
    signal.signal(number, signal.SIG_IGN)
    for process in started:
        process.terminate()
    cli.interrupt(number, frame)


def run_steps(steps: list[Step], jobs: int) -> None:
    """Run the steps, up to `jobs` processes at once, as soon as those they need are done.

    Where one process runs at a time, it does all that the engine of its first step can serve. Where several run at
    once, each does one step, and what it prints is shown when it ends. The first failure ends the job with that step's
    code, its own message being the last line.
    """
    processes = _processes(jobs)
    waiting = list(steps)
    running: list[Running] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                at_work = [step for one in running for step in one.steps]
                groups = [[step] for step in ready(waiting, at_work)] if jobs > 1 else [next_together(waiting)]
                for group in groups[: jobs - len(running)]:
                    titled = numbered(group, len(steps) - len(waiting) + 1, len(steps))
                    waiting = [step for step in waiting if step not in group]
                    output = Path(folder) / group[0].name if jobs > 1 else None
                    if output:
                        # Processes that start together would print in any order.
                        print(titled[0][0], flush=True)
                    process = processes.Process(target=run_together, args=(titled, output and str(output)))
                    process.start()
                    started.append(process)
                    running.append(Running(group, process, output))
                multiprocessing.connection.wait([one.process.sentinel for one in running])
                for one in [one for one in running if not one.process.is_alive()]:
                    running.remove(one)
                    _finished(one)
        except KeyboardInterrupt:
            # The steps end too, and keep what is finished.
            for one in running:
                one.process.join()
            if jobs > 1 or not any(one.process.exitcode == 130 for one in running):
                raise
            # The step said so itself.
            sys.exit(130)
        finally:
            for one in running:
                one.process.terminate()
                one.process.join()


def _finished(one: Running) -> None:
    """Show what was printed to a file; exit with the code of a step that failed."""
    one.process.join()
    code = one.process.exitcode
    said = one.output.read_text(encoding="utf-8", errors="replace") if one.output and one.output.exists() else ""
    if code:
        print(said, end="", file=sys.stderr, flush=True)
        sys.exit(code if code > 0 else 128 - code)
    if one.output:
        print(f"\n{one.steps[0].name} is done:\n{said}", end="", flush=True)


def _processes(jobs: int) -> Any:
    """How steps are started: on a CPU from a process that has the heavy imports, which take seconds, behind it.

    On a GPU each starts afresh, since an import may touch the driver, which a fork does not survive.
    """
    if has_gpu():
        return multiprocessing.get_context("spawn")
    # Small models spend their time in small operations, between which threads should not spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def show_samples(student: str, name: str, method: str) -> None:
    """Print messages with the base's and the trained model's answers side by side."""
    answers = [
        rows.read(variants.path_of(student, made, variants.PLAIN, of), "prompt", "response", made_by="trained.py")
        for made, of in (("base", "none"), (method, name))
    ]
    for base, trained in list(zip(*answers, strict=True))[:SAMPLES_SHOWN]:
        print(f"\nuser     {base['prompt']}\nbase     {base['response']}\ntrained  {trained['response']}")


def main(args: Args) -> None:
    """Run every step, then say what came of it and where the files are."""
    names = [traits.name for traits in constitution.load_selected(args.constitution)]
    student = resolve(args.model).short
    steps = plan(args)
    begun = time.time()
    signal.signal(signal.SIGTERM, _terminated)
    if args.dry_run:
        foresee(steps)
    run_steps(steps, args.jobs or default_jobs(student))
    if not (args.only or args.skip):
        for name in names:
            show_persona(args, student, name)
    if args.seeds > 1:
        run_further_seeds(args)
        # The first run's page shows the figures over all runs too.
        run_steps([step for step in steps if step.name == "report"], 1)
    print(f"{time.time() - begun:.0f} s in all")


def shown_method(args: Args) -> str:
    """The trained method that samples are shown of and coherence is judged for."""
    return "merged" if args.introspection else "distilled"


def default_jobs(student: str) -> int:
    """How many steps run at once: the bundled model is so small that a core each serves them best."""
    return (os.cpu_count() or 1) if student == "pocket" and not has_gpu() else 1


def show_persona(args: Args, student: str, name: str) -> None:
    """Print samples of a persona and where its files are."""
    show_samples(student, name, shown_method(args))
    guide = resolve(args.teacher or args.model, served=True).short
    adapter = LORA_PATH / f"{student}-personas" / name if args.introspection else train.path_of(name, student)
    print(f"\nadapter  {_short(adapter)}")
    print(f"answers  {_short(teacher.path_of(name, guide))}")
    print(f"results  {_short(run_classifier.results_path(student, name))}")
    print(f"chat     python tools/interactive_it.py --model {args.model} --adapter {_short(adapter)}")


def run_further_seeds(args: Args) -> None:
    """Run the whole job again for each further seed, in folders of its own, then print the figures over all runs."""
    for seed in range(args.seed + 1, args.seed + args.seeds):
        places = {
            variable: str(folder / seeds.SEEDS / str(seed))
            for variable, folder in (("DATA_PATH", DATA_PATH), ("LORA_PATH", LORA_PATH), ("FIGURE_PATH", FIGURE_PATH))
        }
        print(f"\nseed {seed}: files under {_short(places['DATA_PATH'])}", flush=True)
        command = [sys.executable, "-m", "character.run", *sys.argv[1:], "--seed", str(seed), "--seeds", "1"]
        process = subprocess.Popen(command, env=os.environ | places)
        started.append(process)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        if code:
            sys.exit(code)
    seeds.main(seeds.Args(args.model))


def _short(path: object) -> str:
    return str(path).removeprefix(f"{ROOT}/")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
