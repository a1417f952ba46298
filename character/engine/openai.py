"""Replies from any OpenAI-compatible chat-completions endpoint: a hosted model, or `vllm serve` on other machines.

What endpoints disagree on is learned from their answers, once, and written down in `engine.info.notes`.
A vLLM endpoint is known by its model list; it continues prefills, serves adapters and takes every sampling setting.
"""

import asyncio
import email.utils
import json
import random
import re
import resource
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from httpx2 import Limits
from openai import (
    APIConnectionError,
    APIError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    AsyncStream,
    DefaultAsyncHttpxClient,
    Timeout,
)
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_exponential_jitter,
)

from character.engine.base import CANNOT_STEER, Engine, FinishReason, Message, Reply, Sampling, Steering, adapter_config
from character.engine.chat import Pieces
from character.models import Model
from character.rows import RowError
from character.utils import UserError, digest

# Files that a step may have open beside one connection per request under way.
OTHER_FILES = 256
# The bounds of one request: tries, and seconds with every wait and try of the reply counted.
ATTEMPTS = 6
REPLY_SECONDS = 1800.0
CONNECT_SECONDS = 15.0
READ_SECONDS = 600.0
START_SECONDS = 60.0
# The back-off: the first wait doubles up to the longest one; a server may ask for more, up to its own bound.
FIRST_WAIT = 1.0
LONGEST_WAIT = 60.0
LONGEST_RETRY_AFTER = 300.0
# Idle connections are closed before the 5 seconds after which uvicorn, and so vLLM, closes its end.
KEEPALIVE_SECONDS = 3.0

# Where an endpoint cannot continue a text, the text becomes a wish at the end of the system prompt.
THOUGHT = "Begin from this thought: {prefill}"
OPENING = "Begin your reply with these words: {prefill}"

RETRIED = {408, 409, 425, 429}
ABSENT = {404, 405, 501}
REFUSED = {400, 413, 422}
FINISHED: dict[str, FinishReason] = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence"), "stop"),
    **dict.fromkeys(("length", "max_tokens"), "length"),
}
# Settings that a reply can do without, the ones to give up first at the front.
OPTIONAL = (
    "stream_options",
    "stream",
    "min_p",
    "top_k",
    "repetition_penalty",
    "add_special_tokens",
    "skip_special_tokens",
    "top_p",
    "temperature",
    "response_format",
    "structured_outputs",
)

STREAMED = {"stream": True, "stream_options": {"include_usage": True}}

# How endpoints word their refusals.
CONTEXT_IS = re.compile(r"(?:context[ _-]?(?:length|size|window|limit)|n_ctx)\b\D{0,30}(\d[\d,]{2,})", re.IGNORECASE)
TOO_LONG = re.compile(
    r"context[ _-]?(length|size|window|limit)|too long|too many (input )?tokens|reduce (the length|your message)|"
    r"exceed\w*[^.]*\btokens|tokens?\b[^.]*\bexceed|longer than|must be <=|must have less than",
    re.IGNORECASE,
)
REPLY_LIMIT = re.compile(
    r"max_(completion_|new_)?tokens\W.*(too large|at most|less than|valid range|greater than|maximum value)",
    re.IGNORECASE,
)
UNSUPPORTED = re.compile(
    r"unsupported|n[o']t (support|permitted|allowed|recogni[sz]ed|compatible)|unrecogni[sz]ed|unknown|unexpected|"
    r"only the default|cannot both|extra[ _]|deprecated|forbidden|does not accept|unavailable",
    re.IGNORECASE,
)
NO_SYSTEM_ROLE = re.compile(
    r"system['\"`]? (role|message|prompt|instruction)s?\b.*(n[o']t |unsupported|only)|"
    r"n[o']t support.*\bsystem|(role|invalid|unknown|unexpected).*['\"`]system['\"`]|"
    r"roles? must alternate|developer instruction is not",
    re.IGNORECASE,
)
NO_MODEL = re.compile(
    r"model[ _]not[ _](found|exist)|model\b.{0,80}\bdoes not exist|(invalid|unknown|no such) model", re.IGNORECASE
)
FLAGGED = re.compile(r"moderation|flagged|content[ _](policy|filter)", re.IGNORECASE)
# Some endpoints quote a key that they refuse, with stars in its middle.
STARRED = re.compile(r"\S*\*{2,}\S*")


