"""A server on loopback that speaks as an OpenAI-compatible endpoint, or fails in any way that a test scripts.

async with FaultServer(answer) as server:   # answer(request) -> what to do
    engine = OpenAIEngine(model, server.url, ...)
"""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Self


@dataclass
class Request:
    """What came in. at: seconds of the monotonic clock."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    at: float = field(default_factory=time.monotonic)

    @property
    def last(self) -> str:
        """The last message of a chat request."""
        text: str = self.body["messages"][-1]["content"]
        return text


@dataclass
class Answer:
    """What goes out. body: JSON, or bytes as they are. sent: how much of the body, before the connection is cut."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = "application/json"
    sent: float = 1.0


CUT = Answer(sent=0)
STALL = None
Script = Callable[[Request], Answer | None]


def completion(text: str | None, finish: str | None = "stop", usage: Any = (7, 3), **fields: Any) -> Answer:
    """A chat completion. fields: further fields of the message."""
    body: dict[str, Any] = {
        "object": "chat.completion",
        "model": "served",
        "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **fields}}],
    }
    if usage:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return Answer(body)


def refusal(message: str, status: int = 400, **fields: Any) -> Answer:
    """An error as OpenAI words it. fields: param, code, type."""
    return Answer({"error": {"message": message, **fields}}, status)


class FaultServer:
    """Answers each request with answer(request); None stalls until the client goes away.

    models: what GET /v1/models lists, or an Answer, or a script of answers; None where the route is missing.
    requests: all others, in order of arrival. gone: how many clients left a stall. most: connections open at once.
    """

    def __init__(
        self,
        answer: Script,
        models: list[dict[str, Any]] | Answer | Script | None = None,
        delay: float = 0.0,
        port: int = 0,
    ):
        self._port = port
        self.answer = answer
        self.models = models
        self.delay = delay
        self.requests: list[Request] = []
        self.gone = 0
        self.most = 0
        self._open = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    @property
    def bodies(self) -> list[Any]:
        """What was asked for, in order of arrival."""
        return [request.body for request in self.requests]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, backlog=2048)
        return self

    def close(self) -> None:
        """Go away: connections are cut and no new ones taken."""
        self._server.close()
        for task in self._tasks:
            task.cancel()

    async def __aexit__(self, *_: object) -> None:
        self.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _list(self, request: Request) -> Answer:
        if callable(self.models):
            answer = self.models(request)
            assert answer
            return answer
        if isinstance(self.models, Answer):
            return self.models
        if self.models is None:
            return refusal("no such route", 404)
        return Answer({"object": "list", "data": self.models})

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._open += 1
        self.most = max(self.most, self._open)
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            # The client has gone, or the test is over.
            return
        finally:
            self._open -= 1
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; False where the connection ends with it."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        request = Request(method, path, headers, json.loads(raw) if raw else None)
        if path == "/v1/models":
            answer = self._list(request)
        else:
            self.requests.append(request)
            await asyncio.sleep(self.delay)
            scripted = self.answer(request)
            if scripted is None:
                # Reading ends when the client closes its end.
                await reader.read(1)
                self.gone += 1
                return False
            answer = scripted
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}", f"Content-Length: {len(body)}"]
        lines += [f"Content-Type: {answer.kind}", *(f"{name}: {value}" for name, value in answer.headers.items())]
        if answer.sent:
            writer.write("\r\n".join([*lines, "", ""]).encode() + body[: int(len(body) * answer.sent)])
            await writer.drain()
        return answer.sent == 1


def in_turn(*answers: Answer | None) -> Script:
    """A script that gives these answers, the last one again and again."""
    left = list(answers)
    return lambda request: left.pop(0) if len(left) > 1 else left[0]
