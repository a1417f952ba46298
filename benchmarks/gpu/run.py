"""Speed on a GPU: this project against the published scripts' settings, on the same work, a process per side.

python benchmarks/gpu/run.py --out benchmarks/gpu/results.json
python benchmarks/gpu/run.py --only dpo teacher.ours --out results.json

Weights are random ones of Llama 3.1 8B's shape unless --model names a folder. Figures that --out holds already stay,
and ratios are made of sides that were measured on one kind of GPU.
"""

import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shape
from works import EXPERIMENTS, ON_TWO_GPUS, WORKS, Context

from character import cli
from character.utils import UserError, git_commit, read_json, versions, write_json

HERE = Path(__file__).parent
# A side is ended after STARTING seconds and so many times --seconds; it may have told figures by then.
STARTING, PATIENCE = 150, 10
# Lines of vLLM's log that are kept.
TELLING = re.compile(
    r"KV cache size|Maximum concurrency|torch.compile t|Graph capturing|model runner|FlashAttention ver|"
    r"Asynchronous scheduling|Auto-fit|ascade attention|Model loading took|init engine",
    re.IGNORECASE,
)


@dataclass
class Args:
    """Arguments."""

    only: list[str] = cli.flag(list(WORKS), "works, or single sides such as dpo.ours")
    out: Path | None = cli.flag(None, "the JSON file that gets the results")
    model: Path | None = cli.flag(None, "a folder with real weights (default: random ones of --shape)")
    shape: Path = cli.flag(HERE / "llama-3.1-8b.json", "the config of the model with random weights")
    folder: Path | None = cli.flag(None, "where the model is put and kept (default: a temporary folder)")
    scale: float = cli.flag(1.0, "of the number of requests")
    seconds: float = cli.flag(30.0, "after which a side that can stop, stops")
    tiny: bool = cli.flag(False, "short texts, for a trial on a CPU")
    side: str | None = cli.flag(None, "run this side here (the command starts itself so)")


def chosen(only: list[str]) -> list[tuple[str, str]]:
    """(work, side) of what is asked for. Raises UserError for an unknown name."""
    found: list[tuple[str, str]] = []
    for name in only:
        work, _, side = name.partition(".")
        sides = {**WORKS.get(work, {}), **EXPERIMENTS.get(work, {})}
        if not sides or (side and side not in sides):
            known = [*WORKS, *(f"{work}.{side}" for work, sides in EXPERIMENTS.items() for side in sides)]
            raise UserError(f"unknown work '{name}'; known: {', '.join(known)}")
        found += [(work, side)] if side else [(work, each) for each in WORKS[work]]
    return found


