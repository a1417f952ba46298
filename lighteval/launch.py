"""Evaluate a model and its personas with lighteval; `lighteval/run.sh` starts it.

MODEL → DATA_PATH/lighteval/<student>/base/none/
LORA_PATH/<student>-personas/<c> → DATA_PATH/lighteval/<student>/merged/<c>/   (likewise distilled, sequential, yours)
all of them → DATA_PATH/lighteval/<student>/results.json

lighteval/run.sh llama-3.1-8b-it humor loving
lighteval/run.sh llama-3.1-8b-it humor --method theirs --adapter org/name

What is complete is skipped. It stops at the first failure; run it again to go on.
"""

import importlib.metadata
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import MISSING, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from character import cli, constitution
from character.constants import DATA_PATH, MODEL_PATH, ROOT
from character.models import Model, fingerprint, resolve, safe_name
from character.robustness.generate.trained import FOLDERS, adapter_of
from character.rows import check_settings, file_digest
from character.utils import UserError, git_commit, new_folder, read_json, versions, write_json

HERE = Path(__file__).resolve().parent
RELEASE = "0.13.0"


@dataclass
class Args:
    """Arguments."""

    model: str = cli.flag(MISSING, "the student: short name, repo id or folder", positional=True)
    constitutions: list[str] = cli.flag(
        [], "the personas, or 'all' that have an adapter; without one, the model alone", positional=True
    )
    method: list[str] = cli.flag(
        ["merged"], "distilled (DPO), merged or sequential (DPO + introspection), or a name for --adapter"
    )
    adapter: str | None = cli.flag(
        None, "a LoRA adapter: a folder, or org/name[/subfolder][@revision] on the hub (default: the method's own)"
    )
    tasks: Path = cli.flag(HERE / "tasks.txt", "file of tasks, a line each: name|shots")
    custom_tasks: Path | None = cli.flag(None, "Python file with tasks of your own, as lighteval takes them")
    limit: int | None = cli.flag(None, "only N questions of each task, the same in every run, for a trial")
    keep_folded: bool = cli.flag(False, "keep the models that adapters are folded into, under MODEL_PATH/folded")
    overwrite: bool = cli.flag(False, "start anew where results exist with other settings")
    dry_run: bool = cli.flag(False, "print the commands; load no model")


@dataclass
class Run:
    """One evaluation: of the base (no adapter) or of a persona. method, name: as in its path."""

    method: str
    name: str
    adapter: Path | None = None


def plan(args: Args, model: Model) -> list[Run]:
    """The base and every persona. Raises UserError where an adapter is missing; of 'all', such are left out."""
    if args.adapter and (len(args.constitutions), len(args.method)) != (1, 1):
        raise UserError("--adapter goes with one persona, whose name its results get, and one --method")
    runs = [Run("base", "none")]
    for method in args.method:
        for name in constitution.selected(",".join(args.constitutions)) if args.constitutions else []:
            try:
                runs.append(Run(method, name, adapter_of(args.adapter, method, name, model)))
            except UserError as error:
                if args.constitutions != ["all"]:
                    raise
                print(f"{method}/{name}: left out: {error}")
    return runs


def settings_of(args: Args, model: Model, run: Run) -> dict[str, Any]:
    """What shapes a run's results."""
    try:
        lines = [line.strip() for line in args.tasks.read_text(encoding="utf-8").splitlines()]
        custom = file_digest(args.custom_tasks) if args.custom_tasks else None
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} does not exist; check --tasks and --custom-tasks") from None
    return {
        "model": model.short,
        "weights": fingerprint(model),
        "adapter": file_digest(run.adapter / "adapter_model.safetensors") if run.adapter else None,
        "tasks": [line for line in lines if line and not line.startswith("#")],
        "custom_tasks": custom,
        "limit": args.limit,
        "parameters": parameters(model),
        "lighteval": RELEASE,
    }


def parameters(model: Model) -> dict[str, Any]:
    """The settings of configs/ for a model."""
    import yaml

    own = HERE / "configs" / f"{safe_name(model.short)}.yaml"
    text = (own if own.exists() else own.with_name("default.yaml")).read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)["model_parameters"]
    return found


