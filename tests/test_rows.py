"""A stage's output file: killed at any instant it loses no finished row, and it never mixes settings."""

import asyncio
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from character import rows, utils
from character.rows import Drop, Row, RowError, Rows
from character.utils import UserError

SETTINGS = {"model": "tiny", "sampling": {"temperature": 0.7}, "seed": 1}

# A step as the project's own are: it answers numbered messages with the scripted engine, in an order of its own.
# Every seventh row is dropped. Each start of a row is logged. Rows named in the file "failing" fail.
STEP = """
import asyncio, ctypes, os, random, resource, sys
from dataclasses import dataclass
from pathlib import Path

from character import cli, steps
from character.engine.scripted import Scripted
from character.models import Model
from character.rows import Drop, RowError, Rows

@dataclass
class Args(steps.GenerateArgs):
    folder: Path = cli.flag(Path(), "where the file is")
    rows: int = cli.flag(60, "how many")
    width: int = cli.flag(400, "characters of the longest answer")
    pause: float = cli.flag(0.004, "longest time for an answer, in seconds")
    file_limit: int = cli.flag(0, "bytes that a file may have")
    powerless: bool = cli.flag(False, "give up root's rights")

async def answer(messages, prefill):
    number = int(messages[-1]["content"].split()[-1])
    await asyncio.sleep(random.random() * PAUSE)
    return f"answer {number}: " + "é" * (number * 37 % WIDTH)

async def work(engine, row):
    number = int(row["prompt"].split()[-1])
    os.write(LOG, f"{row['prompt']}\\n".encode())
    if str(number) in FAILING:
        raise RowError("the server answered 500")
    reply = await engine.reply([{"role": "user", "content": row["prompt"]}], None)
    if number % 7 == 3:
        raise Drop("every seventh")
    return {"response": reply.text, "completion_tokens": reply.completion_tokens}

def main(args):
    global LOG, PAUSE, WIDTH, FAILING
    if args.powerless:
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, none) == 0
    if args.file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (args.file_limit, args.file_limit))
    PAUSE, WIDTH = args.pause, args.width
    failing = Path(os.environ["STEP_LOG"]).with_name("failing")
    FAILING = failing.read_text().split() if failing.exists() else []
    LOG = os.open(os.environ["STEP_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    inputs = [{"prompt": f"message {number}"} for number in range(args.rows)][: args.limit]
    model = Model("tiny", "nowhere", "Tiny")
    settings = {"temperature": args.temperature, "seed": args.seed}
    output = Rows(args.folder / "out.jsonl", inputs, settings, args.overwrite)
    steps.open_engine = lambda model, **_: Engine(model, answer)
    steps.generate([steps.Job(output, work, lambda row: len(row["prompt"]), 10)], args, model)

class Engine(Scripted):
    concurrency = 8

if __name__ == "__main__":
    cli.run(main, Args)
"""
CONCURRENCY = 8

# Starts STEP in children of its own, so that its imports are paid for once: first undisturbed, then killed at random
# instants of that time, until it was killed often enough and finished each file that it began.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path

home, kills = Path(sys.argv[1]), int(sys.argv[2])
flags = sys.argv[3:]
exec(compile(sys.stdin.read().replace("__main__", "imported"), "step", "exec"))

def start(folder):
    child = os.fork()
    if child == 0:
        sys.argv = ["step", "--folder", str(folder), *flags]
        cli.run(main, Args)
        os._exit(0)
    return child

begun = time.monotonic()
assert os.waitpid(start(home / "undisturbed"), 0)[1] == 0
longest = time.monotonic() - begun
chance = random.Random(7)
killed = files = 0
whole = False
while killed < kills or not whole:
    child = start(home / f"killed-{files}")
    if killed < kills:
        time.sleep(chance.uniform(0, 0.8 * longest))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    whole = not os.WIFSIGNALED(status)
    if whole:
        assert os.WEXITSTATUS(status) == 0, status
        files += 1
    else:
        killed += 1