class Malformed(Exception):
    """An answer that is no whole reply: half a JSON, a page, an error under a good status."""


class OpenAIEngine(Engine):
    """Asks `base_url`; at most `concurrency` requests are under way at once, the others wait their turn.

    api_key: None where the endpoint needs none; api_key_variable: what a message names in its place.
    seed: not sent, since seeds per request slow vLLM's sampler and few endpoints honour them.
    concurrency: None for 256. Raises UserError for a URL or key that cannot be one, and more requests than may be.
    """

    def __init__(
        self,
        model: Model,
        base_url: str,
        api_key: str | None,
        api_key_variable: str,
        seed: int,
        concurrency: int | None = None,
    ):
        super().__init__(model)
        if concurrency is not None:
            _allow_connections(concurrency)
            self.concurrency = concurrency
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--base-url '{base_url}' is no URL; it looks like http://localhost:8000/v1")
        key = (api_key or "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{api_key_variable} holds characters that no key has; copy the key again")
        # A URL may carry a password or a key, which no message may repeat.
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}"
        self.api_key_variable = api_key_variable
        self._has_key = bool(key)
        self._secrets = [secret for secret in (key, parts.password, parts.query) if secret]
        self._client = AsyncOpenAI(
            base_url=parts._replace(path=path).geturl(),
            # Never empty: the client would look for another key in the environment.
            api_key=key or "none",
            max_retries=0,
            http_client=DefaultAsyncHttpxClient(
                limits=Limits(
                    max_connections=self.concurrency,
                    max_keepalive_connections=self.concurrency,
                    keepalive_expiry=KEEPALIVE_SECONDS,
                ),
                timeout=Timeout(READ_SECONDS, connect=CONNECT_SECONDS, pool=None),
            ),
        )
        self._slots = asyncio.Semaphore(self.concurrency)
        self._note(f"endpoint {self.url}")

        # What is known of the endpoint.
        self._name = model.source
        self._served: list[dict[str, Any]] = []
        self._is_vllm = False
        self._renders = False
        self._prompt_opens_trace = False
        self._context: int | None = None
        self._settings: dict[str, Any] = {}
        self._left_out: set[str] = set()
        self._limit_field = "max_tokens"
        self._limit: int | None = None
        self._has_system_role = True
        self._token_ids: dict[str, list[int]] = {}
        self._adapters: dict[Path, str] = {}
        self._adapter_lock = asyncio.Lock()
        self._gone: UserError | None = None

    def _note(self, text: str) -> None:
        if text not in self.info.notes:
            self.info.notes.append(text)

    # Start: which models are there, and what vLLM's own routes tell.

    async def start(self) -> None:
        """Find the model in the endpoint's list, where it has one.

        Raises UserError where nothing answers, the key is refused, or another model is served.
        """
        try:
            self._served = await self._models()
            card = self._card()
            if card:
                self._name = card["id"]
                self._is_vllm = card.get("owned_by") == "vllm"
                self._context = card.get("max_model_len")
            self.continues_prefill = self._is_vllm
            if self._is_vllm:
                # The server's own defaults may come from the model's generation config; the ones asked for count.
                self._settings = {"top_k": -1, "min_p": 0.0}
                if self.model.reasoning:
                    # A trace's marks may be special tokens, without which it would run into the answer.
                    self._settings["skip_special_tokens"] = False
                await self._learn_prompt()
        except APIConnectionError as error:
            raise UserError(
                f"no answer from {self.url} ({self._words(error)}); start the server (vllm serve "
                f"{self.model.source}, for one), or correct --base-url"
            ) from None
        except (APIError, Malformed) as error:
            raise self._final(error) or UserError(f"{self.url} cannot be used: {self._words(error)}") from None
        if self._name != self.model.source:
            self._note(f"served as {self._name}")

    async def _models(self) -> list[dict[str, Any]]:
        """The endpoint's list of models; empty where it has no such route."""
        try:
            answer = await self._request("/models", connections=False)
        except APIStatusError as error:
            if error.status_code not in ABSENT:
                raise
            return []
        cards = answer.get("data", answer.get("models")) if isinstance(answer, dict) else answer
        if not isinstance(cards, list):
            raise UserError(
                f"{self.url} is no OpenAI-compatible endpoint: its /models is no list; the URL often ends in /v1"
            )
        return [card for card in cards if isinstance(card, dict) and isinstance(card.get("id"), str)]

    def _card(self) -> dict[str, Any] | None:
        """The list's entry of the model. Raises UserError where the list lacks it."""
        wanted = (self.model.source, self.model.short)
        for spec in wanted:
            for card in self._served:
                names = (card["id"], card["id"].removeprefix("models/"), card["id"].removesuffix(":latest"))
                if spec in names or spec == card.get("root") or _same_folder(spec, card.get("root")):
                    return card
        if self._served:
            raise UserError(f"{self.url} does not serve {self.model.source}; {self._what_it_serves()}")
        return None

    def _what_it_serves(self) -> str:
        names = [card["id"] for card in self._served]
        if not names:
            return "it lists no models; ask its provider for their names"
        shown = ", ".join(names[:20]) + (f", … ({len(names)} in all)" if len(names) > 20 else "")
        return f"it serves: {shown}; name one of them, or serve the model there"

    async def _learn_prompt(self) -> None:
        """How this vLLM turns a conversation into tokens: whether BOS is missing, and whether it opens the trace."""
        try:
            bare = await self._tokens("U")
            full = await self._rendered("/completions/render", {"prompt": "U", "add_special_tokens": True})
            chat = await self._rendered("/chat/completions/render", {"messages": [{"role": "user", "content": "U"}]})
        except APIStatusError as error:
            if error.status_code in ABSENT:
                self._note("this vLLM has no render routes: prefills are continued as its chat template renders them")
                return
            if error.status_code in REFUSED:
                raise UserError(
                    f"{self.url} cannot render a conversation for {self._name}, so it is no chat model "
                    f"({self._words(error)}); serve its instruct or chat version"
                ) from None
            raise
        self._renders = True
        if full[1:] == bare and full[:1] != chat[:1]:
            self._settings["add_special_tokens"] = True
        if self.model.reasoning:
            ends = [await self._tokens(self.model.reasoning.open + end) for end in ("", "\n", "\n\n")]
            self._prompt_opens_trace = any(chat[-len(end) :] == end for end in ends)

    async def _tokens(self, text: str) -> list[int]:
        if text not in self._token_ids:
            body = {"prompt": text, "add_special_tokens": False}
            self._token_ids[text] = await self._rendered("/completions/render", body)
        return self._token_ids[text]

    async def _rendered(self, path: str, body: dict[str, Any]) -> list[int]:
        """The token ids that vLLM's render routes make of a request, which generate nothing."""
        answer = await self._request(path, {"model": self._name, "max_tokens": 1, **body})
        try:
            ids: list[int] = (answer[0] if isinstance(answer, list) else answer)["token_ids"]
        except (LookupError, TypeError):
            raise Malformed("no token ids") from None
        return ids

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    # Replies.

    async def reply(
        self,
        messages: list[Message],
        sampling: Sampling,
        adapter: Path | None = None,
        prefill: str = "",
        steering: Steering | None = None,
    ) -> Reply:
        """See Engine.reply. Where the endpoint cannot continue `prefill`, it is asked for in the system prompt."""
        if steering is not None:
            raise UserError(CANNOT_STEER)
        return await self._reply(messages, sampling, adapter, prefill)

    async def stream(
        self, messages: list[Message], sampling: Sampling, show: Callable[[str], None], adapter: Path | None = None
    ) -> Reply:
        pieces = Pieces(show)
        reply = await self._reply(messages, sampling, adapter, "", pieces)
        pieces.finish(reply.text)
        return reply

    async def _reply(
        self,
        messages: list[Message],
        sampling: Sampling,
        adapter: Path | None,
        prefill: str,
        pieces: Pieces | None = None,
    ) -> Reply:
        async with self._slots:
            if self._gone:
                # Many files wait behind the one that found it out, each of which would try for half a minute.
                raise self._gone
            try:
                async with asyncio.timeout(REPLY_SECONDS):
                    name = self._name if adapter is None else await self._adapter_name(adapter)
                    return await self._adapting(name, messages, sampling, prefill, pieces)
            except TimeoutError:
                raise RowError(f"no reply within {REPLY_SECONDS:.0f} s") from None
            except (APIError, Malformed) as error:
                if isinstance(error, APIConnectionError):
                    await self._check_alive()
                tries = f", after up to {ATTEMPTS} tries" if _passes(error) else ""
                raise self._final(error) or RowError(self._words(error) + tries) from None

    async def _adapting(
        self, name: str, messages: list[Message], sampling: Sampling, prefill: str, pieces: Pieces | None
    ) -> Reply:
        """One reply, in as many requests as it takes to learn what the endpoint accepts and what fits."""
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = messages[len(system) :]
        dropped = 0
        while True:
            body = {"model": name, **self._fields(sampling, STREAMED if pieces else {})}
            kept = [*system, *turns[dropped:]]
            # Of requests in flight together, each has to know what it was sent with.
            in_system_role = self._has_system_role and bool(system or prefill)
            try:
                if prefill and self._is_vllm:
                    reply = await self._continued(body, kept, prefill)
                else:
                    reply = await self._asked(body, kept, prefill, pieces)
            except APIStatusError as error:
                if error.status_code not in REFUSED or self._final(error):
                    raise
                dropped = self._adapt(error, body, turns, dropped, in_system_role)
                continue
            whole = Reply(*reply, dropped_turns=dropped)
            if choices := self.choices(sampling):
                whole = replace(whole, text=_unwrapped(whole.text))
                if whole.text not in choices:
                    self._note("not every reply is one of the choices: the endpoint does not keep to them")
            return whole

    def _fields(self, sampling: Sampling, further: dict[str, Any]) -> dict[str, Any]:
        limits = [sampling.max_tokens]
        if self._limit is not None:
            limits.append(self._limit)
        if self._context is not None:
            # At least a quarter of the context stays for the prompt, as in every engine.
            limits.append(max(1, self._context * 3 // 4))
        fields = {"temperature": sampling.temperature, "top_p": sampling.top_p, **self._settings, **further}
        if self._is_vllm:
            fields["repetition_penalty"] = sampling.repetition_penalty
        elif sampling.repetition_penalty != 1:
            self._note("repetition_penalty left out: only vLLM endpoints are known to apply it")
        if choices := self.choices(sampling):
            fields |= (
                {"structured_outputs": {"choice": choices}} if self._is_vllm else {"response_format": _one_of(choices)}
            )
        fields = {field: value for field, value in fields.items() if field not in self._left_out}
        return {**fields, self._limit_field: min(limits)}

    async def _asked(
        self, body: dict[str, Any], messages: Sequence[Message], prefill: str, pieces: Pieces | None
    ) -> tuple[str, FinishReason, int, int]:
        """A reply of the chat route, with `prefill` as a wish in the system prompt."""
        if prefill:
            self._note("prefill moved to the system prompt")
            messages = self._wished(messages, prefill)
        answer = await self._request("/chat/completions", {**body, "messages": self._folded(messages)}, pieces=pieces)
        choice, finish = self._choice(answer)
        return _content(choice).removeprefix(prefill), finish, *self._usage(answer)

    async def _continued(
        self, body: dict[str, Any], messages: Sequence[Message], prefill: str
    ) -> tuple[str, FinishReason, int, int]:
        """vLLM's continuation of `prefill`, with any reasoning trace as plain text.

        The chat route hands a trace to the server's reasoning parser, and many templates put an empty trace before an
        assistant turn that they render. So the prompt's tokens, rendered by the server, go to the completions route.
        """
        messages = self._folded(messages)
        if self._renders:
            rendered = await self._rendered("/chat/completions/render", {**body, "messages": messages})
            if self._prompt_opens_trace and self.model.reasoning:
                prefill = prefill.removeprefix(self.model.reasoning.open).lstrip("\n")
            prompt = [*rendered, *(await self._tokens(prefill) if prefill else [])]
            answer = await self._request("/completions", {**body, "prompt": prompt})
            choice, finish = self._choice(answer)
            return choice["text"], finish, *self._usage(answer)
        begun = [*messages, {"role": "assistant", "content": prefill}]
        answer = await self._request(
            "/chat/completions",
            {**body, "messages": begun, "continue_final_message": True, "add_generation_prompt": False},
        )
        choice, finish = self._choice(answer)
        text = _content(choice)
        trace = choice["message"].get("reasoning") or choice["message"].get("reasoning_content")
        if trace and self.model.reasoning:
            text = f"{trace}{self.model.reasoning.close}{text}" if text else trace
        return text, finish, *self._usage(answer)

    def _wished(self, messages: Sequence[Message], prefill: str) -> list[Message]:
        """The conversation with `prefill` asked for at the end of its system prompt."""
        wish = OPENING.format(prefill=prefill)
        if self.model.reasoning and prefill.startswith(self.model.reasoning.open):
            wish = THOUGHT.format(prefill=prefill.removeprefix(self.model.reasoning.open).strip())
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": wish}, *messages]
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{wish}"}, *messages[1:]]

    def _folded(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation, its system prompt at the front of the first user turn where there is no such role."""
        if self._has_system_role or messages[0]["role"] != "system":
            return list(messages)
        system, first, *rest = messages
        return [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]

    def _choice(self, answer: Any) -> tuple[dict[str, Any], FinishReason]:
        """The answer's first choice and how it ended. Raises RowError where it ended in another way."""
        choice = answer["choices"][0]
        reason = choice.get("finish_reason")
        if reason not in FINISHED:
            raise RowError(f"the reply was not finished (finish reason: {reason})")
        model = answer.get("model")
        if isinstance(model, str) and model not in (self._name, *self._adapters.values()):
            self._note(f"replies came from {model}")
        return choice, FINISHED[reason]

    def _usage(self, answer: Any) -> tuple[int, int]:
        usage = answer.get("usage")
        if not isinstance(usage, dict):
            self._note("the endpoint gives no usage figures: token counts are 0")
            return 0, 0
        return int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)

    # What a refusal teaches.

    def _adapt(
        self, error: APIStatusError, sent: dict[str, Any], turns: Sequence[Message], dropped: int, in_system_role: bool
    ) -> int:
        """Remember what the refusal of a request says, and return how many turns the next one leaves out.

        Raises UserError where the conversation cannot be made to fit, RowError where the refusal is about this row.
        """
        text = self._words(error, length=2000)
        body = error.body if isinstance(error.body, dict) else {}
        limit: int = sent.get("max_tokens") or sent["max_completion_tokens"]
        stated = CONTEXT_IS.search(text)
        context = int(stated[1].replace(",", "")) if stated else body.get("n_ctx") or self._context
        smaller = [int(number) for number in re.findall(r"\b\d+\b", text.replace(",", "")) if 0 < int(number) < limit]
        if not stated and REPLY_LIMIT.search(text) and smaller:
            self._limit = min(max(smaller), self._limit or limit)
            self._note(f"replies limited to {self._limit} tokens by the endpoint")
            return dropped
        if stated or body.get("code") == "context_length_exceeded" or TOO_LONG.search(text):
            if context and limit > max(1, context * 3 // 4):
                self._context = context
                return dropped
            following = next((i for i in range(dropped + 1, len(turns)) if turns[i]["role"] == "user"), None)
            if following is None:
                size = f"is {context} tokens, too small" if context else "is too small"
                raise UserError(
                    f"the context of {sent['model']} {size} for the system prompt, the last message and a reply of "
                    f"{limit} tokens; shorten the constitution or the reply limit, or use a model with a larger context"
                ) from None
            return following
        if in_system_role and NO_SYSTEM_ROLE.search(text):
            self._has_system_role = False
            self._note("system prompt folded into the first user turn: the model takes no system role")
            return dropped
        if "max_tokens" in sent and "max_completion_tokens" in text:
            self._limit_field = "max_completion_tokens"
            return dropped
        if UNSUPPORTED.search(text):
            named = str(body.get("param") or "").rpartition(".")[2]
            sent_fields = [field for field in OPTIONAL if field in sent]
            for field in sorted(sent_fields, key=lambda field: field != named):
                if field == named or re.search(rf"\b{field.replace('_', '[_ ]')}\b", text):
                    self._left_out.add(field)
                    self._note(f"{field} left out: the endpoint refuses it")
                    return dropped
        raise RowError(self._words(error)) from None

    # Adapters.

    async def _adapter_name(self, adapter: Path) -> str:
        """The name under which the endpoint serves an adapter's folder, loading it there where that is allowed."""
        async with self._adapter_lock:
            if adapter not in self._adapters:
                self._adapters[adapter] = self._served_adapter(adapter) or await self._load_adapter(adapter)
            return self._adapters[adapter]

    def _served_adapter(self, adapter: Path) -> str | None:
        """The served name of an adapter: the one of its folder, else one that its folder's name suggests."""
        folder = adapter.resolve()
        loaded = _loaded_name(folder)
        pair = loaded.rpartition("--")[0]
        names = (loaded, pair, folder.name)
        found: dict[int, str] = {}
        for name, root in ((card["id"], Path(card.get("root") or "/-")) for card in self._served):
            # An earlier run may have loaded this folder before it was trained again, under another hash.
            is_old = name.startswith(f"{pair}--") and name != loaded
            if name == self._name or is_old:
                continue
            # A folder that is here, but another one, may hold another adapter under the same name.
            if root.is_dir():
                if root.resolve() == folder:
                    found.setdefault(-1, name)
            elif name in names:
                found.setdefault(names.index(name), name)
        return found[min(found)] if found else None

    async def _load_adapter(self, adapter: Path) -> str:
        folder = adapter.resolve()
        pair = f"{folder.parent.name}--{folder.name}"
        remedy = (
            f"serve it: vllm serve {self.model.source} --enable-lora --max-lora-rank 64 --lora-modules {pair}={folder}"
        )
        if not self._is_vllm:
            raise UserError(f"{self.url} serves no adapter named {pair}; {remedy}")
        adapter_config(adapter)
        name = _loaded_name(folder)
        try:
            await self._once("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except APIStatusError as error:
            cause = "" if error.status_code in ABSENT else f" and cannot load it ({self._words(error)})"
            raise UserError(
                f"{self.url} serves no adapter named {pair}{cause}; {remedy} "
                "(or set VLLM_ALLOW_RUNTIME_LORA_UPDATING=True there)"
            ) from None
        return name

    # Requests and their errors.

    async def _request(
        self, path: str, body: dict[str, Any] | None = None, connections: bool = True, pieces: Pieces | None = None
    ) -> Any:
        """The decoded answer to a POST of `body`, or to a GET, tried again within the bounds at the top.

        connections: whether a connection that cannot be had is tried again. pieces: told the text of a body that asks
        for a stream. Raises APIError or Malformed.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception(
                lambda error: _passes(error) and (connections or not isinstance(error, APIConnectionError))
            ),
            wait=_wait,
            stop=stop_after_attempt(ATTEMPTS) | stop_before_delay(REPLY_SECONDS),
            reraise=True,
        )
        return await retrying(self._once, path, body, pieces)

    async def _once(self, path: str, body: dict[str, Any] | None, pieces: Pieces | None = None) -> object:
        try:
            if body is None:
                return await self._client.get(path, cast_to=object, options={"timeout": START_SECONDS})
            if pieces and body.get("stream"):
                return await self._streamed(path, body, pieces)
            answer = await self._client.post(path, cast_to=object, body=body)
        except ValueError:
            raise Malformed("an answer that is no JSON") from None
        if path.endswith("/completions") and not _is_reply(answer):
            # Some endpoints and proxies put an error under a good status.
            cause = answer.get("error") if isinstance(answer, dict) else None
            raise Malformed(_flat(cause) if cause else "an answer that is no reply")
        return answer

    async def _streamed(self, path: str, body: dict[str, Any], pieces: Pieces) -> object:
        """The answer to a chat request that is streamed, put together as if it had come whole."""
        answer: dict[str, Any] = {}
        text, finish = "", None
        chunks = await self._client.post(path, cast_to=object, body=body, stream=True, stream_cls=AsyncStream[object])
        async with chunks:
            async for chunk in chunks:
                if not isinstance(chunk, dict):
                    continue
                answer |= {key: chunk[key] for key in ("model", "usage") if chunk.get(key)}
                for choice in chunk.get("choices") or []:
                    text += (choice.get("delta") or {}).get("content") or ""
                    finish = choice.get("finish_reason") or finish
                pieces.update(text)
        if finish is None:
            raise Malformed("a stream that ended early")
        return answer | {"choices": [{"message": {"content": text}, "finish_reason": finish}]}

    async def _check_alive(self) -> None:
        """Raises UserError where the endpoint is gone, so that thousands of rows need not find out one by one."""
        try:
            await self._once("/models", None)
        except APITimeoutError:
            return
        except APIConnectionError as error:
            self._gone = UserError(
                f"{self.url} no longer answers ({self._words(error)}); finished rows are kept, start the server and "
                "run again"
            )
            raise self._gone from None
        except (APIError, Malformed):
            return

    def _final(self, error: Exception) -> UserError | None:
        """The error that ends the whole run, where `error` says that no reply can be had."""
        if not isinstance(error, APIStatusError):
            return None
        words = self._words(error)
        if error.status_code == 401:
            state = "refuses the key in" if self._has_key else "wants a key: set"
            return UserError(
                f"{self.url} {state} {self.api_key_variable} (HTTP 401); set the right one there or in .env"
            )
        if error.status_code == 403 and not FLAGGED.search(words):
            return UserError(
                f"{self.url} forbids this to the key in {self.api_key_variable} ({words}); set another key"
            )
        if error.status_code == 402 or (error.status_code == 429 and error.code == "insufficient_quota"):
            return UserError(f"the account of {self.api_key_variable} at {self.url} has no credit left ({words})")
        if error.status_code == 404 or (error.status_code in REFUSED and NO_MODEL.search(f"{error.code} {words}")):
            return UserError(f"{self.url} has no model {self._name}, or is no full URL such as https://host/v1 "
                             f"({words}); {self._what_it_serves()}")  # fmt: skip
        return None

    def _words(self, error: Exception, length: int = 200) -> str:
        """What an error says, on one line, without secrets."""
        if isinstance(error, APIStatusError):
            body = error.body
            if isinstance(body, dict) and isinstance(body.get("message"), str):
                body = body["message"]
            text = f"HTTP {error.status_code}" + (f": {_flat(body)}" if body else "")
        elif isinstance(error, APITimeoutError):
            text = "timed out"
        elif isinstance(error, APIConnectionError):
            text = str(error.__cause__ or error) or "connection lost"
        else:
            text = str(error)
        text = self._clean(text)
        return text if len(text) <= length else text[:length] + "…"

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            # A shortened key is no secret less.
            part = re.escape(secret[:8] if len(secret) >= 16 else secret)
            text = re.sub(rf"[^\s'\"]*{part}[^\s'\"]*", "…", text)
        return " ".join(STARRED.sub("…", text).split())


def _allow_connections(count: int) -> None:
    """Let this process hold so many connections. Raises UserError where it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES
    if count < 1:
        raise UserError(f"--concurrency {count}: it is 1 or more")
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise UserError(
            f"--concurrency {count} needs {wanted} open files and a process may have {hard} here; take fewer requests at "
            "once, or raise the limit (ulimit -Hn)"
        )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _passes(error: BaseException) -> bool:
    """Whether an error may pass, so that the request is worth another try."""
    if isinstance(error, APIStatusError):
        passes = error.status_code in RETRIED or error.status_code >= 500
        return passes and error.status_code not in ABSENT and error.code != "insufficient_quota"
    return isinstance(error, APIConnectionError | Malformed)


def _wait(state: RetryCallState) -> float:
    """Seconds before the next try: what the server asked for, or exponential back-off, each with jitter."""
    error = state.outcome.exception() if state.outcome else None
    asked = _retry_after(error) if isinstance(error, APIStatusError) else None
    if asked is not None:
        return min(asked, LONGEST_RETRY_AFTER) + random.uniform(0, FIRST_WAIT / 4)
    return wait_exponential_jitter(multiplier=FIRST_WAIT, max=LONGEST_WAIT, jitter=FIRST_WAIT)(state)


def _retry_after(error: APIStatusError) -> float | None:
    """Seconds that the Retry-After header asks for, given as seconds or as an HTTP date; None without one."""
    value = error.response.headers.get("retry-after", "")
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _is_reply(answer: Any) -> bool:
    """Whether an answer has the shape of a reply by the chat route or by vLLM's completions route."""
    try:
        choice = answer["choices"][0]
        return isinstance(choice.get("message"), dict) or isinstance(choice.get("text"), str)
    except (LookupError, TypeError, AttributeError):
        return False


def _content(choice: dict[str, Any]) -> str:
    """The answer of a chat choice, without its reasoning; empty where there is none."""
    content = choice["message"].get("content")
    if isinstance(content, list):
        return "".join(
            part.get("text", "") for part in content if isinstance(part, dict) and part.get("type") == "text"
        )
    return content if isinstance(content, str) else ""


def _one_of(choices: Sequence[str]) -> dict[str, Any]:
    """The response format of a JSON object that holds one of the choices."""
    schema = {
        "type": "object",
        "properties": {"choice": {"type": "string", "enum": choices}},
        "required": ["choice"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "choice", "strict": True, "schema": schema}}


def _unwrapped(text: str) -> str:
    """The choice in such an object; any other reply as it is."""
    try:
        choice = json.loads(text)["choice"]
    except (ValueError, TypeError, LookupError):
        return text
    return choice if isinstance(choice, str) else text


def _flat(body: object) -> str:
    return body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)


def _same_folder(folder: str, root: object) -> bool:
    return isinstance(root, str) and Path(root).is_dir() and Path(root).resolve() == Path(folder).resolve()


def _loaded_name(folder: Path) -> str:
    """The name for an adapter loaded at run time: another one when its folder is trained again."""
    weights = folder / "adapter_model.safetensors"
    stamp = [weights.stat().st_size, weights.stat().st_mtime_ns] if weights.exists() else []
    return f"{folder.parent.name}--{folder.name}--{digest(stamp, 8)}"
