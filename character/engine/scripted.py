"""Canned replies behind the engine's interface, so that steps can be tested without weights."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path

from character.engine.base import Engine, Message, Reply, Sampling, Steering
from character.models import Model

Script = Callable[[list[Message], str], str | Reply | Awaitable[str | Reply]]


class Scripted(Engine):
    """Answers with script(messages, prefill), whatever the choices. A text is a finished reply with one token per word."""

    def __init__(self, model: Model, script: Script):
        super().__init__(model)
        self.script = script
        self.calls: list[list[Message]] = []

    async def reply(
        self,
        messages: list[Message],
        sampling: Sampling,
        adapter: Path | None = None,
        prefill: str = "",
        steering: Steering | None = None,
    ) -> Reply:
        self.calls.append(messages)
        await asyncio.sleep(0)
        answer = self.script(messages, prefill)
        if inspect.isawaitable(answer):
            answer = await answer
        if isinstance(answer, Reply):
            return answer
        words = sum(len(message["content"].split()) for message in messages)
        return Reply(answer, "stop", words, len(answer.split()))