print("KILLED", killed, flush=True)
"""


def inputs(count: int) -> list[Row]:
    return [{"prompt": f"message {number}"} for number in range(count)]


async def plain(row: Row) -> Row:
    """Answer at once, the same at each run."""
    await asyncio.sleep(0)
    return {"response": f"answer to {row['prompt']}", "completion_tokens": 3}


def fill(path: Path, count: int, work: Any = plain, settings: Any = SETTINGS, overwrite: bool = False) -> Rows:
    output = Rows(path, inputs(count), settings, overwrite)
    asyncio.run(output.fill(work, concurrency=4))
    return output


def lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def meta(path: Path) -> Row:
    found: Row = json.loads(path.with_suffix(".meta.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture
def step(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """step("--rows", "9"): STEP's process, with its output in tmp_path/out.jsonl."""
    script = tmp_path / "scripts" / "step.py"
    script.parent.mkdir()
    script.write_text(STEP, encoding="utf-8")

    def start(*flags: str, folder: Path = tmp_path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(script), "--folder", str(folder), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"STEP_LOG": str(script.with_name("log"))},
        )

    return start


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str], list[str]]:
    """(exit code, lines of stdout, lines of stderr)."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out.splitlines(), err.splitlines()


def wait_for_lines(path: Path, count: int) -> None:
    end = time.monotonic() + 30
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end, f"{path} never had {count} lines"
        time.sleep(0.005)


# Killed.


def test_killed_at_random_instants_and_resumed(tmp_path: Path) -> None:
    kills, count = 40, 150
    log = tmp_path / "log"
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), str(kills), "--rows", str(count), "--width", "9000"],
        input=STEP,
        capture_output=True,
        text=True,
        env=os.environ | {"STEP_LOG": str(log)},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"KILLED {kills}" in done.stdout
    expected = (tmp_path / "undisturbed" / "out.jsonl").read_bytes()
    assert expected.count(b"\n") == count - len(range(3, count, 7))
    folders = sorted(tmp_path.glob("killed-*"))
    for folder in folders:
        assert (folder / "out.jsonl").read_bytes() == expected
        assert meta(folder / "out.jsonl")["rows"]["dropped"] == {"every seventh": len(range(3, count, 7))}
        assert not (folder / "out.partial.jsonl").exists()
    # Rows that were finished are not done again: only those in flight at a kill are.
    assert len(log.read_text().splitlines()) <= count * (1 + len(folders)) + kills * CONCURRENCY
    assert len(folders) <= kills / 2, "too few of the kills met a file that was half made"


def in_child(folder: Path, count: int, on_step: Callable[[int], None]) -> int:
    """In a child: extend a file to `count` rows; on_step(n) comes before the n-th line of rows.py and utils.py runs.

    Returns the child's wait status.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    steps = 0
    watched = {rows.__file__, utils.__file__}

    def on_line(frame: Any, event: str, _: Any) -> Any:
        nonlocal steps
        if frame.f_code.co_filename not in watched:
            return None
        if event == "line":
            steps += 1
            on_step(steps)
        return on_line

    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.settrace(on_line)
        fill(folder / "out.jsonl", count, one_dropped)
    finally:
        os._exit(0)


def steps_that_change_files(folder: Path, count: int, notes: Path) -> list[int]:
    """The lines, counted as they run, before which a file differs from what it was one line earlier."""
    before: Any = None
    found = open(notes, "w")

    def compare(number: int) -> None:
        nonlocal before
        now = sorted((path.name.split(".")[0], path.read_bytes()) for path in folder.iterdir())
        if now != before:
            found.write(f"{number}\n")
            found.flush()
        before = now

    assert in_child(folder, count, compare) == 0
    return [int(line) for line in notes.read_text().split()]


def crash_points(folder: Path, count: int, crash_at: int) -> bool:
    """Whether a child that dies before the line `crash_at` runs came that far."""

    def crash(number: int) -> None:
        if number == crash_at:
            os.kill(os.getpid(), signal.SIGKILL)

    return os.WIFSIGNALED(in_child(folder, count, crash))


async def one_dropped(row: Row) -> Row:
    if row["prompt"] in ("message 1", "message 4"):
        raise Drop("unwanted")
    return await plain(row)


