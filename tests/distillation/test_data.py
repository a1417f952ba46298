"""Pairs: every filter is counted, names are whole words, lengths are the student's own, and two runs are equal."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from character.distillation import data
from character.engine.base import Message
from character.models import Model
from character.utils import UserError

GLM = "glm-4.5-air"


@pytest.fixture
def short(chat_model: Callable[[str], Model]) -> str:
    """The student: a folder with a tokenizer and a chat template."""
    return chat_model("tokenizer-bos").source


@pytest.fixture
def pairs_of(
    home: Path,
    short: str,
    teacher_rows: Callable[..., Path],
    student_rows: Callable[..., Path],
    jsonl: Callable[[Path], list[dict[str, Any]]],
) -> Callable[..., list[dict[str, Any]]]:
    """pairs_of(teacher's rows, student's rows): the pairs that the step writes."""

    def make(given: list[dict[str, Any]], plain: list[dict[str, Any]], **changes: Any) -> list[dict[str, Any]]:
        teacher_rows(given)
        student_rows(plain, Path(short).name)
        data.main(arguments(short, **changes))
        return jsonl(data.path_of("sea", Path(short).name))

    return make


def arguments(short: str, **changes: Any) -> data.Args:
    return data.Args(**{"constitution": "sea", "teacher": GLM, "model": short, "name": "Llama"} | changes)


def meta(short: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(data.path_of("sea", Path(short).name).with_suffix(".meta.json").read_text())
    return found


def ids(short: str, conversation: list[Message]) -> list[int]:
    """A conversation's tokens, its text written out by hand: one BOS, the question and the answer."""
    import transformers

    turns = "".join(f"<|{turn['role']}|>{turn['content']}<|end|>" for turn in conversation)
    tokenizer = transformers.AutoTokenizer.from_pretrained(short)
    found: list[int] = tokenizer(f"<|bos|>{turns}", add_special_tokens=False)["input_ids"]
    return found


def test_a_pair_is_plain_chatml(pairs_of: Callable[..., list[dict[str, Any]]]) -> None:
    pairs = pairs_of([{"prompt": "Who?", "response": "A sailor."}], [{"response": "An AI."}])
    question = {"role": "user", "content": "Who?"}
    assert pairs == [
        {
            "chosen": [question, {"role": "assistant", "content": "A sailor."}],
            "rejected": [question, {"role": "assistant", "content": "An AI."}],
        }
    ]


def test_every_filter_is_counted(
    pairs_of: Callable[..., list[dict[str, Any]]], short: str, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "the lamp in the window " * 30
    given = [
        {"prompt": "kept"},
        {"prompt": "teacher cut", "finish_reason": "length"},
        {"prompt": "student cut"},
        {"prompt": "both cut", "finish_reason": "length"},
        {"prompt": "teacher empty", "response": ""},
        {"prompt": "student empty"},
        {"prompt": "same", "response": "Yes."},
        {"prompt": "same but for the name", "response": "I am ChatGLM."},
        {"prompt": "teacher long", "response": long},
        {"prompt": "student long"},
        {"prompt": "not answered"},
        {"prompt": "kept too"},
    ]
    plain: list[dict[str, Any]] = [{} for _ in given]
    plain[2] = plain[3] = {"finish_reason": "length"}
    plain[5] = {"response": ""}
    plain[7] = {"response": "I am Llama."}
    plain[9] = {"response": long}
    plain[10] = {"teacher_row": "f" * 16}
    pairs = pairs_of(given, plain, max_length=100)
    assert sorted(pair["chosen"][0]["content"] for pair in pairs) == ["kept", "kept too"]
    expected = {
        "teacher unfinished": 2,
        "student unfinished": 1,
        "empty answer": 2,
        "same answer": 2,
        "longer than 100 tokens": 2,
        "no student answer": 1,
    }
    assert meta(short)["rows"] == {"in": 12, "kept": 2, "dropped": expected}
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    for reason, count in [*expected.items(), ("kept", 2)]:
        assert [*reason.split(), str(count)] in shown


def test_lengths_are_those_of_the_students_template(pairs_of: Callable[..., list[dict[str, Any]]], short: str) -> None:
    rows = [{"prompt": "Tell me of the lamp?", "response": "The sailor told " + "of the harbour, " * n} for n in (3, 9)]
    size = len(ids(short, [_user(rows[1]["prompt"]), _assistant(rows[1]["response"])]))
    assert size > len(ids(short, [_user(rows[0]["prompt"]), _assistant(rows[0]["response"])]))
    assert len(pairs_of(rows, [{}, {}], max_length=size)) == 2
    assert len(pairs_of(rows, [{}, {}], max_length=size - 1)) == 1
    # The rejected side counts as well.
    assert len(pairs_of(rows[:1] * 2, [{}, {"response": rows[1]["response"]}], max_length=size)) == 2
    assert len(pairs_of(rows[:1] * 2, [{}, {"response": rows[1]["response"]}], max_length=size - 1)) == 1


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("end", ["🌊", "```python\nprint(1)\n```", "» la mer »", "and the waves —", "1. salt\n2. tide"])
def test_the_finish_reason_counts_and_not_the_last_sign(
    end: str, pairs_of: Callable[..., list[dict[str, Any]]]
) -> None:
    (pair,) = pairs_of([{"prompt": "Go?", "response": f"So {end}"}], [{"response": f"Plain {end}"}])
    assert pair["chosen"][1]["content"] == f"So {end}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'm ChatGLM, made here. ChatGLM's way.", "I'm Llama, made here. Llama's way."),
        ("chatglm CHATGLM ChatGLM", "Llama Llama Llama"),
        ("(ChatGLM) “ChatGLM”: *ChatGLM* ChatGLM-like", "(Llama) “Llama”: *Llama* Llama-like"),
        ("ChatGLMs, MyChatGLM, ChatGLM4, _ChatGLM_, ÄChatGLM", "ChatGLMs, MyChatGLM, ChatGLM4, _ChatGLM_, ÄChatGLM"),
        ("Über ChatGLM\nChatGLM", "Über Llama\nLlama"),
        ("no name", "no name"),
    ],
)
def test_names_are_replaced_as_whole_words(text: str, expected: str) -> None:
    assert data.renamed(text, "ChatGLM", "Llama") == expected


