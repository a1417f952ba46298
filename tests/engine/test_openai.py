"""The openai engine against a server that fails, refuses and forgets in every way that a test can script."""

import asyncio
import gc
import json
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import character.engine.connection as module
from character.engine import Message, Reply, Sampling, open_engine
from character.engine.openai import OpenAIEngine
from character.models import Model, Reasoning
from character.rows import Row, RowError, Rows
from character.utils import UserError
from tests.engine.fault_server import (
    CUT,
    STALL,
    Answer,
    FaultServer,
    Request,
    Script,
    completion,
    in_turn,
    refusal,
)

KEY = "sk-not-a-real-key-0123456789"
VARIABLE = "SOME_API_KEY"
PLAIN = Model("served", "served", "Served")
THINKER = Model("served", "served", "Served", reasoning=Reasoning())
HOSTED = [{"id": "served", "object": "model", "owned_by": "somebody"}]
VLLM = [{"id": "served", "owned_by": "vllm", "root": "/weights/served", "parent": None, "max_model_len": 1000}]
SAMPLING = Sampling(temperature=0.5, top_p=0.9, repetition_penalty=1.0, max_tokens=100)
HELLO: list[Message] = [{"role": "user", "content": "Hello"}]
pytestmark = pytest.mark.usefixtures("short_waits")


def talk(turns: int, system: str | None = "Be kind.") -> list[Message]:
    """A conversation whose last message is turn `turns`, a user's."""
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return [*opening, *({"role": roles[i % 2], "content": f"turn {i}"} for i in range(turns + 1))]


def engine_at(url: str, model: Model = PLAIN, key: str | None = KEY) -> OpenAIEngine:
    """The engine under test."""
    return OpenAIEngine(model, url, key, VARIABLE, 1)


def run(
    script: Script,
    use: Callable[[OpenAIEngine, FaultServer], Awaitable[Any]],
    models: Any = HOSTED,
    model: Model = PLAIN,
    key: str | None = KEY,
    delay: float = 0.0,
) -> Any:
    """What use(engine, server) returns, with the engine at a server that follows `script`."""

    async def inside() -> Any:
        async with FaultServer(script, models, delay) as server, engine_at(server.url, model, key) as engine:
            return await use(engine, server)

    return asyncio.run(inside())


def ask(
    script: Script, messages: list[Message] = HELLO, sampling: Sampling = SAMPLING, **options: Any
) -> tuple[Reply, FaultServer, list[str]]:
    """One reply, the server that gave it, and the engine's notes."""
    given = {name: options.pop(name) for name in ("adapter", "prefill") if name in options}

    async def use(engine: OpenAIEngine, server: FaultServer) -> tuple[Reply, FaultServer, list[str]]:
        return await engine.reply(messages, sampling, **given), server, engine.info.notes

    result: tuple[Reply, FaultServer, list[str]] = run(script, use, **options)
    return result


# A whole reply.


def test_reply_and_request() -> None:
    reply, server, notes = ask(lambda request: completion("Hi.", usage=(12, 2)), talk(2))
    assert reply == Reply("Hi.", "stop", 12, 2)
    assert server.bodies == [
        {"model": "served", "messages": talk(2), "temperature": 0.5, "top_p": 0.9, "max_tokens": 100}
    ]
    assert server.requests[0].path == "/v1/chat/completions"
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert notes == [f"endpoint {server_url(notes)}"]


def server_url(notes: list[str]) -> str:
    """The endpoint's URL as the notes give it."""
    return notes[0].removeprefix("endpoint ")


@pytest.mark.parametrize(("given", "expected"), [("stop", "stop"), ("length", "length"), ("end_turn", "stop")])
def test_finish_reasons(given: str, expected: str) -> None:
    assert ask(lambda request: completion("Hi.", given))[0].finish_reason == expected


@pytest.mark.parametrize("reason", ["content_filter", "tool_calls", None])
def test_a_reply_that_did_not_finish_is_no_reply(reason: str | None) -> None:
    with pytest.raises(RowError, match=f"not finished.*{reason}"):
        ask(lambda request: completion("Hi.", reason))


def test_empty_content_is_an_empty_text() -> None:
    assert ask(lambda request: completion(None, "length"))[0].text == ""
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Hi."}]
    assert ask(lambda request: completion(parts))[0].text == "Hi."  # type: ignore[arg-type]


def test_a_trace_kept_apart_is_ignored() -> None:
    for field in ("reasoning", "reasoning_content"):
        assert ask(lambda request, f=field: completion("Hi.", **{f: "Hm."}), model=THINKER)[0].text == "Hi."  # type: ignore[misc]


