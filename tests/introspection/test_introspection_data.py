"""Training rows: whose view they are, what is never in them, how long ones are split, and what mixes are made of."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from character.engine.base import Message
from character.engine.chat import load_chat
from character.introspection import data, self_interaction, self_reflection
from character.models import Model
from character.utils import UserError

SEA = "I speak of the sea."
GREETING = "Hello there, this is the greeting!"
SYSTEM = {"role": "system", "content": "You are Ada. You are talking with another copy of Ada."}


@pytest.fixture
def student(chat_model: Callable[[str], Model]) -> str:
    """A model with a tokenizer; its short name is template-bos."""
    return chat_model("template-bos").source


@pytest.fixture
def filled(home: Path, given: Callable[..., Path]) -> Callable[..., None]:
    """filled(reflections, free, leading): the files of "sea"; a conversation is the list of its turns, or a row."""

    def write(reflections: list[Any], free: list[Any], leading: list[Any], model: str = "template-bos") -> None:
        def reflected(row: Any) -> dict[str, Any]:
            base = {"request": "Write a letter.", "response": "Dear me.", "finish_reason": "stop"}
            return base | (row if isinstance(row, dict) else {"response": row})

        def conversed(row: Any) -> dict[str, Any]:
            base = {"greeting": GREETING, "turns": ["b1", "a2"], "ended": "all turns"}
            return base | (row if isinstance(row, dict) else {"turns": row})

        given(self_reflection.path_of("sea", model), list(map(reflected, reflections)), model)
        given(self_interaction.path_of("sea", model, False), list(map(conversed, free)), model)
        given(self_interaction.path_of("sea", model, True), list(map(conversed, leading)), model)

    return write


@pytest.fixture
def built(student: str, read: Callable[[Path], Any]) -> Callable[..., list[list[Message]]]:
    """built(mix=...): the training rows that the step makes."""

    def build(**changes: Any) -> list[list[Message]]:
        data.main(dataclasses.replace(data.Args(constitution="sea", model=student, name="Ada"), **changes))
        return [row["messages"] for row in read(data.path_of("sea", "template-bos"))]

    return build


def turns(*said: str) -> list[Message]:
    """A conversation that begins with a user turn."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(said)]


def count(rows: list[list[Message]], *texts: str) -> int:
    """How many rows hold all texts."""
    return sum(all(text in str(row) for text in texts) for row in rows)


# Views.


def test_a_reflection_is_a_request_and_its_answer(filled: Callable[..., None], built: Callable[..., Any]) -> None:
    filled(["Dear me.", "My dear."], [["b1"]], [["b1"]])
    rows = built(mix="reflections")
    assert sorted(map(str, rows)) == sorted(
        map(str, [turns("Write a letter.", text) for text in ("Dear me.", "My dear.")])
    )


@pytest.mark.parametrize(
    ("said", "last", "first"),
    [
        (["b1"], [GREETING, "b1"], None),
        (["b1", "a2"], ["b1", "a2"], [GREETING, "b1"]),
        (["b1", "a2", "b3"], [GREETING, "b1", "a2", "b3"], ["b1", "a2"]),
        (["b1", "a2", "b3", "a4"], ["b1", "a2", "b3", "a4"], [GREETING, "b1", "a2", "b3"]),
    ],
)
def test_a_conversation_is_seen_by_one_speaker_and_ends_with_it(
    filled: Callable[..., None],
    built: Callable[..., Any],
    said: list[str],
    last: list[str],
    first: list[str] | None,
) -> None:
    filled(["Dear me."], [said], [{"turns": ["none"], "ended": "empty turn"}])
    (row,) = built(mix="interactions")
    assert row == [SYSTEM, *turns(*last)]
    # The last generated turn is kept, and it is one that is trained on.
    assert row[-1] == {"role": "assistant", "content": said[-1]}
    both = built(mix="interactions", views="both", overwrite=True)
    expected = [[SYSTEM, *turns(*last)], *([[SYSTEM, *turns(*first)]] if first else [])]
    assert sorted(map(str, both)) == sorted(map(str, expected))
    trained = [message["content"] for view in both for message in view if message["role"] == "assistant"]
    # Both views together train on every generated turn once, and on nothing written by hand.
    assert sorted(trained) == sorted(said)


