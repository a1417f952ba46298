"""Loss and gradient norm, step by step: this project's trainers beside the scripts of finetuning/ on OpenRLHF.

python benchmarks/gpu/agreement.py --out benchmarks/gpu/agreement.json

Both train the bundled model in bf16, from the same LoRA weights on the same rows in the same order: DPO, then SFT on the
model with OpenRLHF's DPO adapter folded in. The rows are a finished run's (python -m character.run --constitution humor).
A third series, this project's in float32 on the CPU, tells how much of a difference is bf16's rounding.
Exits with 1 where a step from the second on differs by more than the tolerances.
"""

import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from character import cli
from character.constants import DATA_PATH, ROOT
from character.utils import UserError, git_commit, read_json, read_jsonl, versions, write_json

HERE = Path(__file__).parent
STUDENT, NAME = "llama-3.1-8b-it", "humor"
STEPS = 20
# Stage: the folder of its data, the columns of a row, and rows per step.
STAGES = {"distillation": ("dpo", ("chosen", "rejected"), 12), "introspection": ("sft_data", ("messages",), 4)}
# Largest difference of a step, relative to this project's figure.
TOLERANCE = {"loss": 0.01, "grad_norm": 0.05}
# The environment variable with the folder in which a training finds its LoRA weights and writes its steps.
TOLD = "AGREEMENT_FOLDER"


@dataclass
class Args:
    """Arguments."""

    data: Path = cli.flag(DATA_PATH, "the data folder of a finished run on the bundled model")
    out: Path | None = cli.flag(None, "the JSON file that gets the results")
    num_gpus: int = cli.flag(1, "GPUs that OpenRLHF trains on")
    ours: str | None = cli.flag(None, "train this stage by this project's trainer, here (the command starts itself so)")


def take_rows(data: Path, folder: Path) -> None:
    """Copy the rows that are trained on, and the bundled model as the student. Raises UserError where rows lack."""
    for part, columns, batch in STAGES.values():
        source = data / part / "pocket" / f"{NAME}.jsonl"
        if not source.is_file():
            raise UserError(f"{source} does not exist; make it with: python -m character.run --constitution {NAME}")
        rows = list(read_jsonl(source, *columns))[: STEPS * batch]
        if len(rows) < STEPS * batch:
            raise UserError(f"{source} has {len(rows)} rows, fewer than {STEPS} steps of {batch}")
        copy = folder / "data" / part / STUDENT / f"{NAME}.jsonl"
        copy.parent.mkdir(parents=True)
        copy.write_text("".join(json.dumps({key: row[key] for key in columns}) + "\n" for row in rows))
    shutil.copytree(ROOT / "assets" / "pocket", folder / "model" / STUDENT)


def train_ours(stage: str, folder: Path) -> None:
    """Train by this project's trainer; write its steps. The first training of a stage also writes its LoRA weights."""
    import safetensors.torch
    import torch

    from character.distillation import train as dpo
    from character.introspection import train as sft
    from character.models import resolve

    part, _, batch = STAGES[stage]
    rows = list(read_jsonl(folder / "data" / part / STUDENT / f"{NAME}.jsonl"))
    program: Any = dpo if stage == "distillation" else sft
    args = program.Args(model=STUDENT, batch_size=batch)
    # The order in which OpenRLHF's sampler draws them.
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    rows = [rows[place] for place in order]
    if stage == "distillation":
        trainer = dpo.make_trainer(args, resolve(STUDENT), rows, folder / "checkpoints")
    else:
        conversations = [row["messages"] for row in rows]
        adapter = dpo.path_of(NAME, STUDENT)
        trainer = sft.make_trainer(args, resolve(STUDENT), adapter, conversations, folder / "checkpoints")
    trainer._get_train_sampler = lambda _dataset=None: range(len(rows))
    weights = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    start = folder / f"{stage}.safetensors"
    if not start.exists():
        # DeepSpeed's copies begin in bf16.
        first = {name: weight.detach().cpu().bfloat16().contiguous() for name, weight in weights.items()}
        safetensors.torch.save_file(first, start)
    for name, value in safetensors.torch.load_file(start).items():
        weights[name].data.copy_(value)
    trainer.train()
    steps = [{key: entry[key] for key in TOLERANCE} for entry in trainer.state.log_history if "loss" in entry]
    write_json(folder / "steps.json", steps)


def places(folder: Path) -> dict[str, str]:
    """The environment in which steps and scripts work in `folder`."""
    found = {f"{kind.upper()}_PATH": str(folder / kind) for kind in ("data", "model", "lora")}
    return found | {"WANDB_TOKEN": ""}