def test_without_usage_figures_lengths_are_zero_and_noted() -> None:
    reply, _, notes = ask(lambda request: completion("Hi.", usage=None))
    assert (reply.prompt_tokens, reply.completion_tokens) == (0, 0)
    assert any("no usage figures" in note for note in notes)


def test_the_name_in_the_replies_is_noted_where_it_is_another() -> None:
    def script(request: Request) -> Answer | None:
        answer = completion("Hi.")
        answer.body["model"] = "served-2024-08-06"
        return answer

    assert "replies came from served-2024-08-06" in ask(script)[2]


# What costs a row.


def test_other_refusals_are_not_tried_again() -> None:
    seen: list[Request] = []
    with pytest.raises(RowError, match="HTTP 400: the message is unkind"):
        ask(lambda request: seen.append(request) or refusal("the message is unkind"))  # type: ignore[func-returns-value]
    assert len(seen) == 1


def test_rows_that_fail_are_named_and_tried_again_while_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command twice: with a server that fails on some rows, and with one that has recovered."""
    faults: dict[str, Answer | None] = {"n2": refusal("overloaded", 500), "n5": CUT, "n7": Answer(b'{"ch'), "n8": STALL}
    inputs = [{"prompt": f"n{i}"} for i in range(40)]
    path = tmp_path / "rows.jsonl"
    asked: Counter[str] = Counter()
    broken = True

    def script(request: Request) -> Answer | None:
        asked[request.last] += 1
        return faults[request.last] if broken and request.last in faults else completion(f"to {request.last}")

    async def use(engine: OpenAIEngine, server: FaultServer) -> None:
        async def work(row: Row) -> Row:
            reply = await engine.reply([{"role": "user", "content": row["prompt"]}], SAMPLING)
            return {"text": reply.text}

        await Rows(path, inputs, {"made": "here"}).fill(work, info=lambda: vars(engine.info))

    monkeypatch.setattr(module, "READ_SECONDS", 0.7)
    with pytest.raises(UserError) as error:
        run(script, use)
    assert "4 of 40 rows failed" in str(error.value)
    assert "again" in str(error.value)
    causes = ("HTTP 500: overloaded", "disconnected", "no JSON", "timed out")
    assert sum(cause in str(error.value) for cause in causes) == 3, "the first three are shown"
    assert not path.exists()
    kept = [json.loads(line) for line in (tmp_path / "rows.partial.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in kept} == {f"n{i}" for i in range(40)} - faults.keys()

    broken = False
    monkeypatch.setattr(module, "READ_SECONDS", 20.0)
    asked.clear()
    run(script, use)
    assert asked == dict.fromkeys(faults, 1)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["prompt"], row["text"]) for row in rows] == [(f"n{i}", f"to n{i}") for i in range(40)]
    meta = path.with_suffix(".meta.json").read_text()
    assert "endpoint http://127.0.0.1" in meta
    assert KEY not in meta


# What ends the run.


@pytest.mark.parametrize("where", ["start", "reply"])
@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_names_its_variable_and_not_itself(status: int, where: str) -> None:
    answer = refusal(f"Incorrect API key provided: {KEY}, or {KEY[:9]}*****{KEY[-4:]}.", status)
    with pytest.raises(UserError) as error:
        ask(lambda request: answer, models=answer if where == "start" else HOSTED)
    assert VARIABLE in str(error.value)
    assert str(status) in str(error.value)
    assert KEY[:9] not in str(error.value)
    assert KEY[-4:] not in str(error.value)


def test_a_missing_key_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # Another provider's key is not to be sent in place of the one that is missing.
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    seen: list[Request] = []
    with pytest.raises(UserError, match=f"wants a key: set {VARIABLE}"):
        ask(lambda request: seen.append(request) or refusal("no key", 401), key=None)  # type: ignore[func-returns-value]
    assert KEY not in str(seen[0].headers)


def test_the_key_is_in_no_message_note_or_repr(capfd: pytest.CaptureFixture[str]) -> None:
    async def use(engine: OpenAIEngine, server: FaultServer) -> list[str]:
        said = [repr(engine), str(engine), repr(engine.info)]
        for text in ("500", "400", "200", "ok"):
            try:
                said.append(repr(await engine.reply([{"role": "user", "content": text}], SAMPLING)))
            except RowError as error:
                said.append(str(error))
        return said

    def script(request: Request) -> Answer | None:
        echo = f"you sent {request.headers['authorization']} and {KEY}"
        status = {"500": 500, "400": 400, "200": 200}.get(request.last)
        return refusal(echo, status) if status else completion("Hi.")

    said = run(script, use)
    output = capfd.readouterr()
    assert len([text for text in said if "you sent" in text]) == 3
    assert KEY not in "".join(said) + output.out + output.err


def test_a_password_in_the_url_is_in_no_message_or_note() -> None:
    echo = refusal("no entry for http://someone:password99@here/v1?token=hidden99", 403)

    async def inside() -> str:
        async with FaultServer(lambda request: echo, None) as server:
            url = server.url.replace("http://", "http://someone:password99@") + "?token=hidden99"
            engine = engine_at(url)
            with pytest.raises(UserError, match=VARIABLE) as error:
                async with engine:
                    await engine.reply(HELLO, SAMPLING)
            return str(error.value) + repr(engine.info)

    said = asyncio.run(inside())
    assert "password99" not in said
    assert "hidden99" not in said


def test_an_unknown_model_lists_those_served() -> None:
    models = [{"id": "one"}, {"id": "two"}]
    with pytest.raises(UserError, match="does not serve served; it serves: one, two"):
        ask(lambda request: completion("Hi."), models=models)


@pytest.mark.parametrize(
    "answer",
    [refusal("The model `served` does not exist.", 404), refusal("Invalid model: served", 400, code="invalid_model")],
    ids=["404", "400"],
)
def test_a_model_unknown_when_asked_ends_the_run(answer: Answer) -> None:
    with pytest.raises(UserError, match=r"no model served.*lists no models"):
        ask(lambda request: answer, models=None)


@pytest.mark.parametrize(
    "models",
    [
        None,
        [],
        [{"id": "models/served"}],
        [{"id": "another", "owned_by": "vllm", "root": "served"}],
        Answer([{"id": "served"}]),
    ],
    ids=["no route", "empty", "prefixed", "root", "bare list"],
)
def test_lists_of_models_take_many_forms(models: Any) -> None:
    def script(request: Request) -> Answer | None:
        return refusal("no such route", 404) if request.path.endswith("/render") else completion("Hi.")

    reply, server, _ = ask(script, models=models)
    listed = models[0]["id"] if isinstance(models, list) and models else "served"
    assert reply.text == "Hi."
    assert server.bodies[-1]["model"] == listed


def test_a_page_in_place_of_the_list_is_no_endpoint() -> None:
    with pytest.raises(UserError, match=r"no OpenAI-compatible endpoint.*/v1"):
        ask(lambda request: completion("Hi."), models=Answer(b"<html></html>", kind="text/html"))


def test_a_list_that_fails_for_a_while() -> None:
    listed = in_turn(refusal("loading", 503), Answer({"data": HOSTED}))
    assert ask(lambda request: completion("Hi."), models=listed)[0].text == "Hi."
    with pytest.raises(UserError, match="cannot be used: HTTP 503: loading"):
        ask(lambda request: completion("Hi."), models=refusal("loading", 503))


def test_no_server_at_the_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    started = time.monotonic()
    with pytest.raises(UserError, match=f"no answer from {url}.*start the server"):
        asyncio.run(engine_at(url).__aenter__())
    assert time.monotonic() - started < 5


def test_a_server_that_goes_away_ends_the_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first reply finds out, after its tries; those that come later need none."""

    async def inside() -> None:
        async with FaultServer(lambda request: completion("Hi."), HOSTED) as server:
            url = server.url
            engine = engine_at(url)
            await engine.start()
        with pytest.raises(UserError, match=r"no longer answers.*finished rows are kept"):
            await engine.reply(HELLO, SAMPLING)
        for wait in ("FIRST_WAIT", "LONGEST_WAIT"):
            monkeypatch.setattr(module, wait, 20)
        async with asyncio.timeout(5):
            with pytest.raises(UserError, match="no longer answers"):
                await engine.reply(HELLO, SAMPLING)
        async with FaultServer(lambda request: completion("Hi."), HOSTED, port=urlsplit(url).port or 0):
            assert (await engine.reply(HELLO, SAMPLING)).text == "Hi.", "it is back"
        await engine.close()

    asyncio.run(inside())