def test_killed_after_every_change_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "git_commit", lambda: None)
    monkeypatch.setattr(rows, "versions", dict)
    # A killed process loses nothing that it has written, so the disk need not be waited for.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    short, whole = tmp_path / "short", tmp_path / "whole"
    fill(short / "out.jsonl", 3, one_dropped)
    fill(whole / "out.jsonl", 6, one_dropped)
    expected = (whole / "out.jsonl").read_bytes()
    before = (short / "out.jsonl").read_bytes()
    shutil.copytree(short, tmp_path / "watched")
    steps = steps_that_change_files(tmp_path / "watched", 6, tmp_path / "steps")
    assert len(steps) > 10, "the lock file, two meta files, three rows, the sealed file's rows and its renaming"
    for crash_at in steps:
        folder = tmp_path / "killed"
        shutil.copytree(short, folder)
        assert crash_points(folder, 6, crash_at)
        assert (folder / "out.jsonl").read_bytes() in (before, expected), "the sealed file is never half written"
        there = {row["prompt"] for row in lines(folder / "out.jsonl")}
        partial = folder / "out.partial.jsonl"
        begun = [line for line in partial.read_bytes().splitlines() if b'"dropped"' in line] if partial.exists() else []
        redone: list[str] = []

        async def work(row: Row, redone: list[str] = redone) -> Row:
            redone.append(row["prompt"])
            return await one_dropped(row)

        output = Rows(folder / "out.jsonl", inputs(6), SETTINGS)
        if not output.complete:
            asyncio.run(output.fill(work))
        assert (folder / "out.jsonl").read_bytes() == expected, f"killed before line {crash_at}"
        assert meta(folder / "out.jsonl")["dropped"].keys() == meta(whole / "out.jsonl")["dropped"].keys()
        assert not there & set(redone) and "message 1" not in redone, "a finished row was done again"
        assert not (begun and "message 4" in redone), "a dropped row was done again"
        shutil.rmtree(folder)


def test_a_half_written_last_line_is_done_again(tmp_path: Path) -> None:
    whole = tmp_path / "whole" / "out.jsonl"
    fill(whole, 5)
    path = tmp_path / "out.jsonl"

    async def interrupted(row: Row) -> Row:
        if row["prompt"] == "message 3":
            raise UserError("the power went")
        return await plain(row)

    with pytest.raises(UserError, match="the power went"):
        fill(path, 5, interrupted)
    partial = tmp_path / "out.partial.jsonl"
    finished = partial.read_bytes()
    kept = finished.count(b"\n")
    assert 0 < kept < 5
    done_again: list[str] = []

    async def noting(row: Row) -> Row:
        done_again.append(row["prompt"])
        return await plain(row)

    for cut in (1, 20, len(finished.splitlines()[-1])):
        partial.write_bytes(finished[:-cut])
        done_again.clear()
        output = fill(path, 5, noting)
        assert path.read_bytes() == whole.read_bytes()
        assert len(done_again) == 5 - (kept - 1)
        assert output.path == path and not partial.exists()
        path.rename(tmp_path / "done.jsonl")


def test_an_empty_file_of_a_run_killed_at_its_start_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out.partial.jsonl").touch()
    fill(tmp_path / "out.jsonl", 2)
    assert len(lines(tmp_path / "out.jsonl")) == 2


# Settings, limits and the rows themselves.


def test_other_settings_are_named_and_overwrite_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, 3)
    before = path.read_bytes()
    other = SETTINGS | {"seed": 2, "sampling": {"temperature": 0.1}}
    with pytest.raises(UserError) as refusal:
        fill(path, 3, settings=other)
    message = str(refusal.value)
    assert str(path) in message and "seed was 1, now 2" in message and "--overwrite" in message
    assert 'sampling was {"temperature": 0.7}, now {"temperature": 0.1}' in message and "model" not in message
    assert path.read_bytes() == before and meta(path)["settings"] == SETTINGS

    async def otherwise(row: Row) -> Row:
        return {"response": "other"}

    fill(path, 2, otherwise, other, overwrite=True)
    assert [row["response"] for row in lines(path)] == ["other"] * 2
    assert meta(path)["settings"] == other
    with pytest.raises(UserError, match="seed was 2, now 1"):
        fill(path, 3)


def test_other_settings_are_refused_while_a_file_is_unfinished(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"

    async def failing(row: Row) -> Row:
        raise RowError("no") if row["prompt"] == "message 1" else Drop("not wanted")

    with pytest.raises(UserError, match="1 of 3 rows failed"):
        fill(path, 3, failing)
    with pytest.raises(UserError, match="seed was 1, now 2"):
        Rows(path, inputs(3), SETTINGS | {"seed": 2})
    fill(path, 3, settings=SETTINGS | {"seed": 2}, overwrite=True)
    assert len(lines(path)) == 3 and meta(path)["rows"] == {"in": 3, "kept": 3, "dropped": {}}


def test_a_file_without_its_meta_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"mine": 1}\n')
    with pytest.raises(UserError, match=r"without out.meta.json; move it away or use --overwrite"):
        Rows(path, inputs(2), SETTINGS)
    fill(path, 2, overwrite=True)
    assert len(lines(path)) == 2


