"""benchmarks/introspection.py: its commands are ones that the steps know, they run in order, and its figures add up."""

import sys
from pathlib import Path

import pytest
from scripts import load

from character import cli
from character.constants import ROOT
from character.utils import UserError

benchmark = load(ROOT / "benchmarks" / "introspection.py")


def test_every_command_is_one_that_its_script_knows(tmp_path: Path) -> None:
    args = benchmark.Args(work=tmp_path, constitutions=["humor", "sarcasm"], seeds=3, judged=4, turns=2)
    tasks = benchmark.plan(args)
    assert len({task.name for task in tasks}) == len(tasks)
    modules = {script: load(Path(script)) for script in {task.command[1] for task in tasks}}
    for task in tasks:
        flags = cli.parse(modules[task.command[1]].Args, list(task.command[2:]))
        assert flags.constitution in ("humor", "sarcasm", "humor,sarcasm", "all")
    # Answers of one persona's adapter wait for the command that makes that adapter.
    needs = {task.name: task.needs for task in tasks}
    assert needs["123456/linear sarcasm answers"] == ("123456/linear sarcasm",)


def test_a_task_waits_for_the_writers_of_what_it_reads(tmp_path: Path) -> None:
    tasks = {task.name: task for task in benchmark.plan(benchmark.Args(work=tmp_path, seeds=3, seed=1))}
    done: set[str] = set()
    while ready := [name for name, task in tasks.items() if name not in done and done.issuperset(task.needs)]:
        done.update(ready)
    assert done == tasks.keys()
    # A twin's words are another seed's, the last seed's those of the first; the adapter they are put on is its own.
    assert {"3/dpo", "1/reflections", "1/conversations", "1/leading"} == set(tasks["3/twin rows"].needs)
    assert "2/untrained leading" in tasks["2/untrained rows"].needs
    assert {"1/twin-merged humor answers", "1/linear humor answers", "1/trained"} < set(tasks["1/classifier"].needs)
    assert not any("twin" in task.name for task in benchmark.plan(benchmark.Args(work=tmp_path, seeds=1)))


def test_what_is_shared_is_linked(tmp_path: Path) -> None:
    args = benchmark.Args(work=tmp_path, seeds=2, seed=1)
    benchmark.lay_out(args)
    benchmark.lay_out(args)
    for source in benchmark.SOURCES:
        assert (tmp_path / "1" / source / "loras" / "pocket-distillation").samefile(
            tmp_path / "1/loras/pocket-distillation"
        )
    words = {source: tmp_path / "1" / source / "data" / "self_reflection" for source in benchmark.SOURCES}
    assert words["reflections"].samefile(tmp_path / "1" / "data" / "self_reflection")
    assert words["twin"].samefile(tmp_path / "2" / "data" / "self_reflection")
    assert not words["untrained"].exists()


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_tasks_run_in_order_and_the_first_failure_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write = "import os; from pathlib import Path; Path(os.environ['DATA_PATH']).mkdir(parents=True)"
    read = "import os; assert os.path.isdir(os.environ['DATA_PATH'])"
    first = benchmark.Task("1/write", python(write), (("DATA_PATH", str(tmp_path / "1")),), ())
    second = benchmark.Task("1/read", python(read), (("DATA_PATH", str(tmp_path / "1")),), ("1/write",))
    benchmark.run_tasks([second, first], tmp_path, 2)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["[1/2] 1/write", "[2/2] 1/read"]

    wrong = benchmark.Task("1/wrong", python("import sys; print('so'); sys.exit('error: no disk')"), (), ())
    long = benchmark.Task("1/long", python("import time; time.sleep(60)"), (), ())
    never = benchmark.Task("1/never", python(write), (("DATA_PATH", str(tmp_path / "never")),), ("1/wrong",))
    with pytest.raises(UserError, match=r"1/wrong failed \(.*1-wrong\.log\): error: no disk"):
        benchmark.run_tasks([long, wrong, never], tmp_path, 2)
    assert not (tmp_path / "never").exists()


def test_figures_of_several_seeds() -> None:
    parts = [{"share": share, "n": 40} for share in (0.9, 0.95, 1.0)]
    found = benchmark.over_seeds(parts)
    assert found["mean"] == pytest.approx(0.95) and found["values"] == [0.9, 0.95, 1.0]
    # Student's t with two degrees of freedom, 4.303, times 0.05 / √3.
    assert (found["high"] - found["low"]) / 2 == pytest.approx(4.303 * 0.05 / 3**0.5, rel=1e-3)
    assert found["pooled"]["share"] == 114 / 120 and found["pooled"]["n"] == 120
    assert benchmark.shown(found) == "95.0 ± 12.4 [89.5, 97.7]"
    assert benchmark.shown(benchmark.over_seeds(parts[:1])) == "90.0 [76.9, 96.0]"


def test_every_method_has_a_name() -> None:
    names = [benchmark.label(method) for method in benchmark.methods_of(benchmark.Args(Path(), seeds=2))]
    assert names[0] == "base" and "linear" in names[4] and len(set(names)) == 6 + 2 * 4
    assert all(name.startswith("DPO + introspection (") for name in names[6:])
    assert names[-1].endswith("another seed distilled), sequential")
    assert len(benchmark.methods_of(benchmark.Args(Path(), seeds=1))) == 6 + 2 * 3
