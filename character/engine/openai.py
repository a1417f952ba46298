"""Replies from any OpenAI-compatible chat-completions endpoint: a hosted model, or `vllm serve` on other machines.

What endpoints disagree on is learned from their answers, once, and written down in `engine.info.notes`.
A vLLM endpoint is known by its model list; it continues prefills, serves adapters and takes every sampling setting.
"""

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from openai import APIConnectionError, APIError, APIStatusError

from character.engine.base import CANNOT_STEER, Engine, FinishReason, Message, Reply, Sampling, Steering, adapter_config
from character.engine.chat import Pieces, folded
from character.engine.connection import ABSENT, Connection, Malformed, allow_connections
from character.models import Model
from character.rows import RowError
from character.utils import UserError, digest

# Where an endpoint cannot continue a text, the text becomes a wish at the end of the system prompt.
THOUGHT = "Begin from this thought: {prefill}"
OPENING = "Begin your reply with these words: {prefill}"

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
    "seed",
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


class OpenAIEngine(Engine):
    """Asks `base_url`; at most `concurrency` requests are under way at once, the others wait their turn.

    api_key: None where the endpoint needs none; api_key_variable: what a message names in its place.
    seed: sent to vLLM's endpoints alone, with each reply's own: copies of a model there draw the same random numbers.
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
        self.seed = seed
        if concurrency is not None:
            allow_connections(concurrency)
            self.concurrency = concurrency
        self._connection = Connection(base_url, api_key, api_key_variable, self.concurrency)
        self.url = self._connection.url
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

    def _note(self, text: str) -> None:
        if text not in self.info.notes:
            self.info.notes.append(text)

    # Start: which models are there, and what vLLM's own routes tell.

    async def start(self) -> None:
        """Find the model in the endpoint's list, where it has one.

        Raises UserError where nothing answers, the key is refused, or another model is served.
        """
        try:
            self._served = await self._connection.models()
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
                f"no answer from {self.url} ({self._connection.words(error)}); start the server (vllm serve "
                f"{self.model.source}, for one), or correct --base-url"
            ) from None
        except (APIError, Malformed) as error:
            raise self._fatal(error) or UserError(
                f"{self.url} cannot be used: {self._connection.words(error)}"
            ) from None
        if self._name != self.model.source:
            self._note(f"served as {self._name}")

    def _card(self) -> dict[str, Any] | None:
        """The list's entry of the model. Raises UserError where the list lacks it."""
        for spec in (self.model.source, self.model.short):
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

    def _fatal(self, error: Exception) -> UserError | None:
        """The error that ends the whole run, where `error` says that no reply can be had."""
        if isinstance(error, APIStatusError):
            words = self._connection.words(error)
            if error.status_code == 404 or (error.status_code in REFUSED and NO_MODEL.search(f"{error.code} {words}")):
                return UserError(f"{self.url} has no model {self._name}, or is no full URL such as https://host/v1 "
                                 f"({words}); {self._what_it_serves()}")  # fmt: skip
        return self._connection.fatal(error)

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
                    f"({self._connection.words(error)}); serve its instruct or chat version"
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
        answer = await self._connection.request(path, {"model": self._name, "max_tokens": 1, **body})
        try:
            ids: list[int] = (answer[0] if isinstance(answer, list) else answer)["token_ids"]
        except (LookupError, TypeError):
            raise Malformed("no token ids") from None
        return ids

    async def close(self) -> None:
        """Close the connections."""
        await self._connection.close()

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
        reply = await self._reply(messages, sampling, adapter, "", pieces.update)
        pieces.finish(reply.text)
        return reply

    async def _reply(
        self,
        messages: list[Message],
        sampling: Sampling,
        adapter: Path | None,
        prefill: str,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """One reply, in as many requests as it takes to learn what the endpoint accepts and what fits."""
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = messages[len(system) :]
        dropped = 0
        async with self._connection.slot():
            name = self._name if adapter is None else await self._adapter_name(adapter)
            while True:
                body = {"model": name, **self._fields(sampling, STREAMED if on_text else {})}
                kept = [*system, *turns[dropped:]]
                # Of requests in flight together, each has to know what it was sent with.
                in_system_role = self._has_system_role and bool(system or prefill)
                if prefill and not self._is_vllm:
                    self._note("prefill moved to the system prompt")
                    kept = self._wished(kept, prefill)
                if not self._has_system_role:
                    kept = folded(kept)
                try:
                    if prefill and self._is_vllm:
                        reply = await self._continued(body, kept, prefill)
                    else:
                        reply = await self._asked(body, kept, prefill, on_text)
                    break
                except APIStatusError as error:
                    if fatal := self._fatal(error):
                        raise fatal from None
                    if error.status_code not in REFUSED:
                        raise
                    dropped = self._adapt(error, body, turns, dropped, in_system_role)
        if choices := self.choices(sampling):
            reply = replace(reply, text=_unwrapped(reply.text))
            if reply.text not in choices:
                self._note("not every reply is one of the choices: the endpoint does not keep to them")
        return replace(reply, dropped_turns=dropped)

    def _fields(self, sampling: Sampling, further: dict[str, Any]) -> dict[str, Any]:
        limits = [sampling.max_tokens]
        if self._limit is not None:
            limits.append(self._limit)
        if self._context is not None:
            # At least a quarter of the context stays for the prompt, as in every engine.
            limits.append(max(1, self._context * 3 // 4))
        fields = {"temperature": sampling.temperature, "top_p": sampling.top_p, **self._settings, **further}
        if self._is_vllm:
            fields |= {
                "repetition_penalty": sampling.repetition_penalty,
                "seed": (self.seed ^ sampling.seed) % 2**31,
            }
        elif sampling.repetition_penalty != 1:
            self._note("repetition_penalty left out: only vLLM endpoints are known to apply it")
        if choices := self.choices(sampling):
            fields |= (
                {"structured_outputs": {"choice": choices}} if self._is_vllm else {"response_format": _one_of(choices)}
            )
        fields = {field: value for field, value in fields.items() if field not in self._left_out}
        return {**fields, self._limit_field: min(limits)}

    async def _asked(
        self, body: dict[str, Any], messages: list[Message], prefill: str, on_text: Callable[[str], None] | None
    ) -> Reply:
        """A reply of the chat route, without `prefill` where it begins with it."""
        answer = await self._connection.request("/chat/completions", {**body, "messages": messages}, on_text=on_text)
        choice, finish = self._choice(answer)
        return Reply(_content(choice).removeprefix(prefill), finish, *self._usage(answer))

    async def _continued(self, body: dict[str, Any], messages: list[Message], prefill: str) -> Reply:
        """vLLM's continuation of `prefill`, with any reasoning trace as plain text.

        The chat route hands a trace to the server's reasoning parser, and many templates put an empty trace before an
        assistant turn that they render. So the prompt's tokens, rendered by the server, go to the completions route.
        """
        if self._renders:
            rendered = await self._rendered("/chat/completions/render", {**body, "messages": messages})
            if self._prompt_opens_trace and self.model.reasoning:
                prefill = prefill.removeprefix(self.model.reasoning.open).lstrip("\n")
            prompt = [*rendered, *(await self._tokens(prefill) if prefill else [])]
            answer = await self._connection.request("/completions", {**body, "prompt": prompt})
            choice, finish = self._choice(answer)
            return Reply(choice["text"], finish, *self._usage(answer))
        begun = [*messages, {"role": "assistant", "content": prefill}]
        further = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
        answer = await self._connection.request("/chat/completions", {**body, **further})
        choice, finish = self._choice(answer)
        text = _content(choice)
        trace = choice["message"].get("reasoning") or choice["message"].get("reasoning_content")
        if trace and self.model.reasoning:
            text = f"{trace}{self.model.reasoning.close}{text}" if text else trace
        return Reply(text, finish, *self._usage(answer))

    def _wished(self, messages: Sequence[Message], prefill: str) -> list[Message]:
        """The conversation with `prefill` asked for at the end of its system prompt."""
        wish = OPENING.format(prefill=prefill)
        if self.model.reasoning and prefill.startswith(self.model.reasoning.open):
            wish = THOUGHT.format(prefill=prefill.removeprefix(self.model.reasoning.open).strip())
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": wish}, *messages]
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{wish}"}, *messages[1:]]

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
        text = self._connection.words(error, length=2000)
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
        raise RowError(self._connection.words(error)) from None

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
            if name == self._name or (name.startswith(f"{pair}--") and name != loaded):
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
            await self._connection.request_once("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except APIStatusError as error:
            cause = "" if error.status_code in ABSENT else f" and cannot load it ({self._connection.words(error)})"
            raise UserError(
                f"{self.url} serves no adapter named {pair}{cause}; {remedy} "
                "(or set VLLM_ALLOW_RUNTIME_LORA_UPDATING=True there)"
            ) from None
        return name


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


def _same_folder(folder: str, root: object) -> bool:
    return isinstance(root, str) and Path(root).is_dir() and Path(root).resolve() == Path(folder).resolve()


def _loaded_name(folder: Path) -> str:
    """The name for an adapter loaded at run time: another one when its folder is trained again."""
    weights = folder / "adapter_model.safetensors"
    stamp = [weights.stat().st_size, weights.stat().st_mtime_ns] if weights.exists() else []
    return f"{folder.parent.name}--{folder.name}--{digest(stamp, 8)}"
