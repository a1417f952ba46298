"""Commands that need one another's files, many at once: what the benchmarks of whole runs share."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from character.constants import ROOT
from character.utils import UserError, git_commit, versions, write_json


@dataclass(frozen=True)
class Task:
    """One command. needs: the names of the tasks whose files it reads. environment: DATA_PATH and its like."""

    name: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    needs: tuple[str, ...]


def run_tasks(tasks: Sequence[Task], work: Path, jobs: int) -> None:
    """Run every task, up to `jobs` at once, as soon as those it needs are done. Raises UserError for the first failure."""
    waiting, done = list(tasks), set[str]()
    running: dict[Task, tuple[subprocess.Popen[bytes], float]] = {}
    (work / "logs").mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    cards = [f"{number}" for number in range(gpus())]
    try:
        while waiting or running:
            for task in [task for task in waiting if done.issuperset(task.needs)][: jobs - len(running)]:
                waiting.remove(task)
                environment = {"OMP_NUM_THREADS": threads, **os.environ, **dict(task.environment), "PYTHONPATH": path()}
                if len(cards) > 1:
                    environment["CUDA_VISIBLE_DEVICES"] = cards[(len(tasks) - len(waiting)) % len(cards)]
                with open(log_of(work, task), "wb") as log:
                    process = subprocess.Popen(task.command, env=environment, stdout=log, stderr=log)
                running[task] = process, time.monotonic()
            ended = [task for task, (process, _) in running.items() if process.poll() is not None]
            if not ended:
                time.sleep(0.05)
            for task in ended:
                process, begun = running.pop(task)
                if process.returncode:
                    said = log_of(work, task).read_text(encoding="utf-8", errors="replace").strip().splitlines()
                    raise UserError(f"{task.name} failed ({log_of(work, task)}): {said[-1] if said else 'no message'}")
                done.add(task.name)
                print(f"[{len(done)}/{len(tasks)}] {task.name}: {time.monotonic() - begun:.1f} s", flush=True)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.wait()


def gpus() -> int:
    """How many GPUs there are; asked of a process of its own, since this one needs none of their memory."""
    code = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def path() -> str:
    """PYTHONPATH with the repository in front of what it held."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def log_of(work: Path, task: Task) -> Path:
    """Where a task's output is."""
    return work / "logs" / f"{task.name.replace('/', '-').replace(' ', '-')}.log"


def machine() -> str:
    """The processor's cores and the GPU that the steps use."""
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{os.cpu_count()} cores, {' and '.join(gpus) or 'no GPU'}"


def report(out: Path, begun: float, found: Mapping[str, Any], text_of: Callable[[Mapping[str, Any]], str]) -> None:
    """Write what was found, and how, to `out` with .json and as a page with .md, and print the page.

    begun: when the command was started, by time.monotonic().
    """
    results = {
        "command": " ".join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]]),
        "machine": machine(),
        "git": git_commit(),
        "versions": versions(),
        "seconds": round(time.monotonic() - begun, 1),
        **found,
    }
    write_json(out.with_suffix(".json"), results)
    text = text_of(results)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