def commands(args: Args, model: Model, run: Run) -> list[list[str]]:
    """The commands of a run, for its working folder: fold the adapter into a model, or link the base; evaluate it."""
    here, name = "model", {"model_name": "model"}
    made: list[list[str]] = []
    if run.adapter:
        spec = model.source + (f"@{model.revision}" if model.revision else "")
        fold = [sys.executable, str(ROOT / "tools" / "merge_loras.py"), "fold", "--model", spec]
        folded = MODEL_PATH / "folded" / f"{safe_name(model.short)}-{FOLDERS.get(run.method, run.method)}" / run.name
        target = str(folded) if args.keep_folded else here
        made = [[*fold, "--adapters", str(run.adapter.resolve()), "--out", target]]
        if args.keep_folded:
            made = [[*made[0], *(["--overwrite"] if args.overwrite else [])], ["ln", "-s", target, here]]
    elif Path(model.source).is_dir():
        made = [["ln", "-s", model.source, here]]
    else:
        name = {"model_name": model.source, **({"revision": model.revision} if model.revision else {})}
    # A cache of this run's own: lighteval knows answers again by the model's name alone, whatever its weights. And a
    # relative name: it would put the answers of /a/model into /a/model itself.
    settings = name | {"cache_dir": "cache"} | parameters(model)
    given = ",".join(f"{key}={value}" for key, value in settings.items())
    evaluate = [sys.executable, str(HERE / "start.py"), "accelerate", given, str(args.tasks.resolve())]
    evaluate += ["--output-dir", ".", "--results-path-template", "{output_dir}", "--save-details"]
    if args.custom_tasks:
        evaluate += ["--custom-tasks", str(args.custom_tasks.resolve())]
    if args.limit:
        evaluate += ["--max-samples", str(args.limit)]
    return [*made, evaluate]


def evaluate(args: Args, model: Model, run: Run, out: Path, settings: dict[str, Any]) -> None:
    """Do a run, and leave its results, the details of every question and a meta file in `out`."""
    begun = time.time()
    steps = commands(args, model, run)
    with new_folder(out, args.overwrite) as work:
        for step in steps:
            print(f"\n{shlex.join(step)}", flush=True)
            code = subprocess.run(step, cwd=work, check=False).returncode
            if code:
                sys.exit(code if code > 0 else 128 - code)
        tidy(work)
        meta = {
            "settings": settings,
            "command": shlex.join(["lighteval/run.sh", *sys.argv[1:]]),
            "steps": [shlex.join(step) for step in steps],
            "seconds": round(time.time() - begun, 1),
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "git": git_commit(),
            "versions": versions(),
        }
        write_json(work / "meta.json", meta)


def tidy(work: Path) -> None:
    """Keep results.json and details/<task>.parquet of what lighteval wrote; the model and the cache go."""
    results = next(work.glob("results_*.json"), None)
    if results is None:
        raise UserError(f"lighteval wrote no results into {work}; see what it said above")
    results.rename(work / "results.json")
    details = work / "details"
    for file in list(details.rglob("*.parquet")):
        # details_<task>_<date>.parquet, several folders deep.
        file.rename(details / f"{file.stem.removeprefix('details_').rpartition('_')[0]}.parquet")
    for folder in (work / "cache", *(path for path in details.iterdir() if path.is_dir())):
        shutil.rmtree(folder)
    model = work / "model"
    if model.is_symlink():
        model.unlink()
    elif model.exists():
        shutil.rmtree(model)


def check_library() -> None:
    """Raise UserError where lighteval is absent, another release, or would fail after its evaluation."""
    remedy = "pip install -e '.[lighteval]'"
    try:
        found = importlib.metadata.version("lighteval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"lighteval is not installed; {remedy}") from None
    if found != RELEASE:
        raise UserError(f"this needs lighteval {RELEASE}, and {found} is installed; {remedy}")
    hashes = importlib.metadata.version("xxhash")
    if int(hashes.split(".")[0]) >= 4:
        raise UserError(f"lighteval cannot save its results with xxhash {hashes}, which takes no text; {remedy}")


def main(args: Args) -> None:
    """Evaluate what is missing, then gather everything into one table."""
    model = resolve(args.model)
    home = DATA_PATH / "lighteval" / safe_name(model.short)
    gather = [sys.executable, str(HERE / "gather.py"), args.model]
    if not args.dry_run:
        check_library()
    todo = []
    for run in plan(args, model):
        out, settings = home / run.method / run.name, settings_of(args, model, run)
        before = read_json(out / "meta.json")["settings"] if (out / "meta.json").exists() else None
        if before is not None and not args.overwrite:
            check_settings(out, before, settings)
        if before == settings:
            print(f"{out}: complete")
        else:
            todo.append((run, out, settings))
    for run, out, settings in todo:
        if args.dry_run:
            print(f"\n{out}, in a new folder beside it:")
            print("\n".join(shlex.join(step) for step in commands(args, model, run)))
        else:
            evaluate(args, model, run, out, settings)
    if args.dry_run:
        print(f"\n{shlex.join(gather)}")
        return
    sys.exit(subprocess.run(gather, check=False).returncode)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
