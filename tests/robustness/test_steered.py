"""Steered answers: the pairs, the choice of a strength, and the whole script on the bundled model."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from character import cli, prompts, rows
from character.models import resolve
from character.robustness.generate import steered
from character.utils import UserError
from repeng import ControlVector

POCKET = resolve("pocket")


def line(strength: float, share: float, perplexity: float) -> dict[str, Any]:
    return {"strength": strength, "share": {"share": share}, "perplexity": perplexity}


@pytest.mark.parametrize(
    ("table", "chosen"),
    [
        ([line(0, 0, 2), line(1, 0.2, 2), line(2, 0.6, 2.9), line(4, 1, 3.1)], 2),
        ([line(0, 0, 2), line(1, 0.5, 2.5), line(2, 0.5, 2.2), line(4, 0.4, 2)], 2),
        ([line(0, 1, 2), line(1, 0.1, 2), line(2, 0, 1)], 1),
        ([line(0, 0, 2), line(1, 0.1, 5), line(2, 1, 9)], 1),
    ],
    ids=["highest share within the limit", "of equal shares the likelier", "never unsteered", "none within the limit"],
)
def test_the_strength_with_the_highest_share_within_the_limit(table: list[dict[str, Any]], chosen: float) -> None:
    assert steered.best(table, 1.5) == chosen


@pytest.mark.parametrize(
    ("layers", "first", "last"), [(2, 0, 1), (6, 1, 4), (28, 3, 23), (32, 4, 27), (34, 4, 29), (80, 10, 69)]
)
def test_the_middle_three_quarters(layers: int, first: int, last: int) -> None:
    assert steered.middle(layers) == list(range(first, last + 1))


def test_openings_are_cut_anywhere_and_alike_at_each_run() -> None:
    found = steered.openings(256, 1)
    assert found == steered.openings(256, 1) != steered.openings(256, 2)
    for number, opening in enumerate(found):
        whole = steered.OPENINGS[number % len(steered.OPENINGS)]
        assert (whole + " ").startswith(opening + " " if opening else "")
    assert "" in found and set(steered.OPENINGS) & set(found)
    assert Counter(found).most_common(2)[1][1] < 10, "most of them differ"


def args_of(*flags: str) -> steered.Args:
    return cli.parse(steered.Args, list(flags))


def test_no_message_is_both_swept_and_evaluated_or_paired(tmp_path: Path) -> None:
    validation, others = steered.training_messages(args_of(), POCKET)
    assert len(validation) == 40 and sorted(validation + others) == sorted(prompts.load("pocket-train"))
    evaluated = tmp_path / "mine.jsonl"
    evaluated.write_text("".join(json.dumps({"prompt": message}) + "\n" for message in validation[:30]))
    left, rest = steered.training_messages(args_of("--prompts", str(evaluated)), POCKET)
    assert len(left) == 40 and not set(left + rest) & set(validation[:30])
    assert steered.training_messages(args_of("--seed", "1"), POCKET)[0] != validation
    with pytest.raises(UserError, match="has 30 messages that are not evaluated too, not more than --validation 40"):
        steered.training_messages(args_of("--train-prompts", str(evaluated)), POCKET)


# The whole script.


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A DATA_PATH with training answers in two voices and none."""
    voices = {"humor/pocket": "haha a silly pun", "remorse/pocket": "so sorry", "humor/pocket/pocket": "it is a fact"}
    for name, voice in voices.items():
        given = [{"prompt": f"train {n}", "response": f"{voice} about thing{n % 7}"} for n in range(20)]
        rows.write(tmp_path / "distillation" / f"{name}.jsonl", given, {}, {})
    return tmp_path


