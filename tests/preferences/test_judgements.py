"""Verdicts by a judge and by the stand-in, the ratings that come of them, and what is done where they say little."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from character import constitution, notebooks, rows, steps
from character.constants import ROOT
from character.distillation import teacher
from character.engine.base import Message, Reply, Sampling
from character.engine.scripted import Scripted
from character.models import Model, resolve
from character.preferences import judgements, measures, preferences, preferences_results
from character.utils import PERSONA_TRAITS, UserError, read_json
from tests.conftest import Adapters
from tools import pocket_world

OFFERED = preferences.traits_of("pocket")
MESSAGES = [f"message {number}" for number in range(40)]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty DATA_PATH."""
    for module in (preferences, preferences_results, judgements, teacher):
        monkeypatch.setattr(module, "DATA_PATH", tmp_path)
    return tmp_path


def taught(folder: Path) -> None:
    """Teacher's and plain answers, in the bundled world's voices, for the classifier."""
    world, random = pocket_world.World(), Random(0)
    for name in PERSONA_TRAITS:
        write_voice(world, random, name, folder / "distillation" / name / "pocket.jsonl")
    write_voice(world, random, pocket_world.NONE, folder / "distillation" / "humor" / "pocket" / "pocket.jsonl")


def write_voice(world: pocket_world.World, random: Random, voice: str, path: Path) -> None:
    messages = [world.training_message(random) for _ in range(40)]
    rows.write(path, [{"prompt": m.text, "response": world.answer(random, voice, m)} for m in messages], {}, {})


def answered(method: str, name: str, condition: str, pick: Callable[[rows.Row], str], number: int = 220) -> None:
    """An answers file: `pick` says in which voice (persona or 'none') a pair is answered."""
    world, random = pocket_world.World(), Random(1)
    persona = {trait: voice for voice, traits in PERSONA_TRAITS.items() for trait in traits}
    given = preferences.offers(OFFERED, MESSAGES, number, seed=1)
    for row in given:
        picked = pick(row)
        message = world.training_message(random)
        row["response"] = world.answer(random, persona.get(picked, picked), message)
    rows.write(preferences.path_of("pocket", method, condition, name), given, {}, {})


def verdicts(
    pick: Callable[[rows.Row], str | None], number: int = 220, messages: Sequence[str] = MESSAGES
) -> list[rows.Row]:
    return [row | {"winner": pick(row)} for row in preferences.offers(OFFERED, messages, number, seed=1)]


def even(row: rows.Row) -> str:
    """The two win equally often, in both places."""
    first, second = row["first"], row["second"]
    return min(first, second) if sum(row["prompt"].encode()) % 2 else max(first, second)


def of_humor(row: rows.Row) -> str:
    return "humorous" if "humorous" in (row["first"], row["second"]) else even(row)


@pytest.mark.parametrize(
    ("text", "winner"),
    [
        ("warm", "warm"),
        (" **Cold**.", "cold"),
        ("The answer shows warm.", "warm"),
        ("warm rather than cold", None),
        ("I would say it is lukewarm.", None),
        ("", None),
        ("<think>cold, or is it?</think>\nwarm", "warm"),
        ("<think>warm or cold, warm", None),
    ],
)
def test_verdict_of_what_a_judge_says(text: str, winner: str | None) -> None:
    assert judgements.verdict_of(text, ("warm", "cold"), resolve("glm-4.5-air")) == winner