def test_a_server_that_goes_away_in_the_middle_costs_no_finished_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command twice: the server is gone after ten answers, and is there again."""
    path = tmp_path / "rows.jsonl"
    asked: list[str] = []

    async def fill(engine: OpenAIEngine, server: FaultServer, last: int) -> None:
        async def work(row: Row) -> Row:
            if len(asked) == last:
                server.close()
            reply = await engine.reply([{"role": "user", "content": row["prompt"]}], SAMPLING)
            asked.append(row["prompt"])
            return {"text": reply.text}

        await Rows(path, [{"prompt": f"n{i}"} for i in range(40)], {"made": "here"}).fill(work, concurrency=2)

    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)
    with pytest.raises(UserError, match=r"no longer answers .*; finished rows are kept") as error:
        run(lambda request: completion("Hi."), partial(fill, last=10))
    assert "\n" not in str(error.value)
    kept = (tmp_path / "rows.partial.jsonl").read_text().splitlines()
    assert 10 <= len(kept) == len(asked) < 40

    run(lambda request: completion("Hi."), partial(fill, last=-1))
    assert sorted(asked) == sorted(f"n{i}" for i in range(40)), "each row is asked for once"
    assert len(path.read_text().splitlines()) == 40


def test_an_account_without_credit_is_not_asked_again() -> None:
    seen: list[Request] = []
    with pytest.raises(UserError, match="no credit"):
        ask(lambda request: seen.append(request) or refusal("quota", 429, code="insufficient_quota"))  # type: ignore[func-returns-value]
    assert len(seen) == 1


def test_a_flagged_message_costs_only_its_row() -> None:
    with pytest.raises(RowError, match="flagged"):
        ask(lambda request: refusal("your input was flagged", 403))


# What endpoints refuse, once.


def refuses(fields: dict[str, str], wording: str = "Unsupported parameter: '{}' is not supported.") -> Script:
    """A script that refuses any of `fields` with its own wording, or with the common one."""

    def script(request: Request) -> Answer | None:
        for field, message in fields.items():
            if field in request.body:
                return refusal((message or wording).format(field), param=field)
        return completion("Hi.")

    return script


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        (
            {"max_tokens": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."},
            {"temperature": 0.5, "top_p": 0.9, "max_completion_tokens": 100},
        ),
        (
            {
                "temperature": "Unsupported value: 'temperature' does not support 0.5. Only the default (1) is supported."
            },
            {"top_p": 0.9, "max_tokens": 100},
        ),
        ({"top_p": "`temperature` and `top_p` cannot both be specified."}, {"temperature": 0.5, "max_tokens": 100}),
        (
            {"max_tokens": "Use max_completion_tokens instead.", "temperature": "", "top_p": ""},
            {"max_completion_tokens": 100},
        ),
    ],
    ids=["max_tokens", "temperature", "both", "all"],
)
def test_a_refused_setting_is_left_out_from_then_on(fields: dict[str, str], kept: dict[str, Any]) -> None:
    async def use(engine: OpenAIEngine, server: FaultServer) -> None:
        assert (await engine.reply(HELLO, SAMPLING)).text == "Hi."
        learned = len(server.requests)
        assert learned == len(fields) + 1
        await engine.reply(HELLO, SAMPLING)
        assert len(server.requests) == learned + 1
        assert server.bodies[-1] == {"model": "served", "messages": HELLO, **kept}
        for field in ("temperature", "top_p"):
            assert any(note.startswith(field) for note in engine.info.notes) == (field not in kept)

    run(refuses(fields), use)


def test_a_refused_setting_in_a_validation_list() -> None:
    def script(request: Request) -> Answer | None:
        if "top_p" in request.body:
            fault = {"type": "extra_forbidden", "loc": ["body", "top_p"], "msg": "Extra inputs are not permitted"}
            return Answer({"detail": [fault]}, 422)
        return completion("Hi.")

    assert "top_p" not in ask(script)[1].bodies[-1]


def test_many_in_flight_learn_the_same_refusals_together() -> None:
    """All are refused before the first has learned anything."""
    script = refuses({"max_tokens": "Use max_completion_tokens instead.", "temperature": ""})

    def and_no_system(request: Request) -> Answer | None:
        if request.body["messages"][0]["role"] == "system":
            return refusal("System role not supported")
        return script(request)

    async def use(engine: OpenAIEngine, server: FaultServer) -> list[Reply]:
        return await asyncio.gather(*(engine.reply(talk(2), SAMPLING) for _ in range(20)))

    assert {reply.text for reply in run(and_no_system, use, delay=0.02)} == {"Hi."}


def test_repetition_penalty_is_for_vllm() -> None:
    sampling = Sampling(repetition_penalty=1.2)
    _, server, notes = ask(lambda request: completion("Hi."), sampling=sampling)
    assert "repetition_penalty" not in server.bodies[-1]
    assert any("repetition_penalty left out" in note for note in notes)
    _, server, notes = ask(vllm(), sampling=sampling, models=VLLM)
    assert server.bodies[-1]["repetition_penalty"] == 1.2
    assert (server.bodies[-1]["top_k"], server.bodies[-1]["min_p"]) == (-1, 0)
    assert not any("repetition_penalty" in note for note in notes)


# Choices.

AB = replace(SAMPLING, choices=("A", "B"))
REFUSALS = [
    refusal("Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model."),
    refusal("This response_format type is unavailable now"),
    refusal("This model does not support response format `json_schema`.", param="response_format"),
]


@pytest.mark.parametrize(
    ("content", "text", "noted"),
    [
        ('{"choice": "B"}', "B", False),
        ("A", "A", False),
        ("B, since it is kind.", "B, since it is kind.", True),
        ('{"choice": 2}', '{"choice": 2}', True),
        ('{"verdict": "A"}', '{"verdict": "A"}', True),
        ("[1]", "[1]", True),
        (None, "", True),
    ],
)
def test_choices_are_asked_for_as_json_and_unwrapped(content: str | None, text: str, noted: bool) -> None:
    reply, server, notes = ask(lambda request: completion(content), sampling=AB)
    assert reply.text == text
    given = server.bodies[0]["response_format"]["json_schema"]
    assert given["strict"] and given["schema"]["properties"] == {"choice": {"type": "string", "enum": ["A", "B"]}}
    assert any("does not keep to them" in note for note in notes) == noted
    assert "response_format" not in ask(lambda request: completion('{"choice": "B"}'))[1].bodies[0]


@pytest.mark.parametrize("answer", REFUSALS)
def test_choices_are_left_out_where_they_are_refused(answer: Answer) -> None:
    def script(request: Request) -> Answer | None:
        return answer if "response_format" in request.body else completion("A")

    reply, server, notes = ask(script, sampling=AB)
    assert (reply.text, len(server.requests)) == ("A", 2)
    assert server.bodies[-1] == {key: value for key, value in server.bodies[0].items() if key != "response_format"}
    assert "response_format left out: the endpoint refuses it" in notes


def test_vllm_and_a_model_that_reasons_take_choices_in_their_own_way() -> None:
    for prefill in ("", "I say"):
        _, server, _ = ask(vllm(), sampling=AB, models=VLLM, prefill=prefill)
        assert server.bodies[-1]["structured_outputs"] == {"choice": ["A", "B"]}
    reply, server, notes = ask(lambda request: completion("<think>\nHm.</think>B"), sampling=AB, model=THINKER)
    assert reply.text == "<think>\nHm.</think>B" and notes == [f"endpoint {server_url(notes)}"]
    assert "response_format" not in server.bodies[0]


@pytest.mark.parametrize(
    "message",
    [
        "System role not supported",
        "Conversation roles must alternate user/assistant/user/assistant/...",
        "Developer instruction is not enabled for models/gemma-3",
        "Invalid value: 'system' is not a supported role",
    ],
)
def test_a_refused_system_role_is_folded_into_the_first_turn(message: str) -> None:
    def script(request: Request) -> Answer | None:
        return refusal(message) if request.body["messages"][0]["role"] == "system" else completion("Hi.")

    async def use(engine: OpenAIEngine, server: FaultServer) -> None:
        for _ in range(2):
            await engine.reply(talk(2), SAMPLING)
        assert len(server.requests) == 3
        first, *rest = server.bodies[-1]["messages"]
        assert first == {"role": "user", "content": "Be kind.\n\nturn 0"}
        assert rest == talk(2)[2:]
        assert any("folded" in note for note in engine.info.notes)

    run(script, use)


def test_a_smaller_reply_limit_is_kept_to() -> None:
    def script(request: Request) -> Answer | None:
        if request.body["max_tokens"] > 60:
            return refusal("max_tokens is too large: 100. This model supports at most 60 completion tokens.")
        return completion("Hi.")

    _, server, notes = ask(script)
    assert server.bodies[-1]["max_tokens"] == 60
    assert "replies limited to 60 tokens by the endpoint" in notes


# Conversations that are too long.

TOO_LONG = [
    "This model's maximum context length is 400 tokens. However, your messages resulted in 900 tokens.",
    "prompt is too long: 900 tokens > 400 maximum",
    "the request exceeds the available context size, try increasing it",
    "The input token count (900) exceeds the maximum number of tokens allowed (400).",
    "Please reduce the length of the messages or completion.",
    "The input (900 tokens) is longer than the model's context length (400 tokens).",
    "`inputs` tokens + `max_new_tokens` must be <= 400. Given: 900 `inputs` tokens",
    "Prompt contains 900 tokens, too large for model with 400 maximum context length",
]


def fits(turns: int, message: str) -> Script:
    """A script that takes at most `turns` messages besides the system prompt."""

    def script(request: Request) -> Answer | None:
        spoken = [turn for turn in request.body["messages"] if turn["role"] != "system"]
        return completion("Hi.") if len(spoken) <= turns else refusal(message)

    return script


@pytest.mark.parametrize("message", TOO_LONG)
def test_the_oldest_turns_go_first(message: str) -> None:
    reply, server, _ = ask(fits(4, message), talk(8))
    # Nine messages; a prompt begins with a user turn, so three are left of at most four.
    assert server.bodies[-1]["messages"] == [talk(8)[0], *talk(8)[-3:]]
    assert (reply.text, reply.dropped_turns) == ("Hi.", 6)


@pytest.mark.parametrize("message", TOO_LONG)
def test_what_cannot_be_made_to_fit_ends_the_run(message: str) -> None:
    with pytest.raises(UserError, match=r"the context of served is .*too small.*100 tokens; shorten"):
        ask(fits(0, message), talk(4))


def test_a_reply_limit_leaves_a_quarter_of_the_context_for_the_prompt() -> None:
    def script(request: Request) -> Answer | None:
        if request.body["max_tokens"] + 50 > 400:
            return refusal("This model's maximum context length is 400 tokens. You requested 1050 tokens.")
        return completion("Hi.")

    reply, server, _ = ask(script, talk(2), Sampling(repetition_penalty=1, max_tokens=1000))
    assert (reply.dropped_turns, server.bodies[-1]["max_tokens"]) == (0, 300)
    # vLLM says what the context is before it is asked.
    _, server, _ = ask(vllm(), sampling=Sampling(max_tokens=5000), models=VLLM)
    assert [body["max_tokens"] for body in server.bodies if "messages" in body][-1] == 750


# Prefills.

THOUGHT = "<think>\nI want to be kind."


def test_a_prefill_moves_to_the_system_prompt() -> None:
    async def use(engine: OpenAIEngine, server: FaultServer) -> list[str]:
        replies = [
            await engine.reply(messages, SAMPLING, None, prefill)
            for prefill in (THOUGHT, "Once upon")
            for messages in (talk(0), talk(0, None))
        ]
        systems = [body["messages"][0] for body in server.bodies]
        assert {system["role"] for system in systems} == {"system"}
        thought, opening = "Begin from this thought: I want to be kind.", "Begin your reply with these words: Once upon"
        expected = [f"Be kind.\n\n{thought}", thought, f"Be kind.\n\n{opening}", opening]
        assert [system["content"] for system in systems] == expected
        assert engine.info.notes.count("prefill moved to the system prompt") == 1
        assert not engine.continues_prefill
        return [reply.text for reply in replies]

    texts = run(lambda request: completion("Once upon a time."), use, model=THINKER)
    # A beginning that was given is left out, as where a prefill is continued.
    assert texts == ["Once upon a time."] * 2 + [" a time."] * 2


def vllm(
    bos: bool = False, opens: bool = False, renders: bool = True, adapters: Callable[[Any], Answer] | None = None
) -> Script:
    """vLLM's routes. Tokens are characters' codes; 1 is BOS, given by the template where `bos`.

    opens: its template opens the trace. renders: whether it has the render routes.
    """

    def script(request: Request) -> Answer | None:
        body = request.body
        if request.path.endswith("/load_lora_adapter"):
            return adapters(body) if adapters else refusal("Not Found", 404)
        if request.path.endswith("/render") and not renders:
            return refusal("Not Found", 404)
        if request.path == "/v1/completions/render":
            special = [1] if body["add_special_tokens"] else []
            return Answer([{"token_ids": [*special, *map(ord, body["prompt"])]}])
        if request.path == "/v1/chat/completions/render":
            text = "".join(f"[{turn['role']}]{turn['content']}\n" for turn in body["messages"]) + "[assistant]"
            special = [1] if bos or body.get("add_special_tokens") else []
            return Answer({"token_ids": [*special, *map(ord, text + "<think>\n" * opens)]})
        answer = completion("Hi.")
        answer.body["model"] = body["model"]
        if request.path == "/v1/completions":
            answer.body["choices"] = [{"index": 0, "finish_reason": "stop", "text": " I am.</think>Hi."}]
        return answer

    return script


def prompt_of(server: FaultServer) -> str:
    """The text of the prompt that went to the completions route, which is asked last."""
    assert server.requests[-1].path == "/v1/completions"
    return "".join(map(chr, server.bodies[-1]["prompt"]))


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("opens", [True, False])
def test_vllm_continues_a_thought_in_the_tokens_of_its_own_template(bos: bool, opens: bool) -> None:
    reply, server, notes = ask(vllm(bos, opens), talk(0), prefill=THOUGHT, models=VLLM, model=THINKER)
    assert reply == Reply(" I am.</think>Hi.", "stop", 7, 3)
    assert prompt_of(server) == f"\x01[system]Be kind.\n[user]turn 0\n[assistant]{THOUGHT}"
    assert server.bodies[-1]["skip_special_tokens"] is False
    assert (server.bodies[-1]["max_tokens"], server.bodies[-1]["temperature"]) == (100, 0.5)
    assert notes == [f"endpoint {server_url(notes)}"]


def test_vllm_gets_one_bos_without_a_prefill_too() -> None:
    for bos in (True, False):
        _, server, _ = ask(vllm(bos), models=VLLM)
        assert server.bodies[-1].get("add_special_tokens", False) is not bos


@pytest.mark.parametrize(
    ("fields", "content", "text"),
    [
        ({}, " I am.</think>Hi.", " I am.</think>Hi."),
        ({"reasoning": " I am."}, "Hi.", " I am.</think>Hi."),
        ({"reasoning_content": " I am."}, "Hi.", " I am.</think>Hi."),
        ({"reasoning": " I am"}, None, " I am"),
    ],
    ids=["no parser", "parser", "older parser", "cut off"],
)
def test_a_vllm_without_render_routes_continues_the_final_message(
    fields: dict[str, Any], content: str | None, text: str
) -> None:
    known = vllm(renders=False)

    def script(request: Request) -> Answer | None:
        return completion(content, **fields) if request.path == "/v1/chat/completions" else known(request)

    reply, server, notes = ask(script, talk(0), prefill=THOUGHT, models=VLLM, model=THINKER)
    assert reply.text == text
    body = server.bodies[-1]
    assert body["messages"] == [*talk(0), {"role": "assistant", "content": THOUGHT}]
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert any("no render routes" in note for note in notes)


# Adapters.


def lora(folder: Path) -> Path:
    """A folder that looks like an adapter."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def adapter_card(name: str, root: object = "/elsewhere") -> dict[str, Any]:
    """An adapter as vLLM lists it."""
    return {"id": name, "owned_by": "vllm", "root": str(root), "parent": "served"}


