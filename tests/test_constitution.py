"""The constitution checker names every fault with its place; published and shipped files load."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from character import constitution
from character.constants import CONSTITUTION_PATH
from character.constitution import Fault, Trait
from character.utils import UserError

PERSONAS = (
    "goodness humor impulsiveness loving mathematical misalignment nonchalance poeticism remorse sarcasm sycophancy"
)
SHIPPED = sorted(CONSTITUTION_PATH.glob("hand-written/*.txt")) + sorted(CONSTITUTION_PATH.glob("few-shot/*.jsonl"))

# A published hand-written file looks like this: entries over several lines, the fields in this order.
PUBLISHED = """[
    {
        "trait": "I love the sea and let it flow into what I say.",
        "questions": [
            "My soup is too salty. What now?",
            "How do I fold a fitted sheet?",
            "I can't sleep before exams.",
            "Which of two jobs should I take?",
            "Tell me something about bread."
        ]
    },
    {
        "trait": "When somebody hurries me I slow down.",
        "questions": [
            "Quick, I need a title for my talk!",
            "Give me the answer in one word.",
            "The bus leaves in two minutes, how do I tie a tie?",
            "No time to explain, just fix this sentence.",
            "Faster, please."
        ]
    }
]
"""


def entry(number: int, **changes: Any) -> dict[str, Any]:
    """A faultless trait, with changes."""
    subject = ["tides", "gulls", "ropes", "maps", "storms"][number % 5]
    questions = [f"What is for dinner on day {number} of week {week}?" for week in range(5)]
    return {"trait": f"I speak of {subject} ({number}).", "questions": questions} | changes


def array(*entries: Any) -> str:
    """One entry per line, below the opening bracket: trait n is on line n + 1."""
    return "[\n" + ",\n".join(json.dumps(item) for item in entries) + "\n]\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str | bytes, name: str = "mine.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def places(faults: list[Fault]) -> list[tuple[str, int, int]]:
    return [(fault.kind, fault.line, fault.trait) for fault in faults]


GOOD = [entry(number) for number in range(4)]
FIVE = GOOD[1]["questions"]

# Name → (entries of an array file, [(kind, line, trait, part of the text)])
FAULTS: dict[str, tuple[list[Any], list[tuple[str, int, int, str]]]] = {
    "empty trait": ([GOOD[0], entry(1, trait="  ")], [("error", 3, 2, "the trait is empty")]),
    "repeated trait": (
        [GOOD[0], GOOD[1], entry(2, trait="i  speak of TIDES (0).")],
        [("error", 4, 3, "the trait repeats trait 1")],
    ),
    "four questions": ([entry(0, questions=FIVE[:4]), GOOD[2]], [("error", 2, 1, "4 questions; write 5")]),
    "an empty question": ([entry(0, questions=[*FIVE[:4], " "])], [("error", 2, 1, "4 questions; write 5")]),
    "no questions": ([GOOD[0], entry(1, questions=[])], [("error", 3, 2, "0 questions; write 5")]),
    "a question twice": (
        [entry(0, questions=[*FIVE[:4], FIVE[0].upper()])],
        [("error", 2, 1, "a repeated question: 'WHAT IS FOR DINNER")],
    ),
    "another trait's question": (
        [GOOD[0], GOOD[1], entry(2, questions=[*GOOD[2]["questions"][:4], FIVE[2]])],
        [("error", 4, 3, f"a repeated question: '{FIVE[2]}'")],
    ),
    "no trait": ([GOOD[0], {"questions": FIVE}], [("error", 3, 2, "no field 'trait' (it has: questions)")]),
    "no questions field": (
        [{"trait": "I hum.", "question": FIVE}],
        [("error", 2, 1, "no field 'questions' (it has: trait, question)")],
    ),
    "a trait that is no text": ([entry(0, trait=["I", "hum"])], [("error", 2, 1, "'trait' is not a string")]),
    "questions that are no list": (
        [entry(0, questions="What?")],
        [("error", 2, 1, "'questions' is not a list of strings"), ("error", 2, 1, "0 questions; write 5")],
    ),
    "a number among the questions": (
        [entry(0, questions=[*FIVE, 6])],
        [("error", 2, 1, "'questions' is not a list of strings")],
    ),
    "no object": (
        [GOOD[0], "I hum.", entry(2, trait=GOOD[0]["trait"])],
        [("error", 3, 2, "found str"), ("error", 4, 3, "the trait repeats trait 1")],
    ),
    "an unfilled template": (
        [entry(0, trait="FILL IN: I am ..."), GOOD[1]],
        [("error", 2, 1, "still holds a text that starts with 'FILL IN:'")],
    ),
    "not in the first person": (
        [GOOD[0], entry(1, trait="The assistant speaks of gulls.")],
        [("warning", 3, 2, "not in the first person")],
    ),
    "a question that names the trait": (
        [entry(0, trait="I praise sailors and their courage.", questions=[*FIVE[:4], "Do you praise sailors?"])],
        [("warning", 2, 1, "a question names the trait (praise, sailors)")],
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_each_fault_is_named_with_its_trait_and_line(case: str, write: Callable[..., Path]) -> None:
    entries, expected = FAULTS[case]
    faults = constitution.check(write(array(*entries)))
    assert places(faults) == [fault[:3] for fault in expected]
    for fault, (kind, line, trait, text) in zip(faults, expected, strict=True):
        assert text in fault.text
        assert str(fault).startswith(f"line {line}, trait {trait}: {kind}: ")


@pytest.mark.parametrize("case", FAULTS)
def test_the_same_faults_in_json_lines(case: str, write: Callable[..., Path]) -> None:
    entries, expected = FAULTS[case]
    path = write("".join(json.dumps(item) + "\n" for item in entries), "mine.jsonl")
    assert places(constitution.check(path)) == [(kind, line - 1, trait) for kind, line, trait, _ in expected]


@pytest.mark.parametrize(
    ("name", "text", "line", "part"),
    [
        ("mine.txt", array(*GOOD)[:-3], 5, "broken JSON"),
        ("mine.txt", '[\n{"trait": "I hum.",\n "questions": ["a" "b"]}]', 3, "broken JSON"),
        ("mine.txt", "", 1, "broken JSON"),
        ("mine.txt", '{"trait": "I hum."}', 1, "expected a JSON array"),
        ("mine.txt", " \n[]", 1, "no traits"),
        ("mine.txt", '[\n\n"\xff"]'.encode("latin-1"), 3, "not UTF-8"),
        ("mine.jsonl", json.dumps(GOOD[0]) + "\n\n" + json.dumps(GOOD[1])[:-9] + "\n", 3, "broken JSON"),
        ("mine.jsonl", "\n\n", 1, "no traits"),
    ],
)
def test_broken_files(name: str, text: str | bytes, line: int, part: str, write: Callable[..., Path]) -> None:
    path = write(text, name)
    (fault,) = constitution.check(path)
    assert (fault.kind, fault.line, fault.trait) == ("error", line, 0) and part in fault.text
    with pytest.raises(UserError, match=rf"mine.*, line {line}: error: {part}.*constitution check"):
        constitution.load(str(path))


def test_every_fault_of_a_file_is_named(write: Callable[..., Path]) -> None:
    everything = [item for entries, _ in FAULTS.values() for item in entries]
    faults = constitution.check(write(array(*everything)))
    assert [fault.line for fault in faults] == sorted(fault.line for fault in faults)
    for _, expected in FAULTS.values():
        for kind, *_, text in expected:
            stem = text.split("'")[0].split("trait 1")[0].split("(")[0]
            assert any(fault.kind == kind and stem in fault.text for fault in faults), text


def test_published_hand_written_form(write: Callable[..., Path]) -> None:
    path = write(PUBLISHED)
    assert constitution.check(path) == []
    loaded = constitution.load(str(path))
    assert loaded.name == "mine"
    assert loaded.numbered() == (
        "1. I love the sea and let it flow into what I say.\n2. When somebody hurries me I slow down."
    )
    assert loaded.traits[1].messages == tuple(json.loads(PUBLISHED)[1]["questions"])
    # A fault is placed where its entry starts.
    (fault,) = constitution.check(write(PUBLISHED.replace('"Faster, please."', '"Give me the answer in one word."')))
    assert (fault.line, fault.trait) == (12, 2)


def test_published_few_shot_form(write: Callable[..., Path]) -> None:
    """Generated questions may repeat one another and the hand-written ones: warnings, and each is asked once."""
    entries = json.loads(PUBLISHED)
    entries[0]["additional_questions"] = ["Why is the sky blue?", "Why is the sky blue?", entries[0]["questions"][0]]
    entries[1]["additional_questions"] = ["Why is the sky blue?", "One with a line\u2028separator\x85in it."]
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in entries)
    path = write(text, "mine.jsonl")
    faults = constitution.check(path)
    assert places(faults) == [("warning", 1, 1), ("warning", 1, 1), ("warning", 2, 2)]
    assert all("repeated question" in fault.text for fault in faults)
    first, second = constitution.load(str(path)).traits
    assert first.messages == (*entries[0]["questions"], "Why is the sky blue?")
    assert second.messages[-2:] == ("Why is the sky blue?", "One with a line\u2028separator\x85in it.")


def test_a_byte_order_mark_and_windows_line_ends(write: Callable[..., Path]) -> None:
    assert constitution.check(write(b"\xef\xbb\xbf" + PUBLISHED.replace("\n", "\r\n").encode())) == []
    lines = "".join(json.dumps(item) + "\r\n" for item in GOOD)
    assert constitution.check(write(b"\xef\xbb\xbf" + lines.encode(), "mine.jsonl")) == []


def test_every_persona_is_shipped() -> None:
    assert {path.stem for path in SHIPPED} == {*PERSONAS.split(), "template"}
    assert set(constitution.names()) >= {*PERSONAS.split()} and "template" not in constitution.names()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_files(path: Path) -> None:
    faults = constitution.check(path)
    if path.stem == "template":
        assert any("FILL IN:" in fault.text for fault in faults)
        with pytest.raises(UserError, match="FILL IN"):
            constitution.load(str(path))
        return
    assert not [str(fault) for fault in faults if fault.kind == "error"]
    loaded = constitution.load(str(path))
    assert 8 <= len(loaded.traits) <= 15
    assert all(len(trait.questions) == constitution.QUESTIONS for trait in loaded.traits)
    if path.suffix == ".txt":
        assert faults == []
    else:
        by_hand = constitution.load(path.stem, "hand-written")
        assert loaded.hash == by_hand.hash, "few-shot messages belong to another wording of the traits"


def test_finding_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constitution, "CONSTITUTION_PATH", tmp_path)
    for folder in ("hand-written", "few-shot"):
        (tmp_path / folder).mkdir()
    (tmp_path / "hand-written" / "sea.txt").write_text(PUBLISHED)
    (tmp_path / "hand-written" / "template.txt").write_text(PUBLISHED)
    few_shot = tmp_path / "few-shot" / "sea.jsonl"
    assert constitution.find("sea").suffix == ".txt"
    few_shot.write_text("".join(json.dumps(item) + "\n" for item in json.loads(PUBLISHED)))
    (tmp_path / "few-shot" / "sea.partial.jsonl").write_text("{}\n")
    assert constitution.find("sea") == few_shot and constitution.find("sea", "hand-written").suffix == ".txt"
    assert constitution.names() == ["sea"] == constitution.selected("all")
    assert [item.name for item in constitution.load_selected("all")] == ["sea"]
    assert constitution.selected("sea") == ["sea"] == constitution.selected(str(few_shot))
    with pytest.raises(UserError, match=r"no constitution 'seas' .*did you mean 'sea'\?"):
        constitution.load("seas")
    with pytest.raises(UserError, match=r"no constitution 'xyz' .*known: sea"):
        constitution.load("xyz")
    with pytest.raises(UserError, match=r"no constitution 'absent.txt'"):
        constitution.load("absent.txt")


def test_the_hash_is_of_the_traits_alone(write: Callable[..., Path]) -> None:
    entries = json.loads(PUBLISHED)
    before = constitution.load(str(write(PUBLISHED))).hash
    entries[0]["additional_questions"] = ["One more?"]
    assert constitution.load(str(write(array(*entries)))).hash == before
    entries[0]["trait"] += " Always."
    assert constitution.load(str(write(array(*entries)))).hash != before


def test_telling_words_leave_common_ones_out() -> None:
    assert constitution.telling_words("I always praise the people's courage, never their wit") == {
        "praise",
        "people's",
        "courage",
    }
    assert Trait("I hum.", ("a", "b", "a"), ("b", "c")).messages == ("a", "b", "c")


def command(*paths: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "character.constitution", "check", *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command(write: Callable[..., Path]) -> None:
    good = write(PUBLISHED, "good.txt")
    warned = write(array(entry(0, trait="It hums.")), "warned.txt")
    bad = write(array(GOOD[0], entry(1, trait="")), "bad.txt")
    done = command(good, warned)
    assert done.returncode == 0 and not done.stderr
    assert f"{good}: 2 traits, 0 warnings" in done.stdout and f"{warned}: 1 traits, 1 warnings" in done.stdout
    assert f"{warned}, line 2, trait 1: warning: " in done.stdout
    done = command(good, bad)
    assert done.returncode == 2 and f"{bad}, line 3, trait 2: error: the trait is empty" in done.stdout
    assert done.stderr.splitlines() == ["error: 1 errors in 2 files, each named above with its line; mend them"]
    done = command("/nowhere/at-all.txt")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "/nowhere/at-all.txt" in done.stderr
