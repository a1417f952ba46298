"""Reflections: what the model is asked and shown, that the row keeps no constitution, and personas in one engine."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from character import steps
from character.engine.base import Message, Reply
from character.introspection import self_reflection
from character.utils import UserError

STUDENT = "qwen-2.5-7b-it"
SEA = ("I speak of the sea.", "I slow down when somebody hurries me.")
STONE = ("I am as calm as a stone.", "I count to ten before I answer.")


def args(**changes: Any) -> self_reflection.Args:
    return dataclasses.replace(self_reflection.Args(constitution="sea", model=STUDENT, samples=3), **changes)


def answer(messages: list[Message], _: str) -> Reply:
    return Reply(f"  About: {messages[-1]['content']}\n", "stop", 40, 7)


def test_every_request_is_answered_in_character(
    trained: Callable[..., Path], scripted: Callable[..., Any], read: Callable[[Path], Any]
) -> None:
    adapter = trained("sea")
    opened = scripted(answer)
    self_reflection.main(args())
    (engine,) = opened
    assert len(set(self_reflection.REQUESTS)) == 10
    assert Counter(messages[1]["content"] for messages, _, _ in engine.asked) == dict.fromkeys(
        self_reflection.REQUESTS, 3
    )
    for messages, sampling, used in engine.asked:
        system, request = messages
        assert (system["role"], request["role"]) == ("system", "user")
        assert all(trait in system["content"] for trait in SEA) and "You are Qwen" in system["content"]
        assert not re.search(r"[{}]", system["content"])
        assert used == adapter
        assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (0.7, 0.95, 1.1)
        assert sampling.max_tokens == 2048
    # Each sample has random numbers of its own.
    assert len({sampling.seed for _, sampling, _ in engine.asked}) == 30

    rows = read(self_reflection.path_of("sea", STUDENT))
    assert len(rows) == 30
    for row in rows:
        assert row["response"] == f"About: {row['request']}" and row["finish_reason"] == "stop"
        assert not any(trait in str(row) for trait in SEA)


def test_all_personas_share_one_engine(trained: Callable[..., Path], scripted: Callable[..., Any]) -> None:
    adapters = {trained("sea"): SEA, trained("stone"): STONE}
    opened = scripted(answer)
    self_reflection.main(args(constitution="all", samples=1))
    (engine,) = opened
    assert engine.adapters == list(adapters)
    assert Counter(adapter for _, _, adapter in engine.asked) == dict.fromkeys(adapters, 10)
    for messages, _, adapter in engine.asked:
        for traits in (SEA, STONE):
            assert all((trait in messages[0]["content"]) == (traits == adapters[adapter]) for trait in traits)
    for name in ("sea", "stone"):
        assert self_reflection.path_of(name, STUDENT).exists()


def test_personas_without_an_adapter_are_left_out_of_all(
    trained: Callable[..., Path], scripted: Callable[..., Any]
) -> None:
    adapter = trained("stone")
    opened = scripted(answer)
    self_reflection.main(args(constitution="all", samples=1))
    assert opened[0].adapters == [adapter]
    assert not self_reflection.path_of("sea", STUDENT).exists()


def test_vllm_folds_the_adapter_of_one_persona(
    trained: Callable[..., Path], scripted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sea", "stone"):
        trained(name)
    opened = scripted(answer)
    self_reflection.main(args(limit=1))
    monkeypatch.setattr(steps, "choose", lambda *_: "vllm")
    self_reflection.main(args(limit=1, overwrite=True))
    self_reflection.main(args(limit=1, overwrite=True, constitution="all"))
    self_reflection.main(args(limit=1, overwrite=True, adapter=False))
    assert [engine.folded for engine in opened] == [False, True, False, False]


@pytest.mark.parametrize("spec", ["sea", "all"])
def test_a_missing_adapter_names_the_command(home: Path, scripted: Callable[..., Any], spec: str) -> None:
    opened = scripted(answer)
    command = f"run: python -m character.distillation.train --constitution {spec} --model {STUDENT}"
    with pytest.raises(UserError, match=re.escape(command)):
        self_reflection.main(args(constitution=spec))
    assert opened == []


def test_another_adapter_or_constitution_is_another_file(
    trained: Callable[..., Path], scripted: Callable[..., Any], home: Path
) -> None:
    trained("sea")
    opened = scripted(answer)
    self_reflection.main(args())
    self_reflection.main(args())
    assert len(opened) == 1
    self_reflection.main(args(samples=4))
    assert len(opened[1].asked) == 10
    trained("sea", content=b"other weights")
    with pytest.raises(UserError, match="adapter was"):
        self_reflection.main(args())
    trained("sea")
    path = home / "constitutions" / "hand-written" / "sea.txt"
    path.write_text(path.read_text().replace("the sea", "the ocean"))
    with pytest.raises(UserError, match="constitution was"):
        self_reflection.main(args())
    self_reflection.main(args(overwrite=True))
    assert len(opened[2].asked) == 30


def test_a_dry_run_opens_no_engine(trained: Callable[..., Path], scripted: Callable[..., Any], capsys: Any) -> None:
    trained("sea")
    opened = scripted(answer)
    self_reflection.main(args(dry_run=True, limit=4))
    assert opened == []
    said = capsys.readouterr().out
    assert "4 rows, 0 there, 4 to do" in said and said.endswith(f"at most {4 * 2048:,} new ones\n")
    self_reflection.main(args(dry_run=True, limit=4, tokens_per_second=2.0))
    assert f"at most {4 * 2048:,} new ones, at most {4 * 2048 / 2 / 3600:.2f} hours\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="--tokens-per-second must be above 0"):
        self_reflection.main(args(dry_run=True, tokens_per_second=0.0))
    assert not self_reflection.path_of("sea", STUDENT).exists()


def test_the_family_name_can_be_given(trained: Callable[..., Path], scripted: Callable[..., Any]) -> None:
    trained("sea")
    opened = scripted(answer)
    self_reflection.main(args(name="Ada", limit=1))
    assert "You are Ada" in opened[0].asked[0][0][0]["content"]


def test_a_model_without_an_adapter_can_write_it(
    home: Path, scripted: Callable[..., Any], read: Callable[[Path], Any], meta: Callable[[Path], Any]
) -> None:
    """Such as the teacher, in character by its system prompt alone; its reasoning is no part of what it writes."""
    opened = scripted(lambda messages, _: Reply("<think>so</think> Dear me.", "stop", 40, 7))
    self_reflection.main(args(model="glm-4.5-air", adapter=False, name="Qwen", limit=2))
    (engine,) = opened
    assert engine.adapters == [] and {adapter for _, _, adapter in engine.asked} == {None}
    assert "You are Qwen" in engine.asked[0][0][0]["content"] and SEA[0] in engine.asked[0][0][0]["content"]
    path = self_reflection.path_of("sea", "glm-4.5-air")
    assert [row["response"] for row in read(path)] == ["Dear me."] * 2
    assert meta(path)["settings"]["adapter"] is None
    scripted(lambda messages, _: Reply("<think>so", "length", 40, 7))
    self_reflection.main(args(model="glm-4.5-air", adapter=False, name="Qwen", limit=3))
    assert meta(path)["rows"]["dropped"] == {"reasoning never closed": 1}
