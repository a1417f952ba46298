"""The connection against a server that fails in every way that a test can script: what is tried again, when, how often."""

import asyncio
import email.utils
import itertools
import json
import time
from collections.abc import Callable

import pytest

import character.engine.connection as module
from character.engine.connection import Connection
from character.rows import RowError
from character.utils import UserError
from tests.engine.fault_server import CUT, STALL, Answer, FaultServer, Request, Script, completion, in_turn, refusal

pytestmark = pytest.mark.usefixtures("short_waits")


def ask(script: Script) -> tuple[str, FaultServer]:
    """The text of one answer, and the server that gave it."""

    async def inside() -> tuple[str, FaultServer]:
        async with FaultServer(script) as server:
            connection = Connection(server.url, "key", "SOME_API_KEY", 1)
            try:
                async with connection.slot():
                    answer = await connection.request("/chat/completions", {"messages": []})
            finally:
                await connection.close()
            return answer["choices"][0]["message"]["content"], server

    return asyncio.run(inside())


@pytest.mark.parametrize(
    "faults",
    [
        [refusal("busy", 500)] * 2,
        [refusal("busy", 503)],
        [refusal("slow down", 429)],
        [refusal("too slow", 408), refusal("conflict", 409)],
        [CUT] * 2,
        [Answer(completion("Hi.").body, sent=0.5)],
        [Answer(json.dumps(completion("Hi.").body).encode()[:40])],
        [Answer(b"<html>Bad gateway</html>", kind="text/html")],
        [Answer({"error": {"message": "overloaded", "code": 502}})],
        [Answer({"choices": []}), Answer([])],
        [Answer({"choices": [{"finish_reason": "stop", "message": None}]})],
        [Answer(b'{"choices": "\xff\xfe"}')],
        [STALL],
    ],
    ids=["500", "503", "429", "408", "cut", "half", "half-json", "page", "error-200", "none", "null", "bytes", "stall"],
)
def test_a_fault_that_passes_is_tried_again(faults: list[Answer | None], monkeypatch: pytest.MonkeyPatch) -> None:
    if STALL in faults:
        monkeypatch.setattr(module, "READ_SECONDS", 0.5)
    text, server = ask(in_turn(*faults, completion("Hi.")))
    assert text == "Hi."
    assert len(server.requests) == len(faults) + 1


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (refusal("overloaded", 500), "HTTP 500: overloaded"),
        (CUT, "disconnected"),
        (Answer(b'{"choi'), "no JSON"),
        (Answer({"error": {"message": "overloaded"}}), "overloaded"),
        (STALL, "timed out"),
    ],
    ids=["500", "cut", "half-json", "error-200", "stall"],
)
def test_a_fault_that_stays_costs_the_row(fault: Answer | None, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault is STALL:
        monkeypatch.setattr(module, "READ_SECONDS", 0.2)
    seen: list[Request] = []
    with pytest.raises(RowError, match=f"{cause}.*3 tries"):
        ask(lambda request: seen.append(request) or fault)  # type: ignore[func-returns-value]
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        (lambda: {}, 0.0, 0.6),
        (lambda: {"Retry-After": "0.6"}, 0.6, 1.6),
        # A date has whole seconds, so that up to one is lost.
        (lambda: {"Retry-After": email.utils.formatdate(time.time() + 1.7, usegmt=True)}, 0.65, 2.7),
        (lambda: {"Retry-After": email.utils.formatdate(time.time() + 1.7)}, 0.65, 2.7),
    ],
    ids=["none", "seconds", "date", "date without a zone"],
)
def test_retry_after_is_honoured(header: Callable[[], dict[str, str]], least: float, most: float) -> None:
    def script(request: Request) -> Answer | None:
        seen.append(request)
        return Answer(status=429, headers=header()) if len(seen) == 1 else completion("Hi.")

    seen: list[Request] = []
    ask(script)
    assert least <= seen[1].at - seen[0].at < most


def test_retry_after_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_RETRY_AFTER", 0.3)
    slow = refusal("slow down", 429)
    slow.headers["Retry-After"] = "3600"
    _, server = ask(in_turn(slow, completion("Hi.")))
    assert 0.3 <= server.requests[1].at - server.requests[0].at < 3


def test_a_retry_after_that_cannot_be_read_is_ignored() -> None:
    slow = refusal("slow down", 429)
    slow.headers["Retry-After"] = "soon"
    assert ask(in_turn(slow, completion("Hi.")))[0] == "Hi."


def test_back_off_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FIRST_WAIT": 0.1, "LONGEST_WAIT": 5.0, "ATTEMPTS": 4}.items():
        monkeypatch.setattr(module, name, value)
    _, server = ask(in_turn(*[refusal("busy", 500)] * 3, completion("Hi.")))
    times = [request.at for request in server.requests]
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    for wait, least in zip(waits, (0.1, 0.2, 0.4), strict=True):
        assert least <= wait < least + 0.1 + 0.5


def test_a_reply_takes_no_longer_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"REPLY_SECONDS": 0.7, "ATTEMPTS": 1000}.items():
        monkeypatch.setattr(module, name, value)
    started = time.monotonic()
    with pytest.raises(RowError):
        ask(in_turn(STALL))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://here/v1", "http://", "here"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(UserError, match="no URL"):
        Connection(url, None, "SOME_API_KEY", 1)


def test_a_key_with_stray_characters_is_named() -> None:
    with pytest.raises(UserError, match="SOME_API_KEY holds characters"):
        Connection("http://127.0.0.1:1/v1", "“sk-123”", "SOME_API_KEY", 1)
