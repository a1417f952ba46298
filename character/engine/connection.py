"""The connection to an OpenAI-compatible endpoint: requests tried again, whole answers, errors as one line without keys.

It knows routes and the outer shape of answers; what is asked, and of which model, is the engine's (openai.py).
"""

import asyncio
import email.utils
import json
import random
import re
import resource
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
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

from character.rows import RowError
from character.utils import UserError

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

RETRIED = {408, 409, 425, 429}
ABSENT = {404, 405, 501}

FLAGGED = re.compile(r"moderation|flagged|content[ _](policy|filter)", re.IGNORECASE)
# Some endpoints quote a key that they refuse, with stars in its middle.
STARRED = re.compile(r"\S*\*{2,}\S*")


class Malformed(Exception):
    """An answer that is no whole reply: half a JSON, a page, an error under a good status."""


class Connection:
    """Requests to `base_url`; at most `concurrency` replies are under way at once, the others wait their turn.

    api_key: None where the endpoint needs none; api_key_variable: what a message names in its place.
    url: the endpoint as messages may name it. Raises UserError for a URL or key that cannot be one.
    """

    def __init__(self, base_url: str, api_key: str | None, api_key_variable: str, concurrency: int):
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
                    max_connections=concurrency,
                    max_keepalive_connections=concurrency,
                    keepalive_expiry=KEEPALIVE_SECONDS,
                ),
                timeout=Timeout(READ_SECONDS, connect=CONNECT_SECONDS, pool=None),
            ),
        )
        self._slots = asyncio.Semaphore(concurrency)
        self._is_gone = False

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """A place among the replies under way, as soon as one is free: the block makes all requests of one reply.

        Raises RowError where that reply cannot be had in its time, UserError where none can.
        """
        async with self._slots:
            if self._is_gone:
                # Many files may wait behind the one that found it out, each of which would try for half a minute.
                await self._check_alive()
            try:
                async with asyncio.timeout(REPLY_SECONDS):
                    yield
            except TimeoutError:
                raise RowError(f"no reply within {REPLY_SECONDS:.0f} s") from None
            except (APIError, Malformed) as error:
                if isinstance(error, APIConnectionError):
                    await self._check_alive()
                tries = f", after up to {ATTEMPTS} tries" if _passes(error) else ""
                raise self.fatal(error) or RowError(self.words(error) + tries) from None

    async def models(self) -> list[dict[str, Any]]:
        """The endpoint's list of models; empty where it has no such route. Raises as `request`, or UserError."""
        try:
            answer = await self.request("/models", connections=False)
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

    async def request(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        connections: bool = True,
        on_text: Callable[[str], None] | None = None,
    ) -> Any:
        """The decoded answer to a POST of `body`, or to a GET, tried again within the bounds at the top.

        connections: whether a connection that cannot be had is tried again. on_text: told the text of a body that asks
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
        return await retrying(self.request_once, path, body, on_text)

    async def request_once(
        self, path: str, body: dict[str, Any] | None, on_text: Callable[[str], None] | None = None
    ) -> object:
        """As `request`, in one try."""
        try:
            if body is None:
                return await self._client.get(path, cast_to=object, options={"timeout": START_SECONDS})
            if on_text and body.get("stream"):
                return await self._streamed(path, body, on_text)
            answer = await self._client.post(path, cast_to=object, body=body)
        except ValueError:
            raise Malformed("an answer that is no JSON") from None
        if path.endswith("/completions") and not _is_reply(answer):
            # Some endpoints and proxies put an error under a good status.
            cause = answer.get("error") if isinstance(answer, dict) else None
            raise Malformed(_flat(cause) if cause else "an answer that is no reply")
        return answer

    async def _streamed(self, path: str, body: dict[str, Any], on_text: Callable[[str], None]) -> object:
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
                on_text(text)
        if finish is None:
            raise Malformed("a stream that ended early")
        return answer | {"choices": [{"message": {"content": text}, "finish_reason": finish}]}

    async def _check_alive(self) -> None:
        """Raises UserError where the endpoint is gone, so that thousands of rows need not find out one by one."""
        try:
            await self.request_once("/models", None)
        except APITimeoutError:
            pass
        except APIConnectionError as error:
            self._is_gone = True
            raise UserError(
                f"{self.url} no longer answers ({self.words(error)}); finished rows are kept, start the server and "
                "run again"
            ) from None
        except (APIError, Malformed):
            pass
        self._is_gone = False

    def fatal(self, error: Exception) -> UserError | None:
        """The error that ends the whole run, where `error` says that no reply can be had."""
        if not isinstance(error, APIStatusError):
            return None
        words = self.words(error)
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
        return None

    def words(self, error: Exception, length: int = 200) -> str:
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


def allow_connections(count: int) -> None:
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


def _flat(body: object) -> str:
    return body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
