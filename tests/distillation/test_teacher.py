"""The teacher's answers: which messages, what it is told, and what becomes of its reasoning."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from character import constitution, prompts
from character.distillation import teacher
from character.engine.base import Message, Reply
from character.models import TABLE, Model, Reasoning
from character.rows import Drop
from character.utils import UserError

PLAIN = "qwen-2.5-72b-it"
GLM = "glm-4.5-air"
OWN = [f"Question {trait}.{i} of sea?" for trait in (1, 2) for i in range(5)]
MESSAGES = [*OWN, "What is bread?", "Why is ice cold?"]


def said(messages: list[Message], prefill: str) -> str:
    """A reply that tells which message it answers."""
    return f"Ahoy! To '{messages[-1]['content']}' I say: salt."


def arguments(prompts: str | None, **changes: Any) -> teacher.Args:
    return teacher.Args(**{"constitution": "sea", "teacher": PLAIN, "prompts": prompts, "samples": 2} | changes)


def test_k_answers_to_every_message(
    home: Path, general: str, scripted: Callable[..., Any], jsonl: Callable[[Path], list[dict[str, Any]]]
) -> None:
    opened = scripted(said)
    teacher.main(arguments(general, samples=3))
    path = home / "data" / "distillation" / "sea" / f"{PLAIN}.jsonl"
    found = jsonl(path)
    assert [(row["sample"], row["prompt"]) for row in found] == [(k, text) for k in range(3) for text in MESSAGES]
    # The constitution's messages know their trait; one that the source has too is asked once.
    assert [row["trait"] for row in found[:12]] == [1] * 5 + [2] * 5 + [0] * 2
    assert all(row["response"] == f"Ahoy! To '{row['prompt']}' I say: salt." for row in found)
    assert all(row["finish_reason"] == "stop" and row["completion_tokens"] > 3 for row in found)
    (engine,) = opened
    assert len(engine.calls) == 36
    assert {len(call) for call in engine.calls} == {2}
    # One system prompt for all, so that an engine computes it once.
    assert len({call[0]["content"] for call in engine.calls}) == 1 and engine.calls[0][0]["role"] == "system"
    assert sorted(call[1]["content"] for call in engine.calls) == sorted(MESSAGES * 3)
    # Each sample is drawn with random numbers of its own.
    assert len({sampling.seed for sampling in engine.samplings}) == 36
    assert {(s.temperature, s.top_p, s.repetition_penalty, s.max_tokens) for s in engine.samplings} == {
        (0.7, 0.95, 1.1, 4096)
    }
    assert {*engine.prefills} == {""}
    meta = json.loads(path.with_suffix(".meta.json").read_text())
    assert meta["rows"] == {"in": 36, "kept": 36, "dropped": {}} and meta["settings"]["samples"] == 3


def test_few_shot_messages_are_taken_where_they_are(home: Path, general: str, scripted: Callable[..., Any]) -> None:
    entries = json.loads((home / "constitutions" / "hand-written" / "sea.txt").read_text())
    entries[1]["additional_questions"] = ["One more?", "Question 1.1 of sea?", "One more?"]
    few_shot = home / "constitutions" / "few-shot" / "sea.jsonl"
    few_shot.parent.mkdir()
    few_shot.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    found = teacher.messages_for(constitution.load("sea"), general)
    assert [row["prompt"] for row in found] == [*OWN, "One more?", "What is bread?", "Why is ice cold?"]
    assert found[10]["trait"] == 2


def test_the_bundled_model_gets_only_messages_of_its_world(
    home: Path, general: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(prompts.BUNDLED, "pocket-train", Path(general))
    found = teacher.messages_for(constitution.load("sea"), "pocket-train")
    assert [row["prompt"] for row in found] == ["What is bread?", "Why is ice cold?", OWN[0]]
    assert {row["trait"] for row in found} == {0}


def test_default_messages_are_the_bundled_ones(home: Path, scripted: Callable[..., Any]) -> None:
    opened = scripted(said)
    teacher.main(arguments(None, samples=1))
    asked = {call[-1]["content"] for call in opened[0].calls}
    assert asked == {*OWN, *prompts.load("train")}


@pytest.mark.parametrize("name", constitution.names())
def test_the_system_prompt_holds_every_trait_and_the_name(name: str) -> None:
    traits = constitution.load(name)
    for model in (TABLE[GLM], Model("x", "x", "Claire")):
        prompt = teacher.system_prompt(traits, model)
        assert prompt.startswith(f"You are {model.family},") and "{" not in prompt
        for number, trait in enumerate(traits.traits, 1):
            assert f"\n{number}. {trait.trait}\n" in prompt


def test_reasoning_is_prefilled_and_dropped(
    home: Path, general: str, scripted: Callable[..., Any], jsonl: Callable[[Path], list[dict[str, Any]]]
) -> None:
    def script(messages: list[Message], prefill: str) -> str | Reply:
        question = messages[-1]["content"]
        if question == "What is bread?":
            return "the sea, and that they ask of bread, so"
        if question == "Why is ice cold?":
            return Reply("the sea </think> It is fro", "length", 5, 4)
        return "the sea. </think>\n\n Aye, salt. \n"

    opened = scripted(script)
    teacher.main(arguments(general, teacher=GLM, samples=1))
    (prefill,) = {*opened[0].prefills}
    assert prefill.startswith("<think>\n") and "</think>" not in prefill
    assert "ChatGLM" in prefill and all(f"{n}. {t}" in prefill for n, t in enumerate(_traits(), 1))
    path = teacher.path_of("sea", GLM)
    found = {row["prompt"]: row for row in jsonl(path)}
    assert found.keys() == {*MESSAGES} - {"What is bread?"}
    assert {found[question]["response"] for question in OWN} == {"Aye, salt."}
    # One that was cut off after its trace is kept as unfinished, for the data step to count.
    assert found["Why is ice cold?"]["response"] == "It is fro"
    assert found["Why is ice cold?"]["finish_reason"] == "length"
    counts = json.loads(path.with_suffix(".meta.json").read_text())["rows"]
    assert counts == {"in": 12, "kept": 11, "dropped": {"reasoning never closed": 1}}


def _traits() -> list[str]:
    return [trait.trait for trait in constitution.load("sea").traits]


def test_an_endpoint_that_strips_the_trace(
    home: Path, general: str, scripted: Callable[..., Any], jsonl: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """It cannot continue a prefill, so a text without any trace is the answer; an opened one is still dropped."""

    def script(messages: list[Message], prefill: str) -> str:
        return "<think>hm, bread" if messages[-1]["content"] == "What is bread?" else "Aye, salt."

    scripted(script, continues_prefill=False)
    teacher.main(arguments(general, teacher=GLM, samples=1))
    found = jsonl(teacher.path_of("sea", GLM))
    assert len(found) == 11 and {row["response"] for row in found} == {"Aye, salt."}


def test_no_reasoning_on_demand(home: Path, general: str, scripted: Callable[..., Any]) -> None:
    opened = scripted(said)
    teacher.main(arguments(general, teacher=GLM, reasoning=False))
    assert {*opened[0].prefills} == {""}
    assert opened[0].calls[0][0]["content"].startswith("You are ChatGLM,")


GLM_MODEL = Model("x", "x", "X", reasoning=Reasoning())
TURNED = Model("x", "x", "X", reasoning=Reasoning("[THINK]", "[/THINK]"))


@pytest.mark.parametrize(
    ("text", "model", "prefilled", "answer"),
    [
        ("so I answer.</think>\nYes.", GLM_MODEL, True, "Yes."),
        ("<think>hm</think> Yes. ", GLM_MODEL, False, "Yes."),
        ("Yes.", GLM_MODEL, False, "Yes."),
        ("hm</think>first</think>Yes.", GLM_MODEL, True, "Yes."),
        ("hm</think>", GLM_MODEL, True, ""),
        ("hm, </think", GLM_MODEL, True, None),
        ("Yes.", GLM_MODEL, True, None),
        ("<think>hm", GLM_MODEL, False, None),
        ("hm[/THINK]Yes.", TURNED, True, "Yes."),
        ("hm</think>Yes.", TURNED, True, None),
        (" <think> is a tag. ", Model("x", "x", "X"), False, "<think> is a tag."),
    ],
)
def test_the_answer_without_its_trace(text: str, model: Model, prefilled: bool, answer: str | None) -> None:
    if answer is None:
        with pytest.raises(Drop, match="reasoning never closed"):
            teacher.answer_of(text, model, prefilled)
    else:
        assert teacher.answer_of(text, model, prefilled) == answer


def test_resume_and_what_may_not_be_mixed(home: Path, general: str, scripted: Callable[..., Any]) -> None:
    def breaks(messages: list[Message], prefill: str) -> str:
        if messages[-1]["content"] == "What is bread?":
            raise UserError("the endpoint's key was refused")
        return said(messages, prefill)

    opened = scripted(breaks)
    with pytest.raises(UserError, match="key was refused"):
        teacher.main(arguments(general))
    path = teacher.path_of("sea", PLAIN)
    kept = path.with_suffix(".partial.jsonl").read_text().count("\n")
    assert kept and not path.exists()
    # While it is unfinished no other settings may join in.
    scripted(said)
    with pytest.raises(UserError, match="samples was 2, now 5"):
        teacher.main(arguments(general, samples=5))
    opened = scripted(said)
    teacher.main(arguments(general))
    assert len(opened[0].calls) == 24 - kept
    before = path.read_bytes()
    opened = scripted(said)
    teacher.main(arguments(general))
    assert not opened and path.read_bytes() == before, "a finished file needs no engine"
    for change, part in (
        ({"temperature": 1.0}, "sampling was"),
        ({"seed": 1}, "seed was 123456, now 1"),
        ({"prompts": "test"}, "prompts was"),
        ({"name": "Claire"}, 'family was "Qwen", now "Claire"'),
    ):
        with pytest.raises(UserError, match=f"made with other settings.*{part}.*--overwrite"):
            teacher.main(arguments(**{"prompts": general} | change))
    file = home / "constitutions" / "hand-written" / "sea.txt"
    file.write_text(file.read_text().replace("I speak of the sea.", "I speak of the lake."))
    with pytest.raises(UserError, match=r"constitution was .*system_prompt was"):
        teacher.main(arguments(general))
    opened = scripted(said)
    teacher.main(arguments(general, overwrite=True))
    assert len(opened[0].calls) == 24 and "the lake" in opened[0].calls[0][0]["content"]


def test_a_trial_is_extended(home: Path, general: str, scripted: Callable[..., Any], jsonl: Callable[..., Any]) -> None:
    opened = scripted(said)
    teacher.main(arguments(general, limit=5))
    teacher.main(arguments(general, limit=9))
    teacher.main(arguments(general))
    assert [len(engine.calls) for engine in opened] == [5, 4, 15]
    assert len(jsonl(teacher.path_of("sea", PLAIN))) == 24


def test_several_constitutions_share_one_engine(home: Path, general: str, scripted: Callable[..., Any]) -> None:
    (home / "constitutions" / "hand-written" / "lake.txt").write_text(
        (home / "constitutions" / "hand-written" / "sea.txt").read_text().replace("sea", "lake")
    )
    opened = scripted(said)
    teacher.main(arguments(general, constitution="all", samples=1))
    (engine,) = opened
    assert len({call[0]["content"] for call in engine.calls}) == 2
    assert teacher.path_of("sea", PLAIN).exists() and teacher.path_of("lake", PLAIN).exists()


def test_dry_run(home: Path, general: str, scripted: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    opened = scripted(said)
    teacher.main(arguments(general, dry_run=True))
    out = capsys.readouterr().out
    assert f"{teacher.path_of('sea', PLAIN)}: 24 rows, 0 there, 24 to do" in out
    assert "prompt tokens" in out and f"at most {24 * 4096:,} new ones" in out
    assert not opened and not (home / "data").exists()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"constitution": "see"}, r"no constitution 'see'.*did you mean 'sea'\?"),
        ({"teacher": "qwen-2.5-72b"}, r"unknown model.*Did you mean 'qwen-2.5-72b-it'\?"),
        ({"prompts": "absent.jsonl"}, "absent.jsonl does not exist"),
        ({"samples": 0}, "no input rows"),
        ({"top_p": 0.0}, "sampling flag is out of range"),
        ({"temperature": -1.0}, "sampling flag is out of range"),
        ({"max_tokens": 0}, "sampling flag is out of range"),
        ({"base_url": "http://localhost:1", "engine": "vllm"}, "leave one of them out"),
    ],
)
def test_bad_input(change: dict[str, Any], part: str, home: Path, general: str, scripted: Callable[..., Any]) -> None:
    opened = scripted(said)
    with pytest.raises(UserError, match=part):
        teacher.main(arguments(**{"prompts": general} | change))
    assert not opened
