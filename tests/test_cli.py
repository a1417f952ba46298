"""Command lines: every script answers --help at once, and a mistake is one line and exit code 2."""

import ast
import os
import re
import resource
import subprocess
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

import pytest

from character import cli
from character.constants import ROOT

SCRIPTS = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "character").rglob("*.py")
    if any(
        isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
    )
)
# What takes seconds to import: the function that needs one of these imports it.
HEAVY = {"torch", "transformers", "vllm", "trl", "peft", "datasets", "sklearn", "matplotlib", "openai", "accelerate"}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | environment,
    )


def module(script: Path) -> str:
    return ".".join(script.with_suffix("").parts)


def test_scripts_are_found() -> None:
    names = {module(script) for script in SCRIPTS}
    assert {"character.run", "character.constitution"} <= names
    assert {f"character.distillation.{step}" for step in ("teacher", "student", "data", "train")} <= names


@pytest.mark.parametrize("script", SCRIPTS, ids=module)
def test_help_of_every_script(script: Path) -> None:
    by_module = run("-X", "importtime", "-m", module(script), "--help")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    by_path = run(str(script), "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (by_module.returncode, by_path.returncode) == (0, 0), by_module.stderr[-2000:] + by_path.stderr
    imported = {match[1] for match in re.finditer(r"\|\s+([\w.]+)$", by_module.stderr, re.MULTILINE)}
    assert "character.cli" in imported and not imported & HEAVY
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1, "seconds of CPU time"
    assert not by_path.stderr
    assert by_path.stdout.splitlines()[1:] == by_module.stdout.splitlines()[1:]
    first = ast.get_docstring(ast.parse((ROOT / script).read_text(encoding="utf-8")))
    assert first and " ".join(first.split()[:6]) in " ".join(by_path.stdout.split()), "it says what the script does"
    assert "(default: " in by_path.stdout or "check" in by_path.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=module)
def test_a_wrong_flag_is_one_line(script: Path) -> None:
    done = run("-m", module(script), "--no-such-flag", "1")
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"error: .*\(see --help\)\n", done.stderr), done.stderr


def test_shared_flags_mean_the_same_everywhere() -> None:
    """The same name, help and default, whatever the script; a script may only lack one."""
    shared = ("--limit", "--seed", "--overwrite", "--dry-run", "--engine", "--base-url", "--temperature", "--top-p")
    seen: dict[str, dict[str, str]] = {}
    for script in SCRIPTS:
        if module(script) in ("character.run", "character.constitution"):
            continue
        text = run(str(script), "--help", COLUMNS="500").stdout
        for name in shared:
            found = re.search(rf"^  {name}\b.*$", text, re.MULTILINE)
            if found:
                seen.setdefault(name, {})[module(script)] = found[0]
    assert seen.keys() == {*shared}
    for name, lines in seen.items():
        if name == "--seed":
            assert all("(default: 123456)" in line for line in lines.values())
        else:
            assert len({*lines.values()}) == 1, lines


# The parser and the guard.


@dataclass
class Args:
    """Flags of each kind."""

    word: str = cli.flag("a", "a word, 100%% of it")
    maybe: str | None = cli.flag(None, "a word or none")
    count: int | None = cli.flag(None, "a number or none")
    limit: int | None = cli.flag(None, "rows")
    share: float = cli.flag(0.5, "a share")
    on: bool = cli.flag(True, "on unless told otherwise")
    off: bool = cli.flag(False, "off unless asked for")
    kind: Literal["x", "y"] = cli.flag("x", "one of two")
    many: list[int] = cli.flag([1, 2], "numbers")
    path_to: Path = cli.flag(Path(), "a folder")


@dataclass
class Positional:
    """Positional and required ones."""

    command: Literal["check"] = cli.flag(MISSING, "what to do", positional=True)
    files: list[Path] = cli.flag(MISSING, "files", positional=True)


def test_defaults() -> None:
    assert cli.parse(Args, []) == Args()
    assert Args().many == [1, 2] and Args().many is not Args().many


def test_every_kind_of_flag() -> None:
    words = "--word b --maybe c --count 3 --limit 4 --share 0.25 --no-on --off --kind y --many 5 6 --path-to /tmp"
    expected = Args("b", "c", 3, 4, 0.25, False, True, "y", [5, 6], Path("/tmp"))
    assert cli.parse(Args, words.split()) == expected
    assert cli.parse(Positional, ["check", "a", "b"]) == Positional("check", [Path("a"), Path("b")])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--kind z", r"argument --kind: invalid choice: 'z' \(choose from '?x'?, '?y'?\)"),
        ("--share much", "argument --share: invalid float value: 'much'"),
        ("--limit 0", "argument --limit: '0' is not a number of rows from 1 up"),
        ("--limit -3", "argument --limit"),
        ("--wor b", "unrecognized arguments: --wor b"),
        ("stray", "unrecognized arguments: stray"),
        ("--word", "argument --word: expected one argument"),
    ],
)
def test_mistakes_are_one_line(words: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.parse(Args, words.split())
    assert end.value.code == 2
    assert re.fullmatch(rf"error: {part}.*\(see --help\)\n", capsys.readouterr().err)


def test_required_words(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["check"], ["chek", "a"]):
        with pytest.raises(SystemExit) as end:
            cli.parse(Positional, words)
        assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_help_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.parse(Args, ["--help"], "What it does.\n\n  python -m this")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "What it does. python -m this" in text and "100% of it (default: a)" in text
    assert "numbers (default: 1 2)" in text and "--path-to PATH_TO" in text


SCRIPT = """
import errno, os, signal, sys
from dataclasses import dataclass
from character import cli
from character.utils import UserError

@dataclass
class Args:
    what: str = cli.flag("nothing", "what happens")

def main(args):
    print("begun")
    if args.what == "mistake":
        raise UserError("the file x is broken;\\n  mend it")
    if args.what == "interrupt":
        raise KeyboardInterrupt
    if args.what == "background":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if args.what in ("terminate", "background"):
        os.kill(os.getpid(), signal.SIGTERM)
    if args.what == "pipe":
        for _ in range(100_000):
            print("line")
    if args.what == "folder":
        open("/proc/none/x", "w")
    if args.what == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if args.what == "bug":
        raise ZeroDivisionError

if __name__ == "__main__":
    cli.run(main, Args)
"""


INTERRUPTED = "error: interrupted; finished rows are kept, run the same command to go on\n"


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("nothing", 0, ""),
        ("mistake", 2, "error: the file x is broken; mend it\n"),
        ("interrupt", 130, INTERRUPTED),
        ("terminate", 130, INTERRUPTED),
        ("background", 130, INTERRUPTED),
        (
            "folder",
            2,
            "error: /proc/none/x: No such file or directory; free the disk or choose another folder in .env\n",
        ),
        ("full", 2, "error: the disk is full; free some space and run the same command to go on\n"),
    ],
)
def test_how_a_script_ends(what: str, code: int, message: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run(str(tmp_path / "script.py"), "--what", what)
    assert (done.returncode, done.stdout, done.stderr) == (code, "begun\n", message)


def test_a_bug_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run(str(tmp_path / "script.py"), "--what", "bug")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), "--what", "pipe"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
