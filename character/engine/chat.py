"""From messages to token ids, once for every engine and trainer: one BOS, prefills, and what fits the context."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from character.engine.base import Message
from character.models import Model
from character.utils import UserError


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation and how many of its oldest messages were left out to make it fit."""

    ids: list[int]
    dropped_turns: int


class Chat:
    """A tokenizer's chat template, applied the same way everywhere.

    context: the model's limit in tokens. Raises UserError where the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, model: Model, context: int):
        if not tokenizer.chat_template:
            raise UserError(
                f"{model.source} has no chat template, so it is no chat model; choose its instruct or chat version"
            )
        self.tokenizer = tokenizer
        self.model = model
        self.context = context
        self.has_system_role = self._accepts_system_role()

    def _accepts_system_role(self) -> bool:
        probe = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
        try:
            self.tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError:
            return False
        return True

    def text(self, messages: Sequence[Message], prefill: str = "", reply: bool = True) -> str:
        """The rendered conversation; with `reply`, up to where the assistant's turn begins, and its prefill.

        A system prompt goes to the front of the first user turn where the template refuses a system role.
        """
        if not self.has_system_role:
            messages = folded(messages)
        rendered: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=reply)
        reasoning = self.model.reasoning
        if prefill and reasoning and prefill.startswith(reasoning.open) and rendered.rstrip().endswith(reasoning.open):
            # Some templates open the trace themselves.
            rendered = rendered.rstrip().removesuffix(reasoning.open)
        return rendered + prefill

    def ids(self, text: str) -> list[int]:
        """Token ids of rendered text, with exactly one BOS where the tokenizer uses one."""
        return token_ids(self.tokenizer, text)

    def length(self, messages: Sequence[Message]) -> int:
        """Tokens of a whole conversation."""
        return len(self.ids(self.text(messages, reply=False)))

    def decode(self, ids: Sequence[int]) -> str:
        """New tokens as text. Special ones are left out, but for a model that reasons: its trace's marks may be such."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=self.model.reasoning is None)
        return text

    def answer(self, conversation: Sequence[Message], stops: frozenset[int]) -> tuple[list[int], list[int]]:
        """(prompt ids, answer ids) of a conversation that ends with the assistant, as trained on.

        The answer ends with its end-of-turn token (one of `stops`): what a template writes after it is never generated.
        """
        prompt = self.ids(self.text(conversation[:-1]))
        whole = self.ids(self.text(conversation, reply=False))
        start = common_prefix(prompt, whole)
        end = next((i for i in range(len(whole), start, -1) if whole[i - 1] in stops), len(whole))
        return whole[:start], whole[start:end]

    def encode(self, messages: Sequence[Message], prefill: str = "", max_tokens: int = 0) -> Encoded:
        """Token ids of a prompt that leaves `max_tokens` of the context free (at least a quarter stays for the prompt).

        The oldest turns go first, never the system prompt nor the last user turn; a prompt begins with a user turn.
        Raises UserError where the system prompt and the last turn alone do not fit.
        """
        room = self.context - min(max_tokens, self.context * 3 // 4)
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = list(messages[len(system) :])
        dropped = 0
        while True:
            ids = self.ids(self.text([*system, *turns[dropped:]], prefill))
            if len(ids) <= room:
                return Encoded(ids, dropped)
            following = next((i for i in range(dropped + 1, len(turns)) if turns[i]["role"] == "user"), None)
            if following is None:
                raise UserError(
                    f"the context of {self.model.source} is {self.context} tokens, too small for a system prompt and "
                    f"message of {len(ids)} tokens and a reply of {max_tokens}; shorten the constitution or the reply "
                    "limit, or use a model with a larger context"
                )
            dropped = following


class Pieces:
    """A text that grows: `show` gets each further piece once, in whole characters."""

    def __init__(self, show: Callable[[str], None]):
        self.show = show
        self.shown = ""

    def update(self, text: str) -> None:
        """Take the text so far."""
        # Half a character reads as U+FFFD until its other bytes come.
        if not text.endswith("\ufffd"):
            self.finish(text)

    def finish(self, text: str) -> None:
        """Take the whole text."""
        if len(text) > len(self.shown) and text.startswith(self.shown):
            self.show(text[len(self.shown) :])
            self.shown = text


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text that the chat template rendered, with exactly one BOS where the tokenizer uses one."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos] and tokenizer("")["input_ids"][:1] == [bos]:
        return [bos, *ids]
    return ids


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def folded(messages: Sequence[Message]) -> list[Message]:
    """The conversation, its system prompt at the front of the first user turn."""
    if not messages or messages[0]["role"] != "system":
        return list(messages)
    system, first, *rest = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def load_chat(model: Model) -> Chat:
    """A model's chat template, without its weights. Raises UserError where it cannot be loaded."""
    import transformers

    with loading(model):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model.source, revision=model.revision)
        config = transformers.AutoConfig.from_pretrained(model.source, revision=model.revision)
    return Chat(tokenizer, model, context_of(config, model))


def context_of(config: Any, model: Model) -> int:
    """How many tokens a conversation may have: the config's limit, or the table's where that is less."""
    limit: int = config.get_text_config().max_position_embeddings
    return min(limit, model.context or limit)


@contextlib.contextmanager
def loading(model: Model) -> Iterator[None]:
    """Turn what the Hugging Face libraries raise for a model that cannot be loaded into one line with the remedy."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())
        if "gated" in text or "401" in text or "403" in text:
            remedy = "accept its terms on the hub and put HF_TOKEN into .env"
        elif Path(model.source).is_dir():
            remedy = "check that the folder holds config.json, the tokenizer's files and *.safetensors"
        else:
            remedy = "check the id and the network, or name a local folder"
        raise UserError(f"cannot load the model {model.source}: {text[:300]}; {remedy}") from None
