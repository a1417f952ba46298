"""A home of its own for every test of the steps, a small constitution, and a scripted engine behind the steps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from character import constitution, rows, steps
from character.distillation import data, student, teacher, train
from character.engine.base import Message, Reply, Sampling
from character.engine.scripted import Script, Scripted
from character.models import Model

TRAITS = ("I speak of the sea.", "I slow down when somebody hurries me.")


class Recorder(Scripted):
    """A scripted engine that keeps what it was asked."""

    concurrency = 3

    def __init__(self, model: Model, script: Script):
        super().__init__(model, script)
        self.samplings: list[Sampling] = []
        self.prefills: list[str] = []

    async def reply(
        self, messages: list[Message], sampling: Sampling, adapter: Path | None = None, prefill: str = ""
    ) -> Reply:
        self.samplings.append(sampling)
        self.prefills.append(prefill)
        return await super().reply(messages, sampling, adapter, prefill)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty DATA_PATH (tmp_path/data), LORA_PATH (loras) and CONSTITUTION_PATH (constitutions) with "sea"."""
    for module in (teacher, data):
        monkeypatch.setattr(module, "DATA_PATH", tmp_path / "data")
    monkeypatch.setattr(train, "LORA_PATH", tmp_path / "loras")
    monkeypatch.setattr(constitution, "CONSTITUTION_PATH", tmp_path / "constitutions")
    write_constitution(tmp_path, "sea", TRAITS)
    return tmp_path


def write_constitution(home: Path, name: str, traits: tuple[str, ...]) -> Path:
    path = home / "constitutions" / "hand-written" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [
        {"trait": trait, "questions": [f"Question {number}.{i} of {name}?" for i in range(5)]}
        for number, trait in enumerate(traits, 1)
    ]
    path.write_text(json.dumps(entries, indent=1))
    return path


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Recorder]]:
    """scripted(script): every step gets an engine that answers so; returns the engines that were opened, growing."""

    def install(script: Script, **attributes: Any) -> list[Recorder]:
        opened: list[Recorder] = []

        def open_engine(model: Model, **_: Any) -> Recorder:
            engine = Recorder(model, script)
            for name, value in attributes.items():
                setattr(engine, name, value)
            opened.append(engine)
            return engine

        monkeypatch.setattr(steps, "open_engine", open_engine)
        return opened

    return install


@pytest.fixture
def general(home: Path) -> str:
    """A JSONL of three general messages, the last of which is the constitution's own too."""
    path = home / "general.jsonl"
    messages = ["What is bread?", "Why is ice cold?", "Question 1.0 of sea?"]
    path.write_text("".join(json.dumps({"prompt": message}) + "\n" for message in messages))
    return str(path)


@pytest.fixture
def teacher_rows(home: Path) -> Callable[[list[dict[str, Any]]], Path]:
    """Write a teacher's file for "sea", as glm-4.5-air's; each row has a prompt and what a test sets."""

    def write(given: list[dict[str, Any]]) -> Path:
        path = teacher.path_of("sea", "glm-4.5-air")
        whole = [{"trait": 0, "sample": 0, "response": "Aye.", "finish_reason": "stop"} | row for row in given]
        rows.write(path, [{"id": f"{i:016x}"} | row for i, row in enumerate(whole)], {}, {})
        return path

    return write


@pytest.fixture
def student_rows(home: Path) -> Callable[[list[dict[str, Any]], str], Path]:
    """Write a student's file beside it; row n answers the teacher's row n unless it says otherwise."""

    def write(given: list[dict[str, Any]], short: str) -> Path:
        path = student.path_of("sea", "glm-4.5-air", short)
        whole = [
            {"id": f"{1000 + i:016x}", "teacher_row": f"{i:016x}", "response": "Yes.", "finish_reason": "stop"} | row
            for i, row in enumerate(given)
        ]
        rows.write(path, whole, {}, {})
        return path

    return write


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def jsonl() -> Callable[[Path], list[dict[str, Any]]]:
    """jsonl(path): the rows of a file."""
    return read