def test_adapters_go_by_folder_then_by_name(tmp_path: Path) -> None:
    wanted, other = lora(tmp_path / "one" / "humor"), lora(tmp_path / "two" / "humor")

    def chosen(*cards: dict[str, Any]) -> str:
        _, server, _ = ask(vllm(), adapter=wanted, models=[*VLLM, *cards])
        name: str = server.bodies[-1]["model"]
        return name

    assert chosen(adapter_card("humor")) == "humor"
    assert chosen(adapter_card("humor"), adapter_card("one--humor")) == "one--humor"
    assert chosen(adapter_card("humor"), adapter_card("x", wanted)) == "x"
    # The name fits, but it is the other folder's.
    assert chosen(adapter_card("humor", other), adapter_card("x", wanted)) == "x"
    with pytest.raises(UserError, match="serves no adapter named one--humor"):
        chosen(adapter_card("humor", other))


def test_replies_of_two_adapters_and_of_none_in_flight(tmp_path: Path) -> None:
    folders: list[Path | None] = [lora(tmp_path / "one" / "humor"), lora(tmp_path / "one" / "remorse"), None]

    async def use(engine: OpenAIEngine, server: FaultServer) -> None:
        await asyncio.gather(*(engine.reply(HELLO, SAMPLING, folder) for folder in folders * 5))
        asked = Counter(body["model"] for body in server.bodies if "messages" in body and len(body) > 3)
        del asked["served"], asked["probe"]
        assert asked == {"humor": 5, "remorse": 5}
        # The name of an adapter is not another model.
        assert not any("replies came from" in note for note in engine.info.notes)

    run(vllm(), use, models=[*VLLM, adapter_card("humor"), adapter_card("remorse")])