def test_same_settings_do_nothing_and_a_larger_limit_adds(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, 4)
    seconds = meta(path)["seconds"]
    output = Rows(path, inputs(4), SETTINGS)
    assert output.complete and output.missing == []
    shorter = Rows(path, inputs(2), SETTINGS)
    assert shorter.complete and len(lines(path)) == 4
    seen: list[str] = []

    async def noting(row: Row) -> Row:
        seen.append(row["prompt"])
        return await plain(row)

    longer = fill(path, 7, noting)
    assert seen == ["message 4", "message 5", "message 6"]
    assert [row["prompt"] for row in lines(path)] == [row["prompt"] for row in inputs(7)]
    assert Rows(path, inputs(7), SETTINGS).complete and longer.describe().endswith("7 to do") is False
    assert meta(path)["seconds"] >= seconds and meta(path)["rows"]["in"] == 7
    fill(tmp_path / "at-once" / "out.jsonl", 7)
    assert path.read_bytes() == (tmp_path / "at-once" / "out.jsonl").read_bytes()


def test_rows_are_known_by_their_content(tmp_path: Path) -> None:
    twice = rows.identify([{"a": 1, "b": "x"}, {"b": "x", "a": 1}, {"a": 2, "b": "x"}])
    assert len(twice) == 3, "the same row again is a row of its own"
    assert list(rows.identify([{"a": 2, "b": "x"}])) == list(twice)[2:]
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in twice)
    with pytest.raises(UserError, match="no input rows"):
        Rows(tmp_path / "out.jsonl", [], SETTINGS)


def test_dropped_rows_are_counted_and_not_done_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    seen: list[str] = []

    async def work(row: Row) -> Row:
        seen.append(row["prompt"])
        number = int(row["prompt"].split()[-1])
        if number % 2:
            raise Drop("odd" if number < 5 else "odd and large")
        return await plain(row)

    fill(path, 6, work)
    assert [row["prompt"] for row in lines(path)] == ["message 0", "message 2", "message 4"]
    assert meta(path)["rows"] == {"in": 6, "kept": 3, "dropped": {"odd": 2, "odd and large": 1}}
    assert meta(path)["tokens"] == {"completion_tokens": 9}
    seen.clear()
    assert Rows(path, inputs(6), SETTINGS).complete
    fill(path, 8, work)
    assert seen == ["message 6", "message 7"]
    assert meta(path)["rows"] == {"in": 8, "kept": 4, "dropped": {"odd": 2, "odd and large": 2}}


def test_failed_rows_are_named_the_others_kept_and_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"

    async def flaky(row: Row) -> Row:
        if row["prompt"] in ("message 2", "message 5"):
            raise RowError("the server answered 500 six times")
        return await plain(row)

    with pytest.raises(UserError) as failure:
        fill(path, 7, flaky)
    message = str(failure.value)
    failed = [key for key, row in rows.identify(inputs(7)).items() if row["prompt"] in ("message 2", "message 5")]
    assert "2 of 7 rows failed" in message and all(key in message for key in failed)
    assert "the server answered 500 six times" in message and "run the same command" in message
    assert not path.exists() and len(lines(tmp_path / "out.partial.jsonl")) == 5
    with pytest.raises(UserError, match="is unfinished; run: make it"):
        rows.read(path, made_by="make it")
    seen: list[str] = []

    async def now(row: Row) -> Row:
        seen.append(row["prompt"])
        return await plain(row)

    fill(path, 7, now)
    assert sorted(seen) == ["message 2", "message 5"]
    assert [row["prompt"] for row in lines(path)] == [row["prompt"] for row in inputs(7)]


def test_text_that_no_utf8_can_hold_does_not_stop_a_step(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"

    async def odd(row: Row) -> Row:
        return {"response": "half a pair \ud83d, a line separator \u2028 and\nnewlines"}

    fill(path, 2, odd)
    read = rows.read(path, "response", made_by="")
    assert [row["response"] for row in read] == ["half a pair ?, a line separator \u2028 and\nnewlines"] * 2


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, 3)
    text = path.read_text().splitlines(keepends=True)
    path.write_text(text[0] + '{"prompt": "mine"}\n' + text[2])
    with pytest.raises(UserError, match=r"out.jsonl, line 2: not a row of this project"):
        Rows(path, inputs(3), SETTINGS)


