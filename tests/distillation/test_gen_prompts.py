"""Prompt generation: lists are read, likenesses refused, the mix kept, rounds bounded, short traits named."""

import json
import random
import string
from pathlib import Path

import pytest

from character import rows
from character.distillation import gen_prompts
from character.distillation.gen_prompts import Collected, length_class, parse_list, report, request, similarity
from character.engine.scripted import Scripted
from character.models import resolve


def message(number: int, words: int) -> str:
    """A message of `words` words that is like no other: letters drawn by its number."""
    draw = random.Random(number)
    return " ".join("".join(draw.choices(string.ascii_lowercase, k=6)) for _ in range(words))


def test_lists_are_read_in_every_common_form() -> None:
    text = 'Sure!\n6. first one\n7) "second one"\n**8.** third\ncontinued line\n\n9. cut off at the e'
    assert parse_list(text, finished=False) == ["first one", "second one", "third\ncontinued line"]
    assert parse_list(text, finished=True)[-1] == "cut off at the e"
    assert parse_list("no list at all", finished=True) == []


@pytest.mark.parametrize(("words", "name"), [(1, "short"), (15, "short"), (16, "medium"), (40, "medium"), (41, "long")])
def test_length_classes(words: int, name: str) -> None:
    assert length_class(" ".join(["word"] * words)) == name


def test_similarity_ignores_case_and_punctuation_but_not_content() -> None:
    assert similarity("How do I fix my bike?", "how do i fix my BIKE") == 100
    assert similarity("How do I fix my bike?", "Why is the sky dark at night?") < gen_prompts.SIMILAR


def test_likenesses_are_judged_against_this_trait_alone_and_full_classes_are_spared() -> None:
    collected = Collected([message(n, 5) for n in range(14)])
    collected.add([message(3, 5) + "!", message(20, 5), message(21, 5)])
    assert collected.refused["like another"] == 1
    assert collected.messages[-1] == message(20, 5) and collected.spare == [message(21, 5)]
    assert "short" not in collected.lacking()
    collected.fill()
    assert collected.messages[-1] == message(21, 5)


def test_the_prompt_asks_for_what_is_lacking() -> None:
    text = request("I wait.", Collected([message(n, 5) for n in range(5)]))
    assert "I wait." in text and "10 of 1 to 15 words, 20 of 16 to 40 words, 15 of 41 to 110 words" in text
    assert "Continue the list with 45 messages" in text and "numbered from 6 on" in text


def constitution_file(folder: Path) -> None:
    (folder / "hand-written").mkdir(parents=True)
    traits = [{"trait": f"I am trait {n}.", "questions": [message(100 * n + q, 6) for q in range(5)]} for n in (1, 2)]
    (folder / "hand-written" / "mine.txt").write_text(json.dumps(traits), encoding="utf-8")


def test_rounds_fill_the_mix_and_stop_at_their_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("character.constitution.CONSTITUTION_PATH", tmp_path)
    monkeypatch.setattr(gen_prompts, "CONSTITUTION_PATH", tmp_path)
    constitution_file(tmp_path)
    calls = {"1": 0, "2": 0}

    def script(messages: list[dict[str, str]], _: str) -> str:
        trait = messages[0]["content"].split("I am trait ")[1][0]
        calls[trait] += 1
        if trait == "2":
            return "I would rather not."
        start = 1000 + 20 * calls[trait]
        lengths = [8] * 5 + [25] * 10 + [50] * 5
        return "\n".join(f"{n}. {message(start + n, words)}" for n, words in enumerate(lengths, 1))

    engine = Scripted(resolve("pocket"), script)
    monkeypatch.setattr("character.steps.open_engine", lambda *_, **__: engine)
    gen_prompts.main(gen_prompts.Args(constitution="mine", model="pocket", rounds=4))
    written = rows.read(tmp_path / "few-shot" / "mine.jsonl", "additional_questions", made_by="")
    assert len(written[0]["additional_questions"]) == 45 and calls == {"1": 3, "2": 4}
    assert report(written) == ["trait 2: short 5 of 15, medium 0 of 20, long 0 of 15"]
    before = sum(calls.values())
    gen_prompts.main(gen_prompts.Args(constitution="mine", model="pocket", rounds=4))
    assert sum(calls.values()) == before
