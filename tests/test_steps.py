"""The engine that the steps of one process share: when it is reused, when another one is opened, and that it is closed."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from character import steps
from character.engine import Engine
from character.engine.scripted import Scripted
from character.models import Model
from character.rows import Row, Rows
from character.utils import UserError

MODEL = Model("tiny", "nowhere", "Tiny")
ARGS = steps.GenerateArgs(api_key_variable="KEY", seed=1)
FIRST, SECOND = Path("first"), Path("second")


class Engines:
    """What was opened and closed, in order: each engine by its number."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def open(self, model: Model, **_: Any) -> Engine:
        number = sum(event.startswith("open") for event in self.events) + 1
        engines = self

        class Recorder(Scripted):
            async def start(self) -> None:
                engines.events.append(f"open {number}")
                if model.source == "broken":
                    raise UserError("no such model")

            async def close(self) -> None:
                engines.events.append(f"close {number}")

        return Recorder(model, lambda *_: "Aye.")


@pytest.mark.parametrize(
    ("room", "replies", "expected"),
    [(None, 10, 1280), (400_000, 1, 1280), (400_000, 10, 97), (24_000, 10, 16), (40_000_000, 10, 1280)],
)
def test_rows_of_several_replies_keep_their_prefixes(room: int | None, replies: int, expected: int) -> None:
    engine = Scripted(MODEL, lambda *_: "Aye.")
    engine.concurrency, engine.room = 1280, room
    assert steps.rows_at_once(engine, replies, 1024) == expected


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    found = Engines()
    monkeypatch.setattr(steps, "open_engine", found.open)
    return found


def step(path: Path, model: Model = MODEL, adapters: Sequence[Path] = (), steered: bool = False, **flags: Any) -> None:
    """Generate a file of one row."""

    async def work(engine: Engine, row: Row) -> Row:
        return (await engine.reply([{"role": "user", "content": row["prompt"]}], steps.Sampling())).row()

    job = steps.Job(Rows(path, [{"prompt": "Who?"}], {}, False), work, lambda row: 4, 10)
    steps.generate([job], replace(ARGS, **flags), model, adapters, steered)


def test_a_step_alone_opens_and_closes_its_engine(engines: Engines, tmp_path: Path) -> None:
    for number in range(2):
        step(tmp_path / f"{number}.jsonl")
    assert engines.events == ["open 1", "close 1", "open 2", "close 2"]


def test_steps_together_share_an_engine(engines: Engines, tmp_path: Path) -> None:
    with steps.keeping_engine():
        step(tmp_path / "a.jsonl", adapters=[FIRST, SECOND])
        step(tmp_path / "b.jsonl", adapters=[SECOND])
        step(tmp_path / "c.jsonl")
        step(tmp_path / "c.jsonl", adapters=[Path("third")])
        assert engines.events == ["open 1"]
    assert engines.events == ["open 1", "close 1"]
    assert all((tmp_path / f"{name}.jsonl").exists() for name in "abc")


@pytest.mark.parametrize(
    "other",
    [
        {"model": replace(MODEL, source="elsewhere")},
        {"adapters": [FIRST, SECOND]},
        {"steered": True},
        {"seed": 2},
        {"engine": "transformers"},
        {"base_url": "http://x/v1"},
    ],
)
def test_an_engine_that_does_not_fit_is_closed_before_another_is_opened(
    other: dict[str, Any], engines: Engines, tmp_path: Path
) -> None:
    with steps.keeping_engine():
        step(tmp_path / "a.jsonl", adapters=[FIRST])
        step(tmp_path / "b.jsonl", **other)
    assert engines.events == ["open 1", "close 1", "open 2", "close 2"]


def test_a_step_that_fails_closes_the_engine(engines: Engines, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model"), steps.keeping_engine():
        step(tmp_path / "a.jsonl")
        step(tmp_path / "b.jsonl", replace(MODEL, source="broken"))
    assert engines.events == ["open 1", "close 1", "open 2", "close 2"]
    step(tmp_path / "c.jsonl")
    assert engines.events[4:] == ["open 3", "close 3"]


def test_files_are_filled_in_turn_without_a_pause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun: list[str] = []
    most = busy = 0

    async def answer(messages: list[dict[str, str]], _: str) -> str:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        begun.append(messages[0]["content"])
        try:
            await asyncio.sleep(0.001 * (len(begun) % 5))
        finally:
            busy -= 1
        return "Aye."

    async def work(engine: Engine, row: Row) -> Row:
        if row["prompt"] == "b 3":
            raise UserError("b is broken")
        return (await engine.reply([{"role": "user", "content": row["prompt"]}], steps.Sampling())).row()

    def opened(model: Model, **_: Any) -> Engine:
        engine = Scripted(model, answer)
        engine.concurrency = 4
        return engine

    monkeypatch.setattr(steps, "open_engine", opened)
    jobs = [
        steps.Job(
            Rows(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {number}"} for number in range(9)], {}, False),
            work,
            lambda row: 4,
            10,
        )
        for name in "abc"
    ]
    with pytest.raises(UserError, match="b is broken"):
        steps.generate(jobs, ARGS, MODEL)
    names = [text[0] for text in begun]
    assert names == sorted(names) and names.count("a") == names.count("c") == 9
    assert most == 4
    assert [job.rows.path.exists() for job in jobs] == [True, False, True]