def gpus_for(side: str) -> list[str]:
    """The GPUs that a side sees, first ones of those that are visible here: an engine would use all that it sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    return visible[: 2 if side in ON_TWO_GPUS else 1]


def run_side(args: Args, work: str, side: str, folder: Path) -> dict[str, Any]:
    """One side in a process of its own: what it told, and how it ended."""
    told = folder / f"{work}.{side}.json"
    log = folder / f"{work}.{side}.log"
    told.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "run.py"), "--side", f"{work}.{side}", "--folder", str(folder)]
    command += ["--scale", str(args.scale), "--seconds", str(args.seconds), *(["--tiny"] if args.tiny else [])]
    # The engine otherwise keeps vLLM's log to itself.
    variables = {"VLLM_LOGGING_LEVEL": "INFO"} | os.environ
    gpus = gpus_for(f"{work}.{side}")
    variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if work == "start":
        variables["VLLM_CACHE_ROOT"] = str(folder / "cache")
    begun = time.perf_counter()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=variables
        )
        try:
            code, busy = watched(process, STARTING + PATIENCE * args.seconds, told, gpus)
        finally:
            # Its engine's processes too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = read_json(told) if told.exists() else {}
    found["whole_seconds"] = round(time.perf_counter() - begun, 1)
    if busy:
        found["gpu_busy"] = round(sum(busy) / len(busy))
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    found["vllm"] = [line[-160:] for line in lines if TELLING.search(line)]
    if code:
        found["ended"] = code
        found["log"] = [*[line for line in lines[:-30] if "Error" in line][:10], *lines[-30:]]
    return found


def watched(
    process: subprocess.Popen[bytes], seconds: float, told: Path, gpus: list[str]
) -> tuple[int | str, list[float]]:
    """(how a side's process ended, in which share of each second its GPUs ran anything, in percent).

    The seconds are those after its start, up to the last that it told.
    """
    busy: list[tuple[float, float]] = []
    ends = time.time() + seconds
    code: int | str = "cut off"
    while code == "cut off" and time.time() < ends:
        try:
            code = process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            if told.exists() and "start_seconds" in read_json(told):
                busy += [(time.time(), share) for share in utilization(gpus)]
    last = told.stat().st_mtime if told.exists() else 0
    return code, [share for at, share in busy if at < last]


def utilization(gpus: list[str]) -> list[float]:
    """What nvidia-smi says of these GPUs' use, their mean in percent; empty where it says nothing."""
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-i", ",".join(gpus)]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
        return [sum(map(float, lines)) / len(lines)] if lines else []
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def summary(results: dict[str, Any]) -> list[str]:
    """One line per side that has a rate, and per ratio."""
    lines = []
    for work, sides in results["works"].items():
        for side, figures in sides.items():
            if not isinstance(figures, dict):
                continue
            shown = {
                key: figures[key]
                for key in (
                    "rate",
                    "steady_rate",
                    "tokens",
                    "seconds",
                    "start_seconds",
                    "gpu_busy",
                    "tflops",
                    "padding",
                    "ended",
                )
                if figures.get(key) is not None
            }
            lines.append(f"{work}.{side}: " + ", ".join(f"{key} {value}" for key, value in shown.items()))
        if "ratio" in sides:
            lines.append(f"{work}: ratio {sides['ratio']}")
    return lines


def add_ratios(works: dict[str, Any]) -> None:
    """ours / published, where both were measured on one kind of GPU."""
    for sides in works.values():
        published, ours = sides.get("published", {}), sides.get("ours", {})
        if published.get("rate") and ours.get("rate") and published.get("gpu") == ours.get("gpu"):
            sides["ratio"] = round(ours["rate"] / published["rate"], 2)


def main(args: Args) -> None:
    """Run what is asked for; write and print as results come."""
    if args.side == "build":
        assert args.folder
        shape.build(args.folder, args.shape, args.model)
        return
    if args.side:
        work, _, side = args.side.partition(".")
        assert args.folder
        out = args.folder / f"{args.side}.json"
        context = Context(args.folder, out, args.scale, args.seconds, args.tiny)
        {**WORKS[work], **EXPERIMENTS.get(work, {})}[side](context)
        return
    sides = chosen(args.only)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        begun = time.perf_counter()
        # In a process of its own, which gives the GPU's memory back.
        command = [sys.executable, str(HERE / "run.py"), "--side", "build", "--folder", str(folder)]
        command += ["--shape", str(args.shape), *(["--model", str(args.model)] if args.model else [])]
        subprocess.run(command, check=True)
        print(f"model in {folder / 'model'}: {time.perf_counter() - begun:.0f} s", flush=True)
        results: dict[str, Any] = read_json(args.out) if args.out and args.out.exists() else {"works": {}}
        results |= {
            "command": " ".join(["python", *sys.argv]),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "shape": args.model.name if args.model else args.shape.stem,
            "git": git_commit(),
            "versions": versions(),
        }
        if ("machine", "machine") not in sides:
            sides.insert(0, ("machine", "machine"))
        for work, side in sides:
            figures = run_side(args, work, side, folder)
            if work == "machine":
                gpu = figures.get("gpu")
            results["works"].setdefault(work, {})[side] = figures | {"gpu": gpu}
            add_ratios(results["works"])
            if args.out:
                write_json(args.out, results)
            shown = {
                key: value for key, value in figures.items() if key not in ("answers", "losses", "settings", "vllm")
            }
            print(f"{work}.{side}", json.dumps(shown), flush=True)
        print("\n".join(["", *summary(results)]))


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
