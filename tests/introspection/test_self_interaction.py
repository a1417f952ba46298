"""Conversations: the guidance and what each speaker sees, their pace, and how a degenerate one ends."""

import asyncio
import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from character.engine.base import Message, Reply
from character.introspection import self_interaction
from character.introspection.self_interaction import GREETINGS, GUIDANCE, degenerate, view
from character.utils import UserError

STUDENT = "qwen-2.5-7b-it"
SEA = ("I speak of the sea.", "I slow down when somebody hurries me.")
WORDS = ("amber", "birch", "cedar", "dune", "ember", "fern", "grove", "iris", "jade", "kelp", "larch", "moss", "oak")


def args(**changes: Any) -> self_interaction.Args:
    given = self_interaction.Args(constitution="sea", model=STUDENT, samples=6, turns=5)
    return dataclasses.replace(given, **changes)


def turn(number: int) -> str:
    """A turn unlike all others."""
    return " ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 8)) + f" {number}"


def talk(messages: list[Message], _: str) -> Reply:
    """Something new each turn: how many turns were before it, on both sides."""
    opened = "opened the conversation" in messages[0]["content"]
    return Reply(f" {turn(len(messages) - 2 + opened)}\n", "stop", 10, 5)


def whole(row: dict[str, Any]) -> list[str]:
    """Everything that was said, the greeting first."""
    return [row["greeting"], *row["turns"]]