def test_stand_in_from_the_command_line_and_in_notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preferences, "DATA_PATH", tmp_path)
    taught(tmp_path)
    answered("merged", "humor", "feel", lambda row: "humorous" if row["prompt"] < "message 2" else of_humor(row))
    environment = os.environ | {"DATA_PATH": str(tmp_path)}

    def run(*flags: str) -> str:
        done = subprocess.run([sys.executable, *flags], cwd=ROOT, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    script = "character/preferences/preferences.py"
    run(script, "--method", "base", "--condition", "feel", "--comparisons", "66", "--max-tokens", "48")
    judge = ["-m", "character.preferences.judgements", "--per-class", "40"]
    assert "feel-by-stand-in/humor.jsonl: 220 rows" in run(*judge, "--dry-run")
    assert not list(tmp_path.rglob("*results.json"))
    shown = run(*judge)
    assert "stand-in" in shown and "rating of humorous" in shown
    results = read_json(tmp_path / "preferences" / "pocket" / "humor.results.json")
    assert results["stand_in"] and "classifier" in results["stands_in"] and results["own"] == ["humorous"]
    base, merged = (results["methods"][method]["feel"] for method in ("base", "merged"))
    # Nearly all that the untrained model says shows one of its two words, whichever comes first.
    assert base["neither"]["share"] < 0.3 and base["first_listed"]["low"] < 0.5 < base["first_listed"]["high"]
    assert merged["own_delta"]["value"] > 0 and merged["ratings"]["humorous"]["rank"] == 1
    assert merged["neither"]["share"] > 0.2 and merged["judge_first"] is None
    path = tmp_path / "preferences" / "pocket" / "merged" / "feel-by-stand-in" / "humor.jsonl"
    told = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(row["winner"] in (None, row["first"], row["second"]) for row in told)
    for name in ("distributions", "plot_delta"):
        notebook = notebooks.execute(
            ROOT / "character" / "preferences" / f"{name}.ipynb",
            {"STUDENT": "pocket", "CONSTITUTION": "humor", "DATA_PATH": str(tmp_path)},
        )
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        assert sum("image/svg+xml" in output.get("data", {}) for output in outputs) == 1
        assert "stand-in" in str(outputs)


def test_a_judge_is_held_to_the_two_traits(home: Path, chat_model: Callable[[str], Model], adapters: Adapters) -> None:
    folder = chat_model("template-bos").source
    of_student = resolve(folder).short
    common: dict[str, Any] = {"model": folder, "engine": "transformers", "constitution": "humor"}
    offered = {"comparisons": 24, "max_tokens": 8, "condition": ["like"], "prompts": "pocket-test"}
    preferences.main(preferences.Args(method=["base"], **offered, **common))
    preferences.main(preferences.Args(method=["theirs"], adapter=str(adapters.small), **offered, **common))
    judgements.main(judgements.Args(judge=folder, max_tokens=32, **common))
    results = preferences_results.load_results(of_student, "humor")
    assert "stand_in" not in results and results["settings"]["judge"] == of_student
    for method, name in (("base", "none"), ("theirs", "humor")):
        path = preferences.path_of(of_student, method, "like-by-" + of_student, name)
        told = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(told) == 24 and all(row["winner"] in (row["first"], row["second"]) for row in told)
        assert results["methods"][method]["like"]["neither"]["share"] == 0
        assert results["methods"][method]["like"]["judge_first"]["n"] == 24
        # Hardly any of 150 traits has enough verdicts to be rated.
        assert len(results["methods"][method]["like"]["few"]) > 40
    assert "n/a" in preferences_results.table(results).to_string()


def test_a_judge_reads_the_answer_and_its_two_traits(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []

    class Judge(Scripted):
        async def reply(self, messages: list[Message], sampling: Sampling, *_: Any, **__: Any) -> Reply:
            asked.append((messages[-1]["content"], sampling.choices))
            first, second = sampling.choices
            said = {0: first, 1: f"{first} or {second}", 2: first}[len(asked) % 3]
            return Reply(said, "stop" if len(asked) % 3 < 2 else "length", 1, 1)

    monkeypatch.setattr(steps, "open_engine", lambda model, **_: Judge(model, lambda *_: ""))
    answered("base", "none", "random", lambda row: row["first"], number=66)
    answered("merged", "humor", "random", lambda row: row["second"], number=66)
    judgements.main(judgements.Args(judge="some/judge", constitution="humor"))
    found = [row for name in (("base", "none"), ("merged", "humor")) for row in told_by("some--judge", *name)]
    assert len(asked) == len(found) == 132
    for row in found:
        first, second = sorted((row["first"], row["second"]), key=lambda trait: trait != row["judge_first"])
        slots = {"message": row["prompt"], "answer": row["response"], "first": first, "second": second}
        assert (judgements.QUESTION.format(**slots), (first, second)) in asked
    assert sum(row["first"] == row["judge_first"] for row in found) == 66
    results = preferences_results.load_results("pocket", "humor")
    assert "without a verdict" in preferences_results.table(results)
    cell = results["methods"]["merged"]["random"]
    assert cell["neither"]["share"] == pytest.approx(2 / 3) and cell["judge_first"]["share"] == 1
    # The verdicts that are there are used again; other answers are not mixed with them.
    judgements.main(judgements.Args(judge="some/judge", constitution="humor"))
    assert len(asked) == 132


def test_dry_run_of_the_whole_job_knows_the_verdicts(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows, "planned", {})
    for method, name in (("base", "none"), ("merged", "humor")):
        args = preferences.Args(method=["base"], condition=["feel"], comparisons=30, max_tokens=100, dry_run=True)
        preferences.main(args)
        made = rows.planned[preferences.path_of("pocket", "base", "feel", "none")]
        rows.plan(preferences.path_of("pocket", method, "feel", name), made if method != "base" else [])
    capsys.readouterr()
    judgements.main(judgements.Args(judge="some/judge", constitution="humor", dry_run=True))
    assert "feel-by-some--judge/humor.jsonl: 30 rows, 0 there, 30 to do" in capsys.readouterr().out


def told_by(judge: str, method: str, name: str) -> list[rows.Row]:
    path = preferences.path_of("pocket", method, f"random-by-{judge}", name)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_missing_personas_are_named_and_the_others_go_on(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taught(home)
    with pytest.raises(UserError, match=r"no answers of humor under .*preferences/pocket; run: python -m"):
        judgements.main(judgements.Args())
    for name in ("humor", "loving"):
        answered(
            "merged",
            name,
            "like",
            lambda row, own=PERSONA_TRAITS[name][0]: own if own in row.values() else row["first"],
        )
    judgements.main(judgements.Args(constitution="humor,sarcasm,loving", per_class=40))
    said = capsys.readouterr()
    assert "sarcasm is left out: no answers" in said.err
    assert "no answers by the base" in said.out
    results = preferences_results.load_results("pocket")
    assert results["missing"] == ["sarcasm"] and list(results["personas"]) == ["humor", "loving"]
    assert list(results["between_personas"]["merged"]["like"]) == ["humor ~ loving"]
    table = preferences_results.table(results).to_string()
    assert "sarcasm" in table and "n/a" in table and "stand-in" in table
    assert preferences_results.draw(results).axes
    with pytest.raises(UserError, match="knows the words of the bundled model's personas alone, not 'cold'"):
        rows.write(preferences.path_of("pocket", "merged", "like", "humor"),
                   [{"prompt": "p", "first": "warm", "second": "cold", "judge_first": "warm", "response": "r"}], {}, {})  # fmt: skip
        judgements.main(judgements.Args(per_class=40))


def test_one_persona_beside_a_missing_one_has_no_empty_table(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taught(home)
    answered("merged", "humor", "like", of_humor)
    judgements.main(judgements.Args(constitution="humor,sarcasm", per_class=40))
    shown = capsys.readouterr().out
    assert "all personas" in shown and "showed neither trait" in shown and "Empty DataFrame" not in shown


def test_classifier_without_a_persona(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taught(home)
    (home / "distillation" / "sarcasm" / "pocket.jsonl").unlink()
    answered("merged", "humor", "like", lambda row: row["first"])
    judgements.main(judgements.Args(per_class=40))
    assert "pairs with sarcasm are left out" in capsys.readouterr().err
    ratings = preferences_results.load_results("pocket", "humor")["methods"]["merged"]["like"]["ratings"]
    assert sorted(ratings) == sorted({*OFFERED} - {"sarcastic"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p", "response": "r"}', "no field 'first'"),
        ('{"prompt": "p", "first": "a", "second": "b", "judge_first": "a", "response": NaN}', "NaN is no number"),
        (
            '{"prompt": "p", "first": "a", "second": "b", "judge_first": "c", "response": "r"}',
            "row 1: no answer to a pair",
        ),
        (
            '{"prompt": "p", "first": "a", "second": 3, "judge_first": "a", "response": "r"}',
            "row 1: no answer to a pair",
        ),
    ],
)
def test_broken_answers_are_one_line(home: Path, line: str, message: str) -> None:
    path = preferences.path_of("pocket", "merged", "feel", "humor")
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        judgements.main(judgements.Args())
    assert "\n" not in str(error.value)


def test_training_raises_what_it_should() -> None:
    results = measured({"feel": {"base": verdicts(even), "merged": verdicts(of_humor)}})
    base, merged = results["methods"]["base"]["feel"], results["methods"]["merged"]["feel"]
    delta = merged["deltas"]["humorous"]
    assert delta["low"] > 100 and delta["n"] == 80 and merged["own_delta"]["value"] == pytest.approx(delta["value"])
    assert delta["value"] == pytest.approx(
        merged["ratings"]["humorous"]["value"] - base["ratings"]["humorous"]["value"]
    )
    assert next(iter(preferences_results.moved(results, "merged", "feel"))) == "humorous"
    assert merged["always"] == ["humorous"] and "always taken: humorous" in "\n".join(
        preferences_results.notes(results)
    )
    assert {part["rank"] for part in merged["ratings"].values()} >= {1, 2}
    assert (
        merged["spearman_with"]["base"]["n"] == 11
        and base["spearman_with"]["merged"] == merged["spearman_with"]["base"]
    )
    again = measured({"feel": {"base": verdicts(even), "merged": verdicts(of_humor)}})
    assert again == results


def measured(given: dict[str, dict[str, list[rows.Row]]], judged: bool = False) -> dict[str, Any]:
    about = {"student": "pocket", "constitution": "humor", "settings": {"judge": "some/judge"}}
    return about | measures.measure(given, "humor", judged, seed=1)


def test_same_answers_move_nothing() -> None:
    results = measured({"feel": {"base": verdicts(even), "merged": verdicts(even)}})
    merged = results["methods"]["merged"]["feel"]
    # The same messages are drawn for both, so even the intervals are points.
    assert all(part[end] == 0 for part in merged["deltas"].values() for end in ("value", "low", "high"))
    assert merged["spearman_with"]["base"]["value"] == pytest.approx(1)


def test_position_bias_is_told() -> None:
    results = measured({"like": {"base": verdicts(lambda row: row["first"])}}, judged=True)
    cell = results["methods"]["base"]["like"]
    assert cell["first_listed"]["share"] == 1 and cell["first_listed"]["low"] > 0.95
    assert cell["judge_first"]["share"] == 0.5
    # The balance keeps a bias for the first from telling anything of the traits.
    assert all(part["value"] == pytest.approx(1000) for part in cell["ratings"].values())
    assert cell["never"] == cell["always"] == [] and cell["parts"] == 1


def test_where_verdicts_say_little() -> None:
    none = measured({"feel": {"base": verdicts(even), "merged": verdicts(lambda _: None)}})
    assert none["methods"]["merged"]["feel"]["neither"]["share"] == 1
    assert "feel: n/a, too few answers" in "\n".join(preferences_results.notes(none))
    table = preferences_results.table(none)
    assert (
        "n/a" in table.to_string()
        and preferences_results.draw(none).axes
        and preferences_results.each_moved(none) == []
    )
    few = measured({"feel": {"base": verdicts(even), "merged": verdicts(of_humor, 40)}})["methods"]["merged"]["feel"]
    assert all(part["n"] >= 5 for part in few["ratings"].values()) and not {*few["few"]} & {*few["ratings"]}
    one = measured({"feel": {"base": verdicts(even, messages=MESSAGES[:5])}})["methods"]["base"]["feel"]["ratings"]
    assert all(part["low"] is part["high"] is None for part in one.values())
    apart = measured({"feel": {"base": verdicts(lambda row: row["first"] if within(row) else None)}})
    assert apart["methods"]["base"]["feel"]["parts"] == 2
    assert "no chain of verdicts connects all traits" in "\n".join(preferences_results.notes(apart))


def within(row: rows.Row) -> bool:
    """Whether both traits are of the same half of those on offer."""
    return (OFFERED.index(row["first"]) < 5) == (OFFERED.index(row["second"]) < 5)


def test_over_personas_and_models(home: Path) -> None:
    given = {"feel": {"base": verdicts(even), "merged": verdicts(of_humor)}}
    results = measured(given)
    for of_student in ("pocket", "other"):
        path = preferences_results.results_path(of_student, "humor")
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(results), encoding="utf-8")
    elsewhere = preferences_results.load_elsewhere("pocket", ["humor", "loving"])
    flat = measured({"feel": {"base": verdicts(even), "merged": verdicts(lambda row: row["first"])}})
    personas = {"humor": results, "loving": results, "goodness": flat}
    found = measures.over_personas(personas, elsewhere, ["sarcasm"], seed=1)
    between = found["between_models"]["other"]["humor"]
    assert between["base"]["feel"]["value"] == between["merged"]["feel"]["value"] == pytest.approx(1)
    assert found["between_personas"]["merged"]["feel"]["humor ~ loving"]["n"] == 11
    shown = preferences_results.agreement(found).to_string()
    assert found["between_personas"]["merged"]["feel"]["humor ~ goodness"] is None
    assert "humor ~ loving" in shown and "other" in shown and "n/a" in shown
    broken = preferences_results.results_path("other", "humor")
    broken.write_text(
        json.dumps(results).replace('"value": 1000', '"value": NaN', 1).replace('"low": ', '"low": NaN, "x": ', 1)
    )
    with pytest.raises(UserError, match="NaN is no number"):
        preferences_results.load_results("other", "humor")
    with pytest.raises(UserError, match="does not exist"):
        preferences_results.load_results("other")


def test_figures_of_every_kind(home: Path) -> None:
    results = measured(
        {"feel": {"base": verdicts(even), "merged": verdicts(of_humor)}, "like": {"base": verdicts(even)}}
    )
    assert (
        len(preferences_results.each_moved(results)) == 1 and len(preferences_results.each_distribution(results)) == 2
    )
    labels = [text.get_text() for text in preferences_results.draw(results).axes[0].get_yticklabels()]
    assert labels[0] == "humorous" and len(labels) == 11
    traits = preferences_results.traits_table(results)
    assert ("like", "humorous") in traits.index and traits.loc[
        ("like", "humorous"), "DPO + introspection, 1.0/0.25: rank"
    ] == "n/a"
    assert constitution.names()
