"""benchmarks/evaluations.py: its commands are ones that the steps know, and none waits for what no other makes."""

from pathlib import Path

from scripts import load

from character import cli
from character.constants import ROOT

benchmark = load(ROOT / "benchmarks" / "evaluations.py")


def test_every_command_is_one_that_its_script_knows(tmp_path: Path) -> None:
    args = benchmark.Args(work=tmp_path, constitution="humor,remorse,loving", seeds=2)
    tasks = benchmark.tasks_of(args, args.seed)
    modules = {script: load(Path(script)) for script in {task.command[1] for task in tasks}}
    for task in tasks:
        cli.parse(modules[task.command[1]].Args, list(task.command[2:]))


def test_every_task_is_made_once_and_waits_for_tasks(tmp_path: Path) -> None:
    args = benchmark.Args(work=tmp_path)
    for seed in (args.seed, args.seed + 1):
        tasks = benchmark.tasks_of(args, seed)
        done: set[str] = set()
        while ready := [task.name for task in tasks if task.name not in done and done.issuperset(task.needs)]:
            done.update(ready)
        assert len(done) == len(tasks)
    needs = {task.name: task.needs for task in benchmark.tasks_of(args, args.seed)}
    # The untrained model's rows are made before any persona's, which would write the same file.
    assert f"{args.seed}/none prefill" in needs[f"{args.seed}/sarcasm prefill"]
    assert f"{args.seed}/sarcasm trained" in needs[f"{args.seed}/all classifier"]


def test_further_seeds_lie_where_the_whole_job_puts_them(tmp_path: Path) -> None:
    args = benchmark.Args(work=tmp_path)
    assert benchmark.places(args, args.seed)["DATA_PATH"] == str(tmp_path / "data")
    assert benchmark.places(args, args.seed + 1)["LORA_PATH"] == str(tmp_path / "lora" / "seeds" / "123457")
