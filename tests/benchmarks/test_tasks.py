"""benchmarks/tasks.py: tasks wait for those they need, a failure is one line, and results say how they came about."""

import sys
import time
from pathlib import Path

import pytest
from scripts import load

from character.constants import ROOT
from character.utils import UserError, read_json

tasks = load(ROOT / "benchmarks" / "tasks.py")


def task(name: str, code: str, *needs: str) -> object:
    return tasks.Task(name, (sys.executable, "-c", code), (), needs)


def test_a_task_waits_for_what_it_needs(tmp_path: Path) -> None:
    made = tmp_path / "made"
    second = task("a second", f"assert open({str(made)!r}).read() == '1'", "a first")
    first = task("a first", f"import time; time.sleep(0.3); open({str(made)!r}, 'w').write('1')")
    tasks.run_tasks([second, first], tmp_path, 2)


def test_a_failure_is_the_last_line_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a first failed \(.*a-first\.log\): error: no disk$"):
        tasks.run_tasks([task("a first", "raise SystemExit('error: no disk')")], tmp_path, 1)


def test_results_say_how_they_came_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "evaluations.py"), "--seeds", "2"])
    tasks.report(tmp_path / "found", time.monotonic(), {"share": 0.5}, lambda found: f"{found['share']:.0%}\n")
    written = read_json(tmp_path / "found.json")
    assert written["command"] == "python benchmarks/evaluations.py --seeds 2"
    assert written["share"] == 0.5 and written["seconds"] >= 0 and "torch" in written["versions"]
    assert (tmp_path / "found.md").read_text() == "50%\n"