def test_reading_a_finished_file_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match=r"out.jsonl does not exist; run: python -m this"):
        rows.read(path, made_by="python -m this")
    path.write_text("")
    with pytest.raises(UserError, match=r"is empty.*--overwrite"):
        rows.read(path, made_by="python -m this")
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "resp')
    with pytest.raises(UserError, match=r"line 2.*half written"):
        rows.read(path, made_by="x")
    path.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    with pytest.raises(UserError, match=r"line 2: no field 'prompt' \(it has: question\)"):
        rows.read(path, "prompt", made_by="x")
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        rows.read(path, "prompt", made_by="x")
    path.write_text('{"prompt": "a"}\n["b"]\n')
    with pytest.raises(UserError, match="line 2: expected a JSON object, found list"):
        rows.read(path, made_by="x")
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}')
    assert rows.read(path, "prompt", made_by="x") == [{"prompt": "a"}, {"prompt": "b"}]
    assert rows.settings_of(path) == {}


def test_writing_in_one_go(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "pairs.jsonl"
    assert rows.write(path, iter([{"a": 1}, {"a": "ü"}]), {"seed": 3}, {"too long": 4}) == 2
    assert lines(path) == [{"a": 1}, {"a": "ü"}] and rows.settings_of(path) == {"seed": 3}
    assert meta(path)["rows"] == {"in": 6, "kept": 2, "dropped": {"too long": 4}}
    before = path.read_bytes()

    def broken() -> Iterator[Row]:
        yield {"a": 1}
        raise UserError("the source ended")

    with pytest.raises(UserError, match="the source ended"):
        rows.write(path, broken(), {}, {})
    assert path.read_bytes() == before and {*path.parent.iterdir()} == {path.with_suffix(".meta.json"), path}


def test_the_meta_file_says_how_the_rows_were_made(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    output = Rows(path, inputs(2), SETTINGS)
    asyncio.run(output.fill(plain, info=lambda: {"engine": "Scripted", "notes": ["one"]}))
    found = meta(path)
    assert found["settings"] == SETTINGS and found["sealed"] is True
    assert found["info"] == {"engine": "Scripted", "notes": ["one"]}
    assert found["versions"]["python"] and found["started"] <= found["written"]
    assert found["git"] is None or len(found["git"].removesuffix("-dirty")) == 40


# Two writers.


def test_two_writers_at_once(tmp_path: Path, step: Callable[..., Any]) -> None:
    first = step("--rows", "60", "--pause", "0.3")
    wait_for_lines(tmp_path / "out.partial.jsonl", 3)
    code, _, err = ended(step("--rows", "60"))
    assert code == 2 and len(err) == 1 and "is being written by another process" in err[0]
    assert ended(first)[0] == 0
    assert len(lines(tmp_path / "out.jsonl")) == 60 - len(range(3, 60, 7))


def test_a_writer_that_waited_sees_what_the_other_has_done(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    late, other = Rows(path, inputs(4), SETTINGS), Rows(path, inputs(4), SETTINGS | {"seed": 2})
    fill(path, 4)
    before = path.read_bytes()

    async def never(row: Row) -> Row:
        raise AssertionError(row)

    asyncio.run(late.fill(never))
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="seed was 1, now 2"):
        asyncio.run(other.fill(never))
    assert path.read_bytes() == before


# Trouble with the machine.


def test_a_full_disk(tmp_path: Path, step: Callable[..., Any]) -> None:
    """On a real file system of a few KiB; where none may be mounted, the largest file is limited in its place."""
    size = ["--rows", "100", "--width", "1500"]
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)], check=False, capture_output=True
    ).returncode == 0  # fmt: skip
    try:
        code, _, err = ended(step(*size, *([] if mounted else ["--file-limit", "20000"]), folder=disk))
        assert code == 2 and len(err) == 1, err
        assert ("the disk is full" if mounted else "File too large") in err[0] and str(disk) in err[0]
        kept = lines(disk / "out.partial.jsonl")
        assert len(kept) > 5
        if mounted:
            # Room for the rows, but not for a second copy of them.
            subprocess.run(["mount", "-o", "remount,size=180k", str(disk)], check=True)
            code, _, err = ended(step(*size, folder=disk))
            assert code == 2 and len(err) == 1 and "free some space" in err[0], err
            assert len(lines(disk / "out.partial.jsonl")) == 100 and not (disk / "out.jsonl").exists()
            subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        log = tmp_path / "scripts" / "log"
        log.unlink()
        assert ended(step(*size, folder=disk))[0] == 0
        assert len(log.read_text().splitlines()) if not mounted else not log.read_text()
        assert ended(step(*size, folder=tmp_path / "ample"))[0] == 0
        assert (disk / "out.jsonl").read_bytes() == (tmp_path / "ample" / "out.jsonl").read_bytes()
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_file_that_may_grow_no_further(tmp_path: Path, step: Callable[..., Any]) -> None:
    code, _, err = ended(step("--rows", "100", "--width", "1500", "--file-limit", "20000"))
    assert code == 2 and len(err) == 1 and "cannot write" in err[0] and "File too large" in err[0]
    assert all("response" in row or "dropped" in row for row in lines(tmp_path / "out.partial.jsonl"))
    assert (tmp_path / "out.partial.jsonl").stat().st_size > 15_000
    assert ended(step("--rows", "100", "--width", "1500"))[0] == 0