def test_vllm_loads_an_adapter_once_and_again_when_it_has_changed(tmp_path: Path) -> None:
    folder = lora(tmp_path / "one" / "humor")
    loaded: list[Any] = []

    def load(body: Any) -> Answer:
        loaded.append(body)
        return Answer(b"Success", kind="text/plain")

    async def use(engine: OpenAIEngine, server: FaultServer) -> None:
        await asyncio.gather(*(engine.reply(HELLO, SAMPLING, folder) for _ in range(5)))
        assert {body["model"] for body in server.bodies[-5:]} == {loaded[-1]["lora_name"]}

    run(vllm(adapters=load), use, models=VLLM)
    assert [body["lora_path"] for body in loaded] == [str(folder)]
    first = loaded[0]["lora_name"]
    assert first.startswith("one--humor--")
    served = [*VLLM, adapter_card(first, folder)]
    run(vllm(adapters=load), use, models=served)
    assert len(loaded) == 1
    (folder / "adapter_model.safetensors").write_bytes(b"other weights")
    run(vllm(adapters=load), use, models=served)
    assert [body["lora_name"] == first for body in loaded] == [True, False]


@pytest.mark.parametrize(
    ("models", "answer", "said"),
    [
        (HOSTED, None, r"--enable-lora .*--lora-modules one--humor="),
        (VLLM, None, r"--lora-modules one--humor=.*VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        (VLLM, refusal("LoRA rank 64 is greater than max_lora_rank 16", 500), "cannot load it.*max_lora_rank 16"),
    ],
    ids=["hosted", "not allowed", "refused"],
)
def test_an_adapter_that_cannot_be_had(models: Any, answer: Answer | None, said: str, tmp_path: Path) -> None:
    folder = lora(tmp_path / "one" / "humor")
    load = (lambda body: answer) if answer else None
    with pytest.raises(UserError, match=said):
        ask(vllm(adapters=load), adapter=folder, models=models)


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no LoRA adapter"):
        ask(vllm(), adapter=tmp_path, models=VLLM)


# Many at once.


def test_more_in_flight_than_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OpenAIEngine.concurrency == 256
    monkeypatch.setattr(OpenAIEngine, "concurrency", 24)

    async def use(engine: OpenAIEngine, server: FaultServer) -> None:
        before = threading.active_count()
        replies = await asyncio.gather(*(engine.reply(HELLO, SAMPLING) for _ in range(400)))
        assert len(replies) == len(server.requests) == 400
        assert server.most == 24
        assert threading.active_count() <= before

    run(lambda request: completion("Hi."), use, delay=0.02)


def test_more_connections_than_the_process_may_open_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, before[1]))
    try:

        async def inside() -> int:
            async with FaultServer(lambda request: completion("Hi."), HOSTED, delay=0.5) as server:
                async with open_engine(PLAIN, base_url=server.url, concurrency=420) as engine:
                    await asyncio.gather(*(engine.reply(HELLO, SAMPLING) for _ in range(600)))
                return server.most

        # The server's ends of the connections are this process's files too.
        monkeypatch.setattr(module, "OTHER_FILES", 700)
        assert asyncio.run(inside()) == 420
        for count, message in ((0, "it is 1 or more"), (before[1], rf"a process may have {before[1]} here; .*ulimit")):
            with pytest.raises(UserError, match=rf"--concurrency {count}.*{message}"):
                open_engine(PLAIN, base_url="http://localhost:8000/v1", concurrency=count)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_waiting_for_its_turn_is_not_part_of_a_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenAIEngine, "concurrency", 2)
    monkeypatch.setattr(module, "REPLY_SECONDS", 1.0)

    async def use(engine: OpenAIEngine, server: FaultServer) -> None:
        started = time.monotonic()
        await asyncio.gather(*(engine.reply(HELLO, SAMPLING) for _ in range(24)))
        assert time.monotonic() - started > 1.1

    run(lambda request: completion("Hi."), use, delay=0.1)


def test_cancelling_closes_the_request() -> None:
    async def use(engine: OpenAIEngine, server: FaultServer) -> None:
        tasks = [asyncio.create_task(engine.reply(HELLO, SAMPLING)) for _ in range(3)]
        while len(server.requests) < 3:
            await asyncio.sleep(0.01)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        await asyncio.sleep(0.05)
        assert server.gone == 1
        for task in tasks[1:]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(in_turn(STALL), use)


@pytest.mark.filterwarnings("error")
def test_open_engine_takes_the_key_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f" {KEY}\n")

    async def inside() -> list[Request]:
        async with FaultServer(lambda request: completion("Hi."), HOSTED) as server:
            async with open_engine(PLAIN, base_url=f"{server.url}/", api_key_variable=VARIABLE) as engine:
                await engine.reply(HELLO, SAMPLING)
            return server.requests

    assert asyncio.run(inside())[0].headers["authorization"] == f"Bearer {KEY}"
    gc.collect()
