"""The whole job: its steps' flags are ones the steps know, and it runs at a small size on the bundled model."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from character import cli, run
from character.constants import ROOT
from character.utils import UserError, read_json

SMALL = ["--limit", "24", "--judged", "4", "--reflections", "1", "--conversations", "2", "--turns", "2"]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--preset", "paper", "--model", "llama-3.1-8b-it", "--teacher", "glm-4.5-air", "--base-url", "http://x/v1"],
        ["--no-introspection", "--overwrite", "--dry-run", "--engine", "transformers", "--name", "Bob", *SMALL],
    ],
)
def test_every_step_knows_its_flags(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    for step in run.plan(cli.parse(run.Args, flags)):
        name = step.module if step.module == "merge_loras" else f"character.{step.module}"
        cli.parse(importlib.import_module(name).Args, step.flags)
        assert (ROOT / step.script).exists()


def test_steps_are_chosen_by_name() -> None:
    chosen = run.plan(cli.parse(run.Args, ["--only", "dpo", "teacher", "--skip", "dpo"]))
    assert [step.name for step in chosen] == ["teacher"]
    with pytest.raises(UserError, match="no step 'dop'; the steps are: teacher, student"):
        run.plan(cli.parse(run.Args, ["--only", "dop"]))


def test_needs_come_earlier_and_are_steps() -> None:
    done: set[str] = set()
    for step in run.plan(cli.parse(run.Args, [])):
        assert done.issuperset(step.needs), step.name
        done.add(step.name)


def start(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    places = {"DATA_PATH": str(folder / "data"), "LORA_PATH": str(folder / "loras")}
    command = [sys.executable, "-m", "character.run", *flags]
    return subprocess.run(command, env=os.environ | places, capture_output=True, text=True, check=False)


def foreseen(folder: Path) -> dict[str, int]:
    """Output → the rows that a dry run says it would have, for files of rows and for trained adapters."""
    shown = start(folder, "--constitution", "humor", "--dry-run", *SMALL)
    assert shown.returncode == 0 and shown.stderr == ""
    files = re.findall(r"^(\S+\.jsonl): (?:at most .* give )?(?:at most )?(\d+) (?:rows|pairs)", shown.stdout, re.M)
    adapters = re.findall(r"^(\S+): (?:DPO|SFT) on at most (\d+) (?:pairs|rows)", shown.stdout, re.M)
    found: dict[str, int] = {}
    for path, count in [*files, *adapters]:
        found[path] = max(int(count), found.get(path, 0))
    return found


def test_small_job_ends_with_the_table_and_is_skipped_when_complete(tmp_path: Path) -> None:
    planned = foreseen(tmp_path)
    first = start(tmp_path, "--constitution", "humor", *SMALL)
    assert first.returncode == 0, first.stderr
    # What the dry run says of every file of the job holds.
    written = list((tmp_path / "data").rglob("*.jsonl"))
    assert {str(path) for path in written} == {path for path in planned if path.endswith(".jsonl")}
    for path in written:
        rows = len(path.read_text(encoding="utf-8").splitlines())
        assert rows == planned[str(path)] if path.parent.parent.name != "data" else rows <= planned[str(path)]
    data, loras = tmp_path / "data", tmp_path / "loras"
    assert (
        planned[str(loras / "pocket-distillation" / "humor")] == planned[str(data / "dpo" / "pocket" / "humor.jsonl")]
    )
    rows_of_sft = planned[str(data / "sft_data" / "pocket" / "humor.jsonl")]
    assert planned[str(loras / "pocket-introspection" / "humor")] == rows_of_sft == 10 + 2 * 2
    for shown in ("base + system prompt", "DPO + introspection, sequential", "\ntrained  ", "\nadapter  "):
        assert shown in first.stdout
    results = read_json(tmp_path / "data" / "robustness" / "pocket" / "humor.results.json")["methods"]
    assert set(results) == {"base", "prompted", "distilled", "merged", "sequential"}
    assert results["base"]["plain"]["n"] == 4 and results["base"]["suffixes"]["n"] == 32
    adapter = tmp_path / "loras" / "pocket-distillation" / "humor" / "adapter_model.safetensors"
    stamp = adapter.stat().st_mtime_ns
    second = start(tmp_path, "--constitution", "humor", *SMALL)
    assert second.returncode == 0 and adapter.stat().st_mtime_ns == stamp
    assert second.stdout.count("complete") >= 20

    other = start(tmp_path, "--constitution", "humor", "--seed", "1", *SMALL)
    assert other.returncode == 2
    assert "seed was 123456, now 1" in other.stderr.splitlines()[-1]


def test_failed_step_ends_the_job_with_its_message(tmp_path: Path) -> None:
    unknown = start(tmp_path, "--constitution", "humour")
    assert unknown.returncode == 2 and "did you mean 'humor'" in unknown.stderr
    broken = start(tmp_path, "--constitution", "humor", "--teacher", "no-such-model")
    assert broken.returncode == 2
    assert broken.stderr.splitlines()[-1].startswith("error: unknown model 'no-such-model'")


def test_dry_run_loads_nothing_and_writes_nothing(tmp_path: Path) -> None:
    shown = start(tmp_path, "--dry-run")
    assert shown.returncode == 0 and "240 rows, 0 there, 240 to do" in shown.stdout
    assert "at most 240 pairs" in shown.stdout and "sequential, humor: 360 answers (plain, suffix-1" in shown.stdout
    assert not (tmp_path / "data").exists() and not (tmp_path / "loras").exists()