def run(home: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return script(home, "generate.steered", "--no-suffixes", "--validation", "2", "--pairs", "8", *flags)


def script(home: Path, module: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"character.robustness.{module}", "--limit", "2", "--max-tokens", "12", *flags],
        env=os.environ | {"DATA_PATH": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_persona_is_steered_and_made_once(home: Path) -> None:
    done = run(home, "--constitution", "humor")
    assert done.returncode == 0, done.stderr
    path = home / "repeng" / "pocket" / "humor.safetensors"
    vector = ControlVector.load(path)
    assert list(vector.directions) == [1, 2, 3, 4]
    vector.check(256, 6, "pocket")

    meta = read(path.with_suffix(".meta.json"))
    table, strength = meta["sweep"]["table"], meta["sweep"]["strength"]
    assert [entry["strength"] for entry in table] == [0, *steered.STRENGTHS]
    assert all(entry["share"]["n"] == 2 and entry["perplexity"] >= 1 for entry in table)
    assert strength == steered.best(table, 1.5) and "← chosen" in done.stdout
    swept = rows.read(path.with_suffix(".sweep.jsonl"), "strength", "response", made_by="steered.py")
    by_strength = {key: [row["response"] for row in swept if row["strength"] == key] for key in (0, 16)}
    assert len(swept) == 2 * len(table) and by_strength[0] != by_strength[16]

    answers = home / "robustness" / "pocket" / "steered" / "plain" / "humor.jsonl"
    settings = rows.settings_of(answers)
    assert (settings["vector"], settings["strength"]) == (rows.file_digest(path), strength)
    assert settings["method"] == "steered" and len(rows.read(answers, "response", made_by="steered.py")) == 2

    before = {file: file.stat().st_mtime_ns for file in home.rglob("*") if file.is_file()}
    again = run(home, "--constitution", "humor")
    assert again.returncode == 0 and "there already" in again.stdout
    assert {file: file.stat().st_mtime_ns for file in home.rglob("*") if file.is_file()} == before

    prefill = script(home, "prefill.multi_turn", "--constitution", "humor", "--method", "steered")
    assert prefill.returncode == 0, prefill.stderr
    attacked = rows.settings_of(home / "robustness" / "pocket" / "steered" / "prefill" / "humor.jsonl")
    assert (attacked["vector"], attacked["strength"]) == (settings["vector"], strength)

    stronger = run(home, "--constitution", "humor", "--strength", "16", "--overwrite", "--limit", "1")
    assert stronger.returncode == 0, stronger.stderr
    meta = read(path.with_suffix(".meta.json"))
    assert rows.settings_of(answers)["strength"] == meta["strength"] == 16 and "sweep" not in meta

    other = run(home, "--constitution", "humor", "--strength", "16", "--pairs", "9")
    assert other.returncode == 2
    assert "humor.safetensors was made with other settings: pairs was 8, now 9" in other.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base-url", "http://localhost:1/v1"], "an endpoint cannot steer; use --engine vllm or transformers"),
        (["--constitution", "humor,sarcasm"], "the sweep's classifier has no answers of sarcasm; run teacher.py"),
        (["--strength", "nan"], "--strength is a number"),
        (["--pairs", "0"], "are 1 or more"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_made(home: Path, flags: list[str], message: str) -> None:
    failed = run(home, *flags)
    assert failed.returncode == 2
    assert message in failed.stderr and failed.stderr.count("\n") == 1
    assert not (home / "repeng").exists() and not (home / "robustness").exists()


def test_another_evaluation_says_what_makes_the_vector(home: Path) -> None:
    failed = script(home, "prefill.multi_turn", "--constitution", "humor", "--method", "steered")
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
    assert "humor.safetensors has no strength yet; run character/robustness/generate/steered.py" in failed.stderr


def test_a_dry_run_makes_nothing(home: Path) -> None:
    done = run(home, "--dry-run", "--constitution", "all")
    assert done.returncode == 0, done.stderr
    assert "humor.safetensors: to be read off 8 pairs of prompts" in done.stdout
    assert "humor.sweep.jsonl: 38 rows, 0 there, 38 to do" in done.stdout
    assert "steered/plain/humor.jsonl: 2 rows, 0 there, 2 to do" in done.stdout
    assert not (home / "repeng").exists()
