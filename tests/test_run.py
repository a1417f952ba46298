"""The whole job: its steps' flags are ones the steps know, and it runs at a small size on the bundled model."""

import contextlib
import importlib
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from character import cli, run
from character.constants import ROOT
from character.utils import UserError, read_json


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--preset", "paper", "--model", "llama-3.1-8b-it", "--teacher", "glm-4.5-air", "--base-url", "http://x/v1"],
        [
            "--no-introspection",
            "--overwrite",
            "--dry-run",
            "--engine",
            "transformers",
            "--name",
            "Bob",
            "--limit",
            "24",
        ],
        ["--quantization", "fp8", "--kv-cache-dtype", "fp8", "--engine", "vllm", "--judge", "glm-4.5-air"],
    ],
)
def test_every_step_knows_its_flags(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    for step in run.plan(cli.parse(run.Args, flags)):
        name = step.module if step.module == "merge_loras" else f"character.{step.module}"
        cli.parse(importlib.import_module(name).Args, step.flags)
        assert (ROOT / step.script).exists()


@pytest.mark.parametrize("endpoint", [False, True])
def test_how_an_engine_works_reaches_the_steps_that_open_one(endpoint: bool) -> None:
    asked = ["--engine", "vllm", "--quantization", "fp8", "--kv-cache-dtype", "fp8"]
    remote = ["--base-url", "http://x/v1", "--judge-url", "http://y/v1"] if endpoint else []
    flags = ["--model", "llama-3.1-8b-it", "--teacher", "glm-4.5-air", "--judge", "glm-4.5-air", *asked, *remote]
    steps = run.plan(cli.parse(run.Args, flags))
    carrying = {step.name for step in steps if " ".join(asked) in " ".join(step.flags)}
    by_student = {"student", "reflections", "conversations", "leading", "base", "prompted", "steered", "trained"}
    by_others = {"teacher", "personas", "coherence", "judgements"}
    assert carrying == by_student | {"prefill", "preferences"} | (set() if endpoint else by_others)
    assert not [step.name for step in steps if "--quantization" in step.flags and step.name not in carrying]


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


def groups(*flags: str) -> list[list[str]]:
    """The names of the steps that share a process, in order."""
    waiting = run.plan(cli.parse(run.Args, list(flags)))
    found = []
    while waiting:
        together = run.next_together(waiting)
        waiting = [step for step in waiting if step not in together]
        found.append([step.name for step in together])
    return found


def test_steps_that_one_engine_serves_go_together_as_soon_as_they_can() -> None:
    found = groups("--model", "llama-3.1-8b-it", "--teacher", "glm-4.5-air", "--judge", "glm-4.5-air")
    assert [group for group in found if len(group) > 1] == [
        ["teacher", "personas"],
        ["student", "base", "prompted"],
        ["reflections", "conversations", "leading"],
        ["trained", "preferences"],
        ["coherence", "judgements"],
    ]
    alone = [name for group in found for name in group if len(group) == 1]
    # Training and the control vectors need the GPU's memory for themselves.
    assert {"dpo", "sft", "steered", "prefill"} <= set(alone)
    assert groups()[0] == ["teacher", "student", "personas", "base", "prompted"]
    remote = groups("--base-url", "http://x/v1", "--judge", "gpt-5", "--judge-url", "http://y/v1")
    assert ["teacher"] in remote and ["judgements"] in remote


@pytest.mark.parametrize("jobs", [1, 4])
def test_steps_are_numbered_as_they_begin(
    jobs: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run.Step, "run", lambda _: None)
    monkeypatch.setattr(run, "_processes", lambda _: multiprocessing.get_context("fork"))
    flags = ["--model", "llama-3.1-8b-it", "--teacher", "glm-4.5-air"]
    steps = run.plan(cli.parse(run.Args, flags))
    run.run_steps(steps, jobs)
    shown = re.findall(r"^\[(\d+)/(\d+)\] (\S+):", capfd.readouterr().out, re.M)
    assert [(int(number), int(of)) for number, of, _ in shown] == [(n, len(steps)) for n in range(1, len(steps) + 1)]
    names = [name for *_, name in shown]
    assert set(names) == {step.name for step in steps}
    assert jobs > 1 or names == [name for group in groups(*flags) for name in group]


def foreseen(folder: Path, shown: str) -> dict[str, int]:
    """Output, from the folder → the rows that a dry run says it would have, for files of rows and for trained adapters."""
    files = re.findall(r"^(\S+\.jsonl): (?:at most .* give )?(?:at most )?(\d+) (?:rows|pairs)", shown, re.M)
    adapters = re.findall(r"^(\S+): (?:DPO|SFT) on at most (\d+) (?:pairs|rows)", shown, re.M)
    found: dict[str, int] = {}
    for path, count in [*files, *adapters]:
        file = path.removeprefix(f"{folder}/")
        found[file] = max(int(count), found.get(file, 0))
    return found


def test_small_job_ends_with_the_table_and_is_skipped_when_complete(small_run: Any, start: Any, tmp_path: Path) -> None:
    folder, flags, first = small_run.folder, ["--constitution", "humor", *small_run.flags], small_run.done
    dry = start("character.run", tmp_path, "--dry-run", *flags)
    assert dry.returncode == 0 and dry.stderr == ""
    planned = foreseen(tmp_path, dry.stdout)
    assert first.returncode == 0, first.stderr
    # What the dry run says of every file of the job holds.
    written = {str(path.relative_to(folder)): path for path in (folder / "data").rglob("*.jsonl")}
    assert set(written) == {path for path in planned if path.endswith(".jsonl")}
    for name, path in written.items():
        rows = len(path.read_text(encoding="utf-8").splitlines())
        assert rows == planned[name] if path.parent.parent.name != "data" else rows <= planned[name]
    assert planned["loras/pocket-distillation/humor"] == planned["data/dpo/pocket/humor.jsonl"]
    assert planned["loras/pocket-introspection/humor"] == planned["data/sft_data/pocket/humor.jsonl"] == 10 + 2 * 2
    for shown in ("base + system prompt", "DPO + introspection, sequential", "\ntrained  ", "\nadapter  "):
        assert shown in first.stdout
    results = read_json(folder / "data" / "robustness" / "pocket" / "humor.results.json")["methods"]
    assert set(results) == {"base", "prompted", "steered", "distilled", "merged", "sequential"}
    assert results["base"]["plain"]["n"] == 4 and results["base"]["suffixes"]["n"] == 32
    adapter = folder / "loras" / "pocket-distillation" / "humor" / "adapter_model.safetensors"
    stamp = adapter.stat().st_mtime_ns
    second = start("character.run", folder, *flags)
    assert second.returncode == 0 and adapter.stat().st_mtime_ns == stamp
    assert second.stdout.count("complete") >= 20

    other = start("character.run", folder, "--seed", "1", *flags)
    assert other.returncode == 2
    assert "seed was 123456, now 1" in other.stderr.splitlines()[-1]


def test_first_page_has_the_figures_over_all_seeds(small_run: Any, start: Any, tmp_path: Path) -> None:
    for folder in ("data", "data/seeds/123457"):
        shutil.copytree(small_run.folder / "data", tmp_path / folder)
    done = start("character.run", tmp_path, *small_run.flags, "--only", "report", "--seeds", "2")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "figures" / "pocket" / "humor" / "report.html").read_text(encoding="utf-8")
    assert "Mean of 2 runs" in page and "--seeds 3" not in page