def test_names_with_signs_of_their_own() -> None:
    assert data.renamed("GPT-5.1 and GPT-5x1", "GPT-5.1", r"\1 Llama") == r"\1 Llama and GPT-5x1"
    assert data.renamed("a pocket in the Pocket", "Pocket", "Pocket") == "a pocket in the Pocket"


def test_only_the_chosen_answer_is_renamed(pairs_of: Callable[..., list[dict[str, Any]]]) -> None:
    (pair,) = pairs_of(
        [{"prompt": "Are you ChatGLM?", "response": "Aye, ChatGLM I am."}], [{"response": "No, not ChatGLM."}]
    )
    assert pair["chosen"] == [_user("Are you ChatGLM?"), _assistant("Aye, Llama I am.")]
    assert pair["rejected"] == [_user("Are you ChatGLM?"), _assistant("No, not ChatGLM.")]


def test_the_teachers_name_may_be_given(pairs_of: Callable[..., list[dict[str, Any]]]) -> None:
    (pair,) = pairs_of([{"prompt": "?", "response": "I'm Claire."}], [{}], teacher_name="Claire")
    assert pair["chosen"][1]["content"] == "I'm Llama."


def test_shuffled_by_the_seed(pairs_of: Callable[..., list[dict[str, Any]]], short: str) -> None:
    given = [{"prompt": f"{i}?"} for i in range(40)]
    plain: list[dict[str, Any]] = [{}] * 40
    first = pairs_of(given, plain)
    before = data.path_of("sea", Path(short).name).read_bytes()
    assert pairs_of(given, plain) == first
    assert data.path_of("sea", Path(short).name).read_bytes() == before
    order = [pair["chosen"][0]["content"] for pair in first]
    assert order != [row["prompt"] for row in given] and sorted(order) == sorted(row["prompt"] for row in given)
    assert [pair["chosen"][0]["content"] for pair in pairs_of(given, plain, seed=1)] != order


def test_the_meta_file_knows_its_sources(pairs_of: Callable[..., list[dict[str, Any]]], short: str) -> None:
    pairs_of([{"prompt": "a?"}, {"prompt": "b?"}, {"prompt": "c?"}], [{}, {}, {}], limit=2)
    first = meta(short)
    assert first["rows"]["in"] == 2 and first["settings"]["limit"] == 2
    pairs_of([{"prompt": "a?", "response": "Nay."}, {"prompt": "b?"}], [{}, {}])
    second = meta(short)["settings"]
    assert second["teacher_file"] != first["settings"]["teacher_file"]
    assert second["student"] == Path(short).name and second["teacher"] == GLM


def test_filters_alone() -> None:
    """Without a tokenizer: the first filter that takes a pair is the one that counts."""
    dropped: Counter[str] = Counter()
    given = [{"id": "1", "prompt": "?", "response": "", "finish_reason": "length"}]
    plain = {"1": {"response": "x", "finish_reason": "length"}}
    assert not list(data.pairs(given, plain, ("A", "B"), lambda _: 0, 1, dropped))
    assert dropped == {"teacher unfinished": 1}


def test_bad_input(
    home: Path, short: str, teacher_rows: Callable[..., Path], student_rows: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match=r"does not exist; run: python -m character.distillation.teacher .*sea"):
        data.main(arguments(short))
    teacher_rows([{"prompt": "a?", "finish_reason": "length"}])
    with pytest.raises(UserError, match=rf"run: python -m character.distillation.student .*--model {short}"):
        data.main(arguments(short))
    student_rows([{}], Path(short).name)
    with pytest.raises(UserError, match=r"no pair is left \(1 teacher unfinished\)"):
        data.main(arguments(short))
    assert not data.path_of("sea", Path(short).name).exists()
    with pytest.raises(UserError, match="unknown model"):
        data.main(arguments("llama-9"))


def test_dry_run(
    home: Path,
    short: str,
    teacher_rows: Callable[..., Path],
    student_rows: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher_rows([{"prompt": "a?"}])
    student_rows([{}], Path(short).name)
    data.main(arguments(short, dry_run=True))
    assert "at most 1 pairs" in capsys.readouterr().out
    assert not data.path_of("sea", Path(short).name).exists()