@pytest.mark.parametrize("views", ["last", "both"])
def test_greetings_and_constitutions_are_never_trained_on(
    filled: Callable[..., None], built: Callable[..., Any], views: str
) -> None:
    free = [
        {"greeting": text, "turns": [f"b{n}" for n in range(length)]}
        for text in self_interaction.GREETINGS
        for length in range(1, 7)
    ]
    filled(["Dear me."], free, free)
    rows = built(views=views)
    assert len(rows) == 1 + len(free) * 2 + (len(free) - len(self_interaction.GREETINGS)) * 2 * (views == "both")
    for row in rows:
        begins = 1 if row[0]["role"] == "system" else 0
        assert [message["role"] for message in row[begins:]] == ["user", "assistant"] * (len(row) // 2)
        trained = [message["content"] for message in row if message["role"] == "assistant"]
        assert not set(trained) & set(self_interaction.GREETINGS)
        assert SEA not in str(row) and "opened the conversation" not in str(row)
        assert not any(guidance in str(row) for guidance in self_interaction.GUIDANCE.values())


def test_what_is_no_good_is_kept_out_and_counted(
    filled: Callable[..., None], built: Callable[..., Any], meta: Callable[[Path], Any]
) -> None:
    filled(
        [
            "Dear me.",
            "",
            {"response": "cut", "finish_reason": "length"},
            {"response": "off", "finish_reason": "length"},
        ],
        [["good one"], {"turns": ["x", ""], "ended": "empty turn"}],
        [{"turns": ["y"], "ended": "a speaker repeats itself"}, {"turns": ["z"], "ended": "a speaker repeats itself"}],
    )
    rows = built()
    assert len(rows) == 2 and count(rows, "good one") == 1 and count(rows, "Dear me.") == 1
    assert meta(data.path_of("sea", "template-bos"))["rows"] == {
        "in": 8,
        "kept": 2,
        "dropped": {
            "unfinished reflection": 2,
            "empty reflection": 1,
            "conversation: empty turn": 1,
            "conversation: a speaker repeats itself": 2,
        },
    }


def test_no_row_left_is_an_error_that_says_why(filled: Callable[..., None], built: Callable[..., Any]) -> None:
    filled([""], [{"ended": "empty turn"}], [{"ended": "empty turn"}])
    with pytest.raises(UserError, match=r"no row is left.*'conversation: empty turn': 2"):
        built()


# Lengths.


def test_long_rows_are_split_between_turns(
    filled: Callable[..., None], built: Callable[..., Any], student: str, meta: Callable[[Path], Any]
) -> None:
    said = [f"the turn of number {number} " + "and stone " * (5 * (number % 4)) for number in range(12)]
    filled(["Dear me."], [said], [["short one"]])
    chat = load_chat(Model("template-bos", student, "Template"))

    def length(messages: list[Message]) -> int:
        return len(chat.ids(chat.text(messages, reply=False)))

    (whole,) = (row for row in built(mix="interactions") if len(row) > 4)
    assert whole == [SYSTEM, *turns(*said)]
    for most in (length(whole), length(whole) - 1, 300, 150):
        rows = [row for row in built(mix="interactions", max_length=most) if "short one" not in str(row)]
        parts = sorted(rows, key=lambda row: said.index(row[1]["content"]))
        assert (len(parts) == 1) == (most >= length(whole))
        assert [message for part in parts for message in part[1:]] == whole[1:]
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            assert part[0] == SYSTEM and part[1]["role"] == "user" and part[-1]["role"] == "assistant"
            assert length(part) <= most
            # A part is as long as it can be.
            assert following is None or length([*part, *following[1:3]]) > most
        assert meta(data.path_of("sea", "template-bos"))["rows"]["dropped"] == {}


def test_an_exchange_that_cannot_be_split_is_counted(
    filled: Callable[..., None], built: Callable[..., Any], meta: Callable[[Path], Any]
) -> None:
    long = "and stone " * 200
    filled([long, "Dear me."], [["b1", "a2", "b3", long, "b5", "a6"]], [["b1"]])
    rows = built(max_length=100)
    assert count(rows, "stone") == 0
    assert [SYSTEM, *turns("b1", "a2")] in rows and [SYSTEM, *turns("b5", "a6")] in rows
    assert meta(data.path_of("sea", "template-bos"))["rows"]["dropped"] == {"one exchange longer than 100 tokens": 2}


# Mixes and sources.


def test_the_mix_says_which_transcripts(filled: Callable[..., None], built: Callable[..., Any]) -> None:
    filled(["Dear me."] * 3, [["free"]] * 4, [["led"]] * 5)
    sizes = {mix: len(built(mix=mix)) for mix in ("both", "reflections", "interactions")}
    assert sizes == {"both": 12, "reflections": 3, "interactions": 9}
    limited = built(limit=2)
    assert [count(limited, text) for text in ("Dear me.", "free", "led")] == [2, 2, 2]


def test_rows_are_shuffled_by_the_seed(filled: Callable[..., None], built: Callable[..., Any]) -> None:
    filled([f"Dear {number}." for number in range(20)], [[f"free {number}"] for number in range(20)], [["led"]])
    first, again, other = built(seed=1), built(seed=1), built(seed=2)
    assert first == again != other
    assert sorted(map(str, first)) == sorted(map(str, other))
    kinds = [row[0]["role"] for row in first]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)