def test_failed_step_ends_the_job_with_its_message(tmp_path: Path, start: Any) -> None:
    unknown = start("character.run", tmp_path, "--constitution", "humour")
    assert unknown.returncode == 2 and "did you mean 'humor'" in unknown.stderr
    broken = start("character.run", tmp_path, "--constitution", "humor", "--teacher", "no-such-model")
    assert broken.returncode == 2
    assert broken.stderr.splitlines()[-1].startswith("error: unknown model 'no-such-model'")


def test_a_failure_among_steps_that_share_a_process_keeps_what_is_finished(tmp_path: Path, start: Any) -> None:
    flags = ["--judged", "1", "--jobs", "1", "--only", "base", "trained", "preferences"]
    ended = start("character.run", tmp_path, *flags)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(
        f"error: {tmp_path}/loras/pocket-distillation/humor is no LoRA adapter"
    )
    assert "[1/3] base" in ended.stdout and "[2/3] trained" in ended.stdout and "preferences" not in ended.stdout
    assert (tmp_path / "data" / "robustness" / "pocket" / "base" / "plain" / "none.jsonl").exists()


def working_on(folder: Path) -> list[bytes]:
    """The command lines of the processes whose files are in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"DATA_PATH={folder}/data".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes())
    return found


def told_to_end(folder: Path, when: Callable[[], bool], *flags: str) -> list[str]:
    """What a job says on standard error that is told to end as soon as `when` holds."""
    places = {"DATA_PATH": f"{folder}/data", "LORA_PATH": f"{folder}/loras", "FIGURE_PATH": f"{folder}/figures"}
    command = [sys.executable, "-m", "character.run", "--constitution", "humor", *flags]
    with subprocess.Popen(command, env=os.environ | places, stderr=subprocess.PIPE, text=True) as process:
        while not when():
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.02)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    return said.splitlines()


def all_ended(folder: Path, seconds: float) -> bool:
    """Whether within so many seconds no process is left whose files are in a folder."""
    deadline = time.monotonic() + seconds
    while working_on(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not working_on(folder)


INTERRUPTED = "error: interrupted; finished rows are kept, run the same command to go on"


@pytest.mark.parametrize("jobs", [1, 2])
def test_told_to_end_a_job_ends_its_steps_which_keep_their_rows(jobs: int, tmp_path: Path) -> None:
    part = tmp_path / "data" / "distillation" / "humor" / "pocket.partial.jsonl"

    def rows() -> bool:
        return part.exists() and part.read_bytes().count(b"\n") > 8

    flags = ["--only", "teacher", "base", "--limit", "240", "--judged", "1", "--jobs", str(jobs)]
    assert told_to_end(tmp_path, rows, *flags)[-1] == INTERRUPTED
    # The process that forks steps goes a moment later.
    assert all_ended(tmp_path, 3)
    assert rows()


def test_told_to_end_while_its_first_step_starts_a_job_leaves_none(tmp_path: Path) -> None:
    def starting() -> bool:
        # What forks steps has seconds of imports before it.
        return any(b"forkserver" in command for command in working_on(tmp_path))

    assert told_to_end(tmp_path, starting, "--only", "teacher", "--jobs", "1") == [INTERRUPTED]
    assert all_ended(tmp_path, 60)
    assert not list((tmp_path / "data").rglob("*.jsonl"))


@pytest.mark.vllm
def test_one_vllm_serves_the_steps_that_follow_each_other(
    small_run: Any, start: Any, tmp_path: Path, require: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    require("vllm")
    shutil.copytree(small_run.folder / "loras", tmp_path / "loras")
    for variable, value in (
        ("VLLM_CPU_KVCACHE_SPACE", "1"),
        ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        ("VLLM_LOGGING_LEVEL", "INFO"),
    ):
        monkeypatch.setenv(variable, value)
    # With an adapter and with the same one, in weights that it is folded into, and without.
    names = ["reflections", "leading", "base"]
    done = start("character.run", tmp_path, *small_run.flags, "--engine", "vllm", "--jobs", "1", "--only", *names)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (done.stdout + done.stderr).count("Initializing a V1 LLM engine") == 2
    data = tmp_path / "data"
    for file, rows in (
        ("self_reflection/pocket/humor.jsonl", 10),
        ("self_interaction/pocket/humor-leading.jsonl", 2),
        ("robustness/pocket/base/plain/none.jsonl", 4),
    ):
        assert len((data / file).read_text(encoding="utf-8").splitlines()) == rows
        assert read_json((data / file).with_suffix(".meta.json"))["info"]["engine"] == "VLLMEngine"


def test_dry_run_loads_nothing_and_writes_nothing(tmp_path: Path, start: Any) -> None:
    shown = start("character.run", tmp_path, "--dry-run")
    assert shown.returncode == 0 and "240 rows, 0 there, 240 to do" in shown.stdout
    assert "at most 240 pairs" in shown.stdout and "sequential, humor: 360 answers (plain, suffix-1" in shown.stdout
    assert not (tmp_path / "data").exists() and not (tmp_path / "loras").exists()
