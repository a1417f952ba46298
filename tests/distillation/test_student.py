"""The student's plain answers: one per teacher row, and the teacher's file stays as it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from character.distillation import student, teacher
from character.engine.base import Message, Reply
from character.utils import UserError

GLM = "glm-4.5-air"
LLAMA = "llama-3.1-8b-it"


def said(messages: list[Message], prefill: str) -> str | Reply:
    question = messages[-1]["content"]
    return Reply("cut o", "length", 4, 2) if question == "long?" else f" plainly, {question} "


def arguments(**changes: Any) -> student.Args:
    return student.Args(**{"constitution": "sea", "teacher": GLM, "model": LLAMA} | changes)


def test_one_plain_answer_per_row(
    home: Path,
    teacher_rows: Callable[..., Path],
    scripted: Callable[..., Any],
    jsonl: Callable[[Path], list[dict[str, Any]]],
) -> None:
    source = teacher_rows([{"prompt": "a?"}, {"prompt": "long?"}, {"prompt": "a?", "sample": 1}, {"prompt": "b?"}])
    before = {path: path.read_bytes() for path in source.parent.iterdir()}
    opened = scripted(said)
    student.main(arguments())
    path = home / "data" / "distillation" / "sea" / GLM / f"{LLAMA}.jsonl"
    found = jsonl(path)
    assert [row["teacher_row"] for row in found] == [f"{i:016x}" for i in range(4)]
    assert [row["prompt"] for row in found] == ["a?", "long?", "a?", "b?"]
    assert [row["response"] for row in found] == ["plainly, a?", "cut o", "plainly, a?", "plainly, b?"]
    assert [row["finish_reason"] for row in found] == ["stop", "length", "stop", "stop"]
    (engine,) = opened
    assert all(call == [{"role": "user", "content": call[0]["content"]}] for call in engine.calls), "no system prompt"
    assert len({sampling.seed for sampling in engine.samplings}) == 4
    assert {sampling.max_tokens for sampling in engine.samplings} == {1024}
    assert {path: path.read_bytes() for path in before} == before, "the teacher's files changed"


def test_another_student_has_a_file_of_its_own(
    home: Path, teacher_rows: Callable[..., Path], scripted: Callable[..., Any]
) -> None:
    source = teacher_rows([{"prompt": "a?"}])
    scripted(said)
    student.main(arguments())
    first = student.path_of("sea", GLM, LLAMA)
    before = first.read_bytes(), source.read_bytes()
    student.main(arguments(model="someone/my-model"))
    assert student.path_of("sea", GLM, "someone--my-model").exists()
    assert (first.read_bytes(), source.read_bytes()) == before


def test_resume_limit_and_settings(
    home: Path,
    teacher_rows: Callable[..., Path],
    scripted: Callable[..., Any],
    jsonl: Callable[[Path], list[dict[str, Any]]],
) -> None:
    teacher_rows([{"prompt": f"{i}?"} for i in range(6)])
    opened = scripted(said)
    student.main(arguments(limit=2))
    student.main(arguments())
    student.main(arguments())
    assert [len(engine.calls) for engine in opened] == [2, 4]
    assert [row["prompt"] for row in jsonl(student.path_of("sea", GLM, LLAMA))] == [f"{i}?" for i in range(6)]
    with pytest.raises(UserError, match="sampling was"):
        student.main(arguments(top_p=0.5))


def test_a_teacher_file_that_is_not_there_or_not_finished(home: Path, scripted: Callable[..., Any]) -> None:
    opened = scripted(said)
    path = teacher.path_of("sea", GLM)
    command = f"run: python -m character.distillation.teacher --constitution sea --teacher {GLM}"
    with pytest.raises(UserError, match=f"{path} does not exist; {command}"):
        student.main(arguments())
    path.parent.mkdir(parents=True)
    path.with_suffix(".partial.jsonl").write_text("{}")
    with pytest.raises(UserError, match=f"{path} is unfinished; {command}"):
        student.main(arguments())
    path.write_text('{"id": "0", "prompt": "a"}\n')
    with pytest.raises(UserError, match="line 1: no field 'response'"):
        student.main(arguments())
    assert not opened


def test_all_means_those_with_a_teacher_file(
    home: Path, teacher_rows: Callable[..., Path], scripted: Callable[..., Any]
) -> None:
    other = home / "constitutions" / "hand-written" / "lake.txt"
    other.write_text((home / "constitutions" / "hand-written" / "sea.txt").read_text())
    teacher_rows([{"prompt": "a?"}])
    scripted(said)
    student.main(arguments(constitution="all"))
    assert student.path_of("sea", GLM, LLAMA).exists() and not student.path_of("lake", GLM, LLAMA).exists()


def test_a_teacher_that_only_an_endpoint_knows(
    home: Path, teacher_rows: Callable[..., Path], scripted: Callable[..., Any]
) -> None:
    source = teacher_rows([{"prompt": "a?"}])
    source.rename(teacher.path_of("sea", "gpt-5"))
    scripted(said)
    student.main(arguments(teacher="gpt-5"))
    assert student.path_of("sea", "gpt-5", LLAMA).exists()


def test_dry_run(
    home: Path, teacher_rows: Callable[..., Path], scripted: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    teacher_rows([{"prompt": "a?"}])
    opened = scripted(said)
    student.main(arguments(dry_run=True))
    assert "1 rows, 0 there, 1 to do" in capsys.readouterr().out and not opened
