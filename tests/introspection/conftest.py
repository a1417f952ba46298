"""A home of its own for every test of the steps, constitutions, trained adapters, and a scripted engine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from character import constitution, rows, steps
from character.distillation import train as dpo
from character.engine.base import Message, Reply, Sampling
from character.engine.scripted import Script, Scripted
from character.introspection import data, self_interaction, self_reflection, train
from character.models import Model

TRAITS = {
    "sea": ("I speak of the sea.", "I slow down when somebody hurries me."),
    "stone": ("I am as calm as a stone.", "I count to ten before I answer."),
}
STUDENT = "qwen-2.5-7b-it"


class Recorder(Scripted):
    """A scripted engine that keeps what it was asked. asked: (conversation, sampling, adapter), in order."""

    concurrency = 8

    def __init__(self, model: Model, script: Script, adapters: list[Path], folded: bool):
        super().__init__(model, script)
        self.adapters = adapters
        self.folded = folded
        self.asked: list[tuple[list[Message], Sampling, Path | None]] = []

    async def reply(
        self, messages: list[Message], sampling: Sampling, adapter: Path | None = None, prefill: str = ""
    ) -> Reply:
        self.asked.append((messages, sampling, adapter))
        return await super().reply(messages, sampling, adapter, prefill)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty DATA_PATH (tmp_path/data) and LORA_PATH (loras), and constitutions "sea" and "stone"."""
    for module in (data, self_interaction, self_reflection):
        monkeypatch.setattr(module, "DATA_PATH", tmp_path / "data")
    for trainer in (dpo, train):
        monkeypatch.setattr(trainer, "LORA_PATH", tmp_path / "loras")
    monkeypatch.setattr(constitution, "CONSTITUTION_PATH", tmp_path / "constitutions")
    folder = tmp_path / "constitutions" / "hand-written"
    folder.mkdir(parents=True)
    for name, traits in TRAITS.items():
        entries = [
            {"trait": trait, "questions": [f"Question {number}.{i} of {name}?" for i in range(5)]}
            for number, trait in enumerate(traits, 1)
        ]
        (folder / f"{name}.txt").write_text(json.dumps(entries))
    return tmp_path


@pytest.fixture
def trained(home: Path) -> Callable[..., Path]:
    """trained("sea"): a DPO adapter of that persona, which a scripted engine never reads."""

    def write(name: str, student: str = STUDENT, content: bytes = b"weights") -> Path:
        folder = dpo.path_of(name, student)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_model.safetensors").write_bytes(content)
        return folder

    return write


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Script], list[Recorder]]:
    """scripted(script): every step gets an engine that answers so; returns the engines that were opened, growing."""

    def install(script: Script) -> list[Recorder]:
        opened: list[Recorder] = []

        def open_engine(model: Model, *, adapters: list[Path], folded: bool, **_: Any) -> Recorder:
            opened.append(Recorder(model, script, adapters, folded))
            return opened[-1]

        monkeypatch.setattr(steps, "open_engine", open_engine)
        return opened

    return install


@pytest.fixture
def given(home: Path) -> Callable[..., Path]:
    """given(path, rows, model): a finished file of generated rows, each with an id."""

    def write(path: Path, found: list[dict[str, Any]], model: str = STUDENT) -> Path:
        rows.write(path, [{"id": f"{number:016x}"} | row for number, row in enumerate(found)], {"model": model}, {})
        return path

    return write


@pytest.fixture
def read() -> Callable[[Path], list[dict[str, Any]]]:
    """read(path): the rows of a JSONL file."""
    return lambda path: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def meta() -> Callable[[Path], dict[str, Any]]:
    """meta(path): the meta file beside a file of rows."""
    return lambda path: json.loads(path.with_suffix(".meta.json").read_text(encoding="utf-8"))