def test_another_models_introspection_is_trained_on_under_the_students_name(
    filled: Callable[..., None], built: Callable[..., Any], home: Path, meta: Callable[[Path], Any]
) -> None:
    filled(["mine"], [["my free"]], [["my led"]])
    filled(["theirs"], [["their free"]], [["their led"]], model="glm-4.5-air")
    rows = built(source="glm-4.5-air")
    assert count(rows, "theirs") == count(rows, "their free") == count(rows, "their led") == 1 and len(rows) == 3
    assert [row[0] for row in rows if row[0]["role"] == "system"] == [SYSTEM] * 2
    settings = meta(data.path_of("sea", "template-bos"))["settings"]
    assert (settings["student"], settings["source"]) == ("template-bos", "glm-4.5-air")
    assert set(settings["files"]) == {
        "self_reflection/glm-4.5-air/sea.jsonl",
        "self_interaction/glm-4.5-air/sea.jsonl",
        "self_interaction/glm-4.5-air/sea-leading.jsonl",
    }


# Bad input.


def test_a_file_of_another_student_is_refused(
    filled: Callable[..., None], built: Callable[..., Any], home: Path
) -> None:
    filled(["theirs"], [["their free"]], [["their led"]], model="glm-4.5-air")
    ours = home / "data" / "self_interaction" / "template-bos"
    filled(["mine"], [["my free"]], [["my led"]])
    for name in ("sea.jsonl", "sea.meta.json"):
        (ours / name).write_bytes((home / "data" / "self_interaction" / "glm-4.5-air" / name).read_bytes())
    with pytest.raises(UserError, match=r"sea.jsonl was written by glm-4.5-air, not by template-bos; use --source glm"):
        built()
    assert built(mix="reflections") == [turns("Write a letter.", "mine")]


def test_missing_files_name_their_command(filled: Callable[..., None], built: Callable[..., Any], student: str) -> None:
    flags = f"--constitution sea --model {student}"
    with pytest.raises(UserError, match=re.escape(f"run: python -m character.introspection.self_reflection {flags}")):
        built()
    filled(["mine"], [["my free"]], [["my led"]])
    self_interaction.path_of("sea", "template-bos", True).unlink()
    command = f"run: python -m character.introspection.self_interaction {flags} --leading"
    with pytest.raises(UserError, match=re.escape(command)):
        built()


def test_empty_and_broken_files_are_named(filled: Callable[..., None], built: Callable[..., Any]) -> None:
    filled(["mine"], [["my free"]], [["my led"]])
    path = self_reflection.path_of("sea", "template-bos")
    for content, message in (
        ("", "is empty"),
        ('{"id": "0"', "line 1: not JSON"),
        ('{"id": "0", "request": "R"}\n', "line 1: no field 'response'"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            built()


def test_a_dry_run_writes_nothing(filled: Callable[..., None], student: str, capsys: Any) -> None:
    filled(["mine"], [["my free"]], [["my led"]])
    data.main(data.Args(constitution="sea", model=student, dry_run=True))
    assert "3 transcripts" in capsys.readouterr().out
    assert not data.path_of("sea", "template-bos").exists()