def test_a_read_only_folder(tmp_path: Path, step: Callable[..., Any]) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    try:
        code, _, err = ended(step("--powerless", folder=folder))
        assert code == 2 and len(err) == 1 and str(folder) in err[0] and "Permission denied" in err[0]
    finally:
        folder.chmod(0o755)


def test_a_folder_below_a_file(tmp_path: Path, step: Callable[..., Any]) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, err = ended(step(folder=tmp_path / "file" / "deeper"))
    assert code == 2 and len(err) == 1 and f"{tmp_path}/file" in err[0]
    assert (tmp_path / "file").read_text() == "mine"


def test_ctrl_c_keeps_finished_rows(tmp_path: Path, step: Callable[..., Any]) -> None:
    process = step("--rows", "80", "--pause", "0.2")
    partial = tmp_path / "out.partial.jsonl"
    wait_for_lines(partial, 5)
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert code == 130 and len(err) == 1 and "run the same command to go on" in err[0]
    kept = partial.read_bytes()
    assert kept.count(b"\n") >= 5 and kept.endswith(b"}\n")
    (tmp_path / "scripts" / "log").unlink()
    assert ended(step("--rows", "80"))[0] == 0
    assert len((tmp_path / "scripts" / "log").read_text().splitlines()) == 80 - kept.count(b"\n")
    assert ended(step("--rows", "80", folder=tmp_path / "undisturbed"))[0] == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "undisturbed" / "out.jsonl").read_bytes()


def test_rows_that_fail_through_a_whole_step(tmp_path: Path, step: Callable[..., Any]) -> None:
    failing = tmp_path / "scripts" / "failing"
    failing.write_text("11 12")
    code, _, err = ended(step("--rows", "30"))
    assert code == 2 and len(err) == 1 and "2 of 30 rows failed" in err[0] and "the server answered 500" in err[0]
    failing.unlink()
    code, out, _ = ended(step("--rows", "30", "--dry-run"))
    assert code == 0 and "30 rows, 28 there, 2 to do" in out[0] and not (tmp_path / "out.jsonl").exists()
    assert ended(step("--rows", "30"))[0] == 0
    code, out, _ = ended(step("--rows", "30"))
    assert code == 0 and out == [f"{tmp_path}/out.jsonl: 30 rows, 30 there, 0 to do; complete"]


# Size.


def written(path: Path, count: int, width: int) -> None:
    """A sealed file of `count` rows with answers of `width` characters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for key, row in rows.identify(inputs(count)).items():
            file.write(json.dumps({"id": key, **row, "response": chance.choice("abc") * width}) + "\n")
    utils.write_json(path.with_suffix(".meta.json"), {"settings": SETTINGS, "sealed": True, "dropped": {}})


def test_a_hundred_thousand_long_rows_scan_in_two_seconds(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    written(path, 100_000, 4000)
    given = inputs(100_000)
    begun = resource.getrusage(resource.RUSAGE_SELF)
    output = Rows(path, given, SETTINGS)
    ended_at = resource.getrusage(resource.RUSAGE_SELF)
    assert output.complete
    seconds = ended_at.ru_utime + ended_at.ru_stime - begun.ru_utime - begun.ru_stime
    assert seconds <= 2, f"{seconds:.2f} s of CPU time"


def test_memory_does_not_grow_with_the_answers(tmp_path: Path) -> None:
    peaks = []
    for width in (100, 20_000):
        path = tmp_path / str(width) / "out.jsonl"
        written(path, 2000, width)
        # A shorter sealed file, a longer one wanted: scan, extend and seal.
        given = inputs(2002)
        tracemalloc.start()
        output = Rows(path, given, SETTINGS)
        asyncio.run(output.fill(plain))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(output.inputs) == 2002 and path.stat().st_size > 2000 * width
    assert peaks[1] - peaks[0] < 300_000, f"{peaks} bytes for answers of 0.2 and 40 MB in all"
