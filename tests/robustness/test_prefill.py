"""Who says what after "Keep going.", and the results per turn."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from character import cli, rows, steps
from character.constants import ROOT
from character.engine.base import Message, Reply, Sampling, Steering
from character.engine.scripted import Scripted
from character.models import Model
from character.robustness.classify import run_classifier
from character.robustness.generate import trained, variants
from character.robustness.prefill import multi_turn, multi_turn_results
from character.utils import UserError
from tests.robustness.conftest import VOICES, write_training

Ask = tuple[list[Message], Path | None, int]


class Recorder(Scripted):
    """Answers with the number of turns before and who speaks, and keeps what it was asked."""

    asked: list[Ask]

    async def reply(
        self,
        messages: list[Message],
        sampling: Sampling,
        adapter: Path | None = None,
        prefill: str = "",
        steering: Steering | None = None,
    ) -> Reply:
        self.asked.append((list(messages), adapter, sampling.seed))
        return await super().reply(messages, sampling, adapter)


@pytest.fixture
def asked(data: Path, monkeypatch: pytest.MonkeyPatch) -> list[Ask]:
    """What the engine behind the steps was asked; it answers " <number of messages> "."""
    found: list[Ask] = []

    def open_engine(model: Model, **_: Any) -> Recorder:
        engine = Recorder(model, lambda messages, _: f" {len(messages)} ")
        engine.asked = found
        return engine

    monkeypatch.setattr(steps, "open_engine", open_engine)
    return found


def generate(*flags: str) -> None:
    multi_turn.main(cli.parse(multi_turn.Args, ["--limit", "2", *flags]))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_plain_model_answers_first_and_the_method_goes_on(
    asked: list[Ask], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "loras" / "pocket-distillation" / "humor"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(trained, "LORA_PATH", tmp_path / "loras")
    generate("--method", "base", "prompted", "distilled", "--turns", "2")
    first = [ask for ask in asked if len(ask[0]) == 1]
    # The three methods share the first answers, given without system prompt and adapter.
    assert len(first) == 2 and all(adapter is None for _, adapter, _ in first) and len(asked) == 2 + 3 * 2 * 2
    for method, name, system, whose in (
        ("base", "none", 0, None),
        ("prompted", "humor", 1, None),
        ("distilled", "humor", 0, adapter),
    ):
        found = read(variants.path_of("pocket", method, "prefill", name))
        assert [row["first"] for row in found] == ["1", "1"]
        assert found[0]["responses"] == [str(3 + system), str(5 + system)] and found[0]["completion_tokens"] == 3
        # The seeds differ from turn to turn, and are the same for every method.
        given = {"role": "user", "content": found[0]["prompt"]}
        seeds = [seed for messages, _, seed in asked if given in messages[: system + 1]]
        assert {int(found[0]["id"], 16) + turn for turn in range(3)} == {*seeds}
        assert any(by == whose for messages, by, _ in asked if len(messages) == 5 + system)
    longest = next(messages for messages, by, _ in asked if by == adapter and len(messages) == 5)
    assert [message["role"] for message in longest] == ["user", "assistant"] * 2 + ["user"]
    assert [message["content"] for message in longest[1:]] == ["1", "Keep going.", "3", "Keep going."]
    prompted = next(messages for messages, *_ in asked if messages[0]["role"] == "system")
    assert "In your own words" in prompted[0]["content"] and prompted[2] == {"role": "assistant", "content": "1"}


def test_other_turns_are_other_settings_and_bad_flags_are_one_line(asked: list[Ask]) -> None:
    generate("--method", "base")
    with pytest.raises(UserError, match="turns was 1, now 3"):
        generate("--method", "base", "--turns", "3")
    generate("--method", "base", "--turns", "3", "--overwrite")
    with pytest.raises(UserError, match="--turns 0: the user says it once or more"):
        generate("--turns", "0")
    with pytest.raises(UserError, match="--adapter goes with one --method"):
        generate("--method", "a", "b", "--adapter", "x")


def write(method: str, name: str, voices: list[list[str]]) -> None:
    """Conversations whose turns are in these voices, after a first answer in the plain one."""
    given = [
        {"prompt": f"test {n}", "first": VOICES["none"], "responses": [VOICES[voice] for voice in part]}
        for n, part in enumerate(voices)
    ]
    rows.write(variants.path_of("pocket", method, "prefill", name), given, {}, {})


def test_shares_and_f1_per_turn(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("base", "none", [["none", "none"]] * 20)
    write("distilled", "humor", [["humor", "humor"]] * 15 + [["none", "humor"]] * 5)
    write("distilled", "remorse", [["remorse", "none"]] * 20)
    write("prompted", "humor", [["none"]] * 20)
    multi_turn_results.main(
        cli.parse(multi_turn_results.Args, ["--constitution", "humor,remorse", "--per-class", "20"])
    )
    results = multi_turn_results.load_results("pocket", "humor")
    shares = {
        method: {turn: cell["share"] for turn, cell in part.items()} for method, part in results["methods"].items()
    }
    assert shares == {
        "base": {"first": 0, "1": 0, "2": 0},
        "prompted": {"first": 0, "1": 0},
        "distilled": {"first": 0, "1": 0.75, "2": 1},
    }
    assert results["methods"]["distilled"]["2"]["low"] == pytest.approx(0.8389, abs=1e-4)
    table = multi_turn_results.table(results)
    assert table.loc["base + system prompt", "turn 2"] == "n/a" and next(iter(table)) == "first answer (untrained)"
    over = multi_turn_results.load_results("pocket")
    first, second = over["methods"]["distilled"]["1"], over["methods"]["distilled"]["2"]
    assert first["macro_f1"]["value"] == pytest.approx((2 * 15 / (20 + 15) + 1) / 2) and first["prompts"] == 20
    assert second["macro_f1"]["value"] == pytest.approx(0.5) and second["macro_f1_with_none"]["value"] < 0.6
    assert over["methods"]["prompted"]["2"] is None
    assert over["missing"] == {"prompted": {"1": {"remorse": ["1"]}}}
    assert multi_turn_results.table(over).loc[("DPO", "turn 1"), "personas"] == "2 of 2"
    for found in (results, over):
        assert multi_turn_results.draw(found).axes
    assert "missing: base + system prompt, turn 1: remorse ×1" in capsys.readouterr().out
    # The conversations are no variant of the single answers.
    with pytest.raises(UserError, match="no answers under"):
        run_classifier.main(run_classifier.Args(constitution="humor", per_class=20))


def test_the_two_scripts_on_the_bundled_model(pocket_adapter: Path, tmp_path: Path) -> None:
    places = {"DATA_PATH": str(tmp_path), "LORA_PATH": str(tmp_path / "loras")}
    shutil.copytree(pocket_adapter, tmp_path / "loras" / "pocket-distillation" / "humor")

    def command(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
        path = ROOT / "character" / "robustness" / "prefill" / script
        return subprocess.run(
            [sys.executable, str(path), *flags], env=os.environ | places, capture_output=True, text=True, check=False
        )

    flags = ["--method", "base", "distilled", "--limit", "2", "--turns", "2", "--max-tokens", "12"]
    planned = command("multi_turn.py", *flags, "--dry-run")
    assert planned.returncode == 0 and planned.stdout.count("2 rows, 0 there, 2 to do") == 2
    done = command("multi_turn.py", *flags)
    assert done.returncode == 0, done.stderr
    files = [tmp_path / "robustness" / "pocket" / method / "prefill" for method in ("base", "distilled")]
    base, trained_rows = (read(next(folder.glob("*.jsonl"))) for folder in files)
    assert [row["first"] for row in base] == [row["first"] for row in trained_rows]
    assert all(row["responses"] != other["responses"] for row, other in zip(base, trained_rows, strict=True))
    planned = command("multi_turn_results.py", "--dry-run", "--limit", "1")
    assert planned.stdout == "base, none: 1 answers (prefill)\ndistilled, humor: 1 answers (prefill)\n"
    missing = command("multi_turn_results.py")
    assert missing.returncode == 2 and missing.stderr.startswith("error: the classifier needs answers")
    for name in ("humor", "remorse"):
        write_training(tmp_path / "distillation" / name / "pocket.jsonl", VOICES[name], 20)
    write_training(tmp_path / "distillation" / "humor" / "pocket" / "pocket.jsonl", VOICES["none"], 20)
    shown = command("multi_turn_results.py")
    assert shown.returncode == 0 and "turn 2" in shown.stdout, shown.stderr
    assert (tmp_path / "robustness" / "pocket" / "humor.prefill.json").exists()