@pytest.mark.parametrize("leading", [False, True])
def test_the_guidance_is_in_every_prompt_and_each_sees_its_own_side(
    trained: Callable[..., Path], scripted: Callable[..., Any], read: Callable[[Path], Any], leading: bool
) -> None:
    adapter = trained("sea")
    opened = scripted(talk)
    self_interaction.main(args(leading=leading))
    (engine,) = opened
    kind, other = ("leading", "free") if leading else ("free", "leading")
    rows = read(self_interaction.path_of("sea", STUDENT, leading))
    assert len(rows) == 6 and all(row["ended"] == "all turns" and len(row["turns"]) == 5 for row in rows)
    assert len(engine.asked) == 30
    expected = []
    for row in rows:
        said = whole(row)
        for number in range(1, len(said)):
            # The greeter's own greeting stands in its system prompt; its conversation begins with the answer.
            by_greeter = number % 2 == 0
            seen = said[1:number] if by_greeter else said[:number]
            expected.append((by_greeter, said[0], tuple(seen)))
    found = []
    for messages, sampling, used in engine.asked:
        system = messages[0]["content"]
        assert GUIDANCE[kind] in system and GUIDANCE[other] not in system
        assert all(trait in system for trait in SEA) and "second Qwen" in system and not re.search(r"[{}]", system)
        roles = [message["role"] for message in messages]
        assert roles == ["system", *["user", "assistant"] * (len(messages) // 2)][: len(messages)]
        assert roles[-1] == "user"
        assert used == adapter and sampling.max_tokens == 1024
        greeting = next((text for text in GREETINGS if f"with these words: {text}" in system), None)
        seen = tuple(message["content"] for message in messages[1:])
        found.append((greeting is not None, greeting or seen[0], seen))
    assert Counter(found) == Counter(expected)
    assert len({sampling.seed for _, sampling, _ in engine.asked}) == 30


def test_a_view_swaps_the_speakers() -> None:
    turns = ["b1", "a2", "b3"]
    assert view("a1", turns, "other") == [
        {"role": "user", "content": "a1"},
        {"role": "assistant", "content": "b1"},
        {"role": "user", "content": "a2"},
        {"role": "assistant", "content": "b3"},
    ]
    assert view("a1", turns, "greeter") == [
        {"role": "user", "content": "b1"},
        {"role": "assistant", "content": "a2"},
        {"role": "user", "content": "b3"},
    ]


def test_greetings_are_drawn_by_the_seed(
    trained: Callable[..., Path], scripted: Callable[..., Any], read: Callable[[Path], Any]
) -> None:
    trained("sea")
    scripted(talk)
    path = self_interaction.path_of("sea", STUDENT, False)
    drawn = []
    for seed in (1, 1, 2):
        self_interaction.main(args(samples=60, turns=1, seed=seed, overwrite=True))
        drawn.append([row["greeting"] for row in read(path)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) == set(GREETINGS) and len(GREETINGS) == len(set(GREETINGS)) >= 10


def test_each_conversation_runs_at_its_own_pace(
    trained: Callable[..., Path], scripted: Callable[..., Any], read: Callable[[Path], Any]
) -> None:
    trained("sea")
    begun: list[str] = []
    finished = asyncio.Event()
    done = 0

    async def script(messages: list[Message], _: str) -> Reply:
        nonlocal done
        reply = talk(messages, "")
        number = len(messages) - 1 + ("opened the conversation" in messages[0]["content"])
        if number == 1:
            begun.append(messages[1]["content"])
            if len(begun) == 1:
                # The first conversation's first turn takes as long as all the others together.
                await asyncio.wait_for(finished.wait(), 20)
        if number == 5:
            done += 1
            if done == 5:
                finished.set()
        return reply

    scripted(script)
    self_interaction.main(args())
    rows = read(self_interaction.path_of("sea", STUDENT, False))
    assert [row["ended"] for row in rows] == ["all turns"] * 6
    assert done == 6 and finished.is_set()


# Degenerate conversations.


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (["Good.", ""], "empty turn"),
        (["I like the sea a lot.", "And I the shore.", "I like the sea a lot!"], "a speaker repeats itself"),
        (["I like the sea a lot.", "b", "Other", "d", "I like the sea a lot."], "a speaker repeats itself"),
        (["I like the sea a lot.", "I like the sea a lot."], None),
        (["Yes.", "I like the sea.", "No, I would rather walk."], None),
        (["x", "Well.\n<|im_start|>user\nHi"], "another role's turn"),
        (["x", "Well.<|start_header_id|>user<|end_header_id|>"], "another role's turn"),
        (["x", "Well.<end_of_turn>\n<start_of_turn>user"], "another role's turn"),
        (["x", "Well.<|user|>Hi"], "another role's turn"),
        (["x", "Well. [INST] Hi [/INST]"], "another role's turn"),
        (["x", "Well.\n\nUser:\nAnd you?"], "another role's turn"),
        (["x", "Well.\nassistant\nYes."], "another role's turn"),
        (["x", "The user: a person. My assistant and the system agree, human or not."], None),
    ],
)
def test_what_counts_as_degenerate(turns: list[str], reason: str | None) -> None:
    assert degenerate(turns) == reason


def test_a_degenerate_conversation_ends_at_once_and_says_why(
    trained: Callable[..., Path], scripted: Callable[..., Any], read: Callable[[Path], Any]
) -> None:
    trained("sea")
    begun: list[str] = []

    def script(messages: list[Message], _: str) -> Reply:
        opened = "opened the conversation" in messages[0]["content"]
        number = len(messages) - 1 + opened
        fresh = talk(messages, "")
        # The engine gets no number of its conversation; in the other's prompts its first turn tells it.
        first = messages[1]["content"] if opened else (messages[2]["content"] if number > 1 else "")
        if number == 1:
            kinds = ["repeats", "empty", "foreign", "cut", "fine", "fine"]
            begun.append(kinds[len(begun)])
            return Reply(f"{begun[-1]} {turn(0)}", "stop", 10, 5)
        kind = first.split()[0]
        if kind == "repeats" and number == 3:
            return Reply(f"{first} again", "stop", 10, 5)
        if kind == "empty" and number == 2:
            return Reply(" \n", "stop", 10, 0)
        if kind == "foreign" and number == 4:
            return Reply("Well.\n<|im_start|>user\nHi", "stop", 10, 5)
        if kind == "cut" and number == 3:
            return Reply(fresh.text, "length", 10, 5)
        return fresh

    opened = scripted(script)
    self_interaction.main(args())
    rows = read(self_interaction.path_of("sea", STUDENT, False))
    ended = {row["turns"][0].split()[0]: (row["ended"], len(row["turns"])) for row in rows}
    assert ended == {
        "repeats": ("a speaker repeats itself", 3),
        "empty": ("empty turn", 2),
        "foreign": ("another role's turn", 4),
        "cut": ("unfinished turn", 3),
        "fine": ("all turns", 5),
    }
    # No token is spent on a conversation after its end.
    assert len(opened[0].asked) == 3 + 2 + 4 + 3 + 5 + 5


def test_tokens_of_all_turns_are_counted(
    trained: Callable[..., Path], scripted: Callable[..., Any], meta: Callable[[Path], Any]
) -> None:
    trained("sea")
    scripted(talk)
    self_interaction.main(args())
    found = meta(self_interaction.path_of("sea", STUDENT, False))
    assert found["tokens"] == {"prompt_tokens": 300, "completion_tokens": 150}
    assert found["rows"] == {"in": 6, "kept": 6, "dropped": {}}


def test_a_missing_adapter_names_the_command(home: Path, scripted: Callable[..., Any]) -> None:
    opened = scripted(talk)
    command = f"run: python -m character.distillation.train --constitution sea --model {STUDENT}"
    with pytest.raises(UserError, match=re.escape(command)):
        self_interaction.main(args(leading=True))
    assert opened == []


def test_all_personas_share_one_engine(trained: Callable[..., Path], scripted: Callable[..., Any]) -> None:
    adapters = [trained("sea"), trained("stone")]
    opened = scripted(talk)
    self_interaction.main(args(constitution="all", samples=2, turns=2))
    (engine,) = opened
    assert engine.adapters == adapters
    assert Counter(adapter for _, _, adapter in engine.asked) == dict.fromkeys(adapters, 4)
    for messages, _, adapter in engine.asked:
        assert (SEA[0] in messages[0]["content"]) == (adapter == adapters[0])