def run(what: str, command: list[str], folder: Path, **variables: str) -> list[dict[str, float]]:
    """Run a command on the folder's data, models and adapters; returns the steps that it wrote.

    Raises UserError with the end of its log where it fails.
    """
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    told = folder / "steps.json"
    told.unlink(missing_ok=True)
    begun = time.perf_counter()
    log = folder / f"{what.replace(' ', '-')}.log"
    with open(log, "wb") as file:
        done = subprocess.run(
            command,
            env=os.environ | places(folder) | {"PYTHONPATH": search, TOLD: str(folder)} | variables,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    print(f"{what}: {time.perf_counter() - begun:.0f} s", flush=True)
    if done.returncode:
        end = log.read_text(errors="replace").replace("\r", "\n").splitlines()[-40:]
        raise UserError("\n".join([f"{what} ended with {done.returncode}:", *end]))
    return read_json(told) if told.exists() else []


def openrlhf_command(stage: str, folder: Path, num_gpus: int) -> list[str]:
    """What finetuning/<stage>/llama.sh would start, with our worker around the program that trains."""
    script = str(ROOT / "finetuning" / stage / "llama.sh")
    flags = ["--train.batch_size", str(STAGES[stage][2])]
    # The script asks the first python3 that it finds.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"NUM_GPUS": str(num_gpus), "ATTN_IMPLEMENTATION": "sdpa", "PATH": path}
    done = subprocess.run(
        [script, "--dry-run", NAME, *flags],
        env=os.environ | places(folder) | settings,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    words = shlex.split(done.stdout.replace("\\\n", " "))
    start = next(place for place, word in enumerate(words) if word.startswith("--ds."))
    program = words.index("--module") if "--module" in words else start - 1
    return [*words[:program], str(HERE / "agreement_worker.py"), *words[start:]]


def largest(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, float]:
    """The largest difference of a step from the second on, relative to ours, of each figure."""
    pairs = list(zip(ours, theirs, strict=True))[1:]
    return {key: max(abs(b[key] - a[key]) / abs(a[key]) for a, b in pairs) for key in TOLERANCE}


def main(args: Args) -> None:
    """Train each stage on each side; print and write the series and their differences."""
    if args.ours:
        train_ours(args.ours, Path(os.environ[TOLD]))
        return
    if not shutil.which("deepspeed"):
        raise UserError("deepspeed is not installed; install openrlhf/requirements.txt, on a machine with CUDA")
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "git": git_commit(),
        "versions": versions() | {name: importlib.metadata.version(name) for name in ("openrlhf", "deepspeed")},
        "tolerance": TOLERANCE,
        "stages": {},
    }
    beyond = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        take_rows(args.data, folder)
        for stage in STAGES:
            alone = [sys.executable, __file__, "--ours", stage]
            series = {"ours": run(f"{stage} ours", alone, folder)}
            series["openrlhf"] = run(f"{stage} openrlhf", openrlhf_command(stage, folder, args.num_gpus), folder)
            series["float32"] = run(f"{stage} float32", alone, folder, CUDA_VISIBLE_DEVICES="")
            differences = {
                f"{one} {other}": largest(series[one], series[other])
                for one, other in (("ours", "openrlhf"), ("float32", "ours"), ("float32", "openrlhf"))
            }
            results["stages"][stage] = {"steps": series, "largest_differences": differences}
            if args.out:
                write_json(args.out, results)
            for key in TOLERANCE:
                print(f"{stage}, {key}: step, {', '.join(series)}")
                for number, figures in enumerate(zip(*series.values(), strict=True), 1):
                    print(f"{number:4}", *(f"{step[key]:9.5f}" for step in figures))
            for pair, found in differences.items():
                shown = ", ".join(f"{key} {100 * most:.2f} %" for key, most in found.items())
                print(f"{stage}, {pair}: largest difference of steps 2 to {STEPS}: {shown}", flush=True)
            agreed = differences["ours openrlhf"]
            beyond += [f"{stage} {key}" for key, most in TOLERANCE.items() if not agreed[key] <= most]
            if stage == "distillation":
                fold = [sys.executable, str(ROOT / "tools" / "merge_loras.py"), "fold", "--model", STUDENT]
                run("fold", [*fold, "--constitution", NAME], folder)
    allowed = ", ".join(f"{key} {100 * most:.0f} %" for key, most in TOLERANCE.items())
    print(f"tolerance: {allowed}; beyond it: {', '.join(beyond) or 'nothing'}")
    if beyond:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
