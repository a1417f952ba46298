"""Replies by transformers' own generate: any model, on the CPU or one GPU, with no server.

Requests that wait are answered in batches of one adapter, one steering and one sampling. What all prompts of a batch begin with
(the system prompt) is computed once. Each reply is drawn with its own random numbers, so that it does not depend on
which others shared its batch.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from character.engine.base import Engine, Message, Reply, Sampling, Steering, check_adapter
from character.engine.chat import Chat, Encoded, Pieces, common_prefix, context_of, loading
from character.models import Model
from character.utils import UserError

# A prefix shorter than this is not worth a pass of its own.
MIN_SHARED = 32
# From this many requests with a common prefix on, they make a batch of their own.
MIN_SHARING = 4
MAX_BATCH = 128
# Tokens that a draw looks at first.
LIKELIEST = 64


@dataclass
class _Request:
    prompt: Encoded
    sampling: Sampling
    adapter: Path | None
    future: asyncio.Future[Reply]
    steering: Steering | None = None
    # Told, in the thread that generates, of the new token ids so far.
    heard: Callable[[list[int]], None] | None = None

    @property
    def kind(self) -> tuple[Path | None, Steering | None, Sampling]:
        """Requests of one kind can share a batch."""
        return self.adapter, self.steering, replace(self.sampling, seed=0, choices=())


class TransformersEngine(Engine):
    """A model loaded by `from_pretrained`, with LoRA adapters by PEFT."""

    concurrency = 4 * MAX_BATCH

    def __init__(self, model: Model, seed: int, adapters: Sequence[Path] = ()):
        super().__init__(model)
        self.seed = seed
        self.adapters = list(adapters)
        self._names: dict[Path, str] = {}
        self._active: str | None = None
        self._waiting: list[_Request] = []
        self._batch: list[_Request] = []
        self._wake = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._batch_limit = MAX_BATCH

    async def start(self) -> None:
        """Load the model and the adapters named at the start."""
        self.network, tokenizer = load_model(self.model)
        self.chat = Chat(tokenizer, self.model, context_of(self.network.config, self.model))
        self._stops = stop_ids(self.network, tokenizer)
        self.info.revision = getattr(self.network.config, "_commit_hash", None) or self.model.revision
        for adapter in self.adapters:
            self._add_adapter(adapter)
        self._runner = asyncio.create_task(self._run())
        self._runner.add_done_callback(self._ended)

    async def close(self) -> None:
        """Stop the batches; replies still waiting are cancelled."""
        for request in (*self._waiting, *self._batch):
            request.future.cancel()
        if self._runner:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
        self.network = None

    def _ended(self, runner: asyncio.Task[None]) -> None:
        """Give an error that nobody foresaw to all who wait, in place of no answer at all."""
        if not runner.cancelled() and (error := runner.exception()):
            for request in (*self._waiting, *self._batch):
                if not request.future.done():
                    request.future.set_exception(error)

    async def reply(
        self,
        messages: list[Message],
        sampling: Sampling,
        adapter: Path | None = None,
        prefill: str = "",
        steering: Steering | None = None,
    ) -> Reply:
        prompt = self.chat.encode(messages, prefill, sampling.max_tokens)
        future = asyncio.get_running_loop().create_future()
        return await self._asked(_Request(prompt, sampling, adapter, future, steering))

    async def stream(
        self, messages: list[Message], sampling: Sampling, show: Callable[[str], None], adapter: Path | None = None
    ) -> Reply:
        loop = asyncio.get_running_loop()
        pieces = Pieces(show)

        def heard(new: list[int]) -> None:
            loop.call_soon_threadsafe(pieces.update, self._text(new))

        prompt = self.chat.encode(messages, max_tokens=sampling.max_tokens)
        reply = await self._asked(_Request(prompt, sampling, adapter, loop.create_future(), heard=heard))
        pieces.finish(reply.text)
        return reply

    async def _asked(self, request: _Request) -> Reply:
        self._waiting.append(request)
        self._wake.set()
        return await request.future

    def _add_adapter(self, adapter: Path) -> None:
        if adapter in self._names:
            return
        config = self.network.config.get_text_config()
        check_adapter(adapter, config.hidden_size, config.num_hidden_layers, self.model.source)
        from peft import PeftModel

        name = f"adapter{len(self._names)}"
        try:
            if self._names:
                self.network.load_adapter(str(adapter), adapter_name=name)
            else:
                self.network = PeftModel.from_pretrained(self.network, str(adapter), adapter_name=name)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"adapter {adapter} does not fit {self.model.source}: {str(error).splitlines()[0]}; "
                "use the model it was trained on, or another adapter"
            ) from None
        self.network.eval()
        self._names[adapter] = name

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            # One turn of the loop lets every request that is about to be made join the batch.
            await asyncio.sleep(0.005)
            self._waiting = [request for request in self._waiting if not request.future.done()]
            if not self._waiting:
                self._wake.clear()
                continue
            self._batch = batch = self._next_batch()
            try:
                replies = await asyncio.to_thread(self._generate, batch)
            except (RuntimeError, ValueError, UserError) as error:
                if _out_of_memory(error) and len(batch) > 1:
                    self._batch_limit = len(batch) // 2
                    self._waiting = batch + self._waiting
                    continue
                failure = error
                if not isinstance(error, UserError):
                    failure = UserError(f"{self.model.source} failed to generate: {error}")
                for request in batch:
                    if not request.future.done():
                        request.future.set_exception(failure)
                continue
            for request, reply in zip(batch, replies, strict=True):
                if not request.future.done():
                    request.future.set_result(reply)

    def _next_batch(self) -> list[_Request]:
        """Waiting requests of the oldest one's kind: those that share most of its prompt, if several do, else any."""
        oldest = self._waiting[0]
        alike = [request for request in self._waiting if request.kind == oldest.kind]
        common = [common_prefix(request.prompt.ids, oldest.prompt.ids) for request in alike]
        needed = max(MIN_SHARED, len(oldest.prompt.ids) // 2)
        sharing = [request for request, length in zip(alike, common, strict=True) if length >= needed]
        if len(sharing) >= MIN_SHARING:
            alike = sharing
        batch = alike[: self._batch_limit]
        chosen = {id(request) for request in batch}
        self._waiting = [request for request in self._waiting if id(request) not in chosen]
        return batch

    def _generate(self, batch: list[_Request]) -> list[Reply]:
        adapter, steering, sampling = batch[0].kind
        if adapter is not None:
            self._add_adapter(adapter)
        prompts = [request.prompt.ids for request in batch]
        limits = [min(sampling.max_tokens, self.chat.context - len(prompt)) for prompt in prompts]
        seeds = [self.seed ^ request.sampling.seed for request in batch]
        choices = [
            [
                self.chat.tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in self.choices(request.sampling)
            ]
            for request in batch
        ]

        def goes_on(row: int, new: list[int]) -> bool:
            request = batch[row]
            if request.heard:
                request.heard(new)
            # A cancelled reply leaves the batch, so that Ctrl-C need not wait for the longest answer.
            return not request.future.done()

        with self._using(adapter), self._steered(steering):
            answers = decode(
                self.network,
                prompts,
                sampling,
                seeds,
                self._stops,
                limits,
                goes_on,
                lambda row, new: allowed_next(choices[row], new, self._stops),
            )
        return [self._reply(request, new) for request, new in zip(batch, answers, strict=True)]

    def _using(self, adapter: Path | None) -> Any:
        if not self._names:
            return contextlib.nullcontext()
        name = self._names[adapter] if adapter is not None else None
        if name != self._active:
            if self._active is not None and self._folds:
                self.network.unmerge_adapter()
            if name is not None:
                self.network.set_adapter(name)
                if self._folds:
                    self.network.merge_adapter([name])
            self._active = name
        return self.network.disable_adapter() if name is None else contextlib.nullcontext()

    @property
    def _folds(self) -> bool:
        """Whether the adapter in use is added into the weights, where it costs nothing per token.

        Not in bfloat16, which would round what it adds.
        """
        import torch

        return bool(self.network.dtype == torch.float32)

    @contextlib.contextmanager
    def _steered(self, steering: Steering | None) -> Iterator[None]:
        """Within the block the network adds the control vector. Raises UserError where it is not this network's."""
        if steering is None:
            yield
            return
        from repeng import ControlModel, ControlVector

        vector = ControlVector.load(steering.vector)
        config = self.network.config.get_text_config()
        vector.check(config.hidden_size, config.num_hidden_layers, self.model.source)
        control = ControlModel(self.network, vector.directions)
        control.set_control(vector, steering.strength)
        try:
            yield
        finally:
            control.unwrap()

    def _reply(self, request: _Request, new: list[int]) -> Reply:
        stopped = bool(new) and new[-1] in self._stops
        dropped = request.prompt.dropped_turns
        return Reply(self._text(new), "stop" if stopped else "length", len(request.prompt.ids), len(new), dropped)

    def _text(self, new: list[int]) -> str:
        """New tokens as text, without the one that ends the turn."""
        kept = new[:-1] if new and new[-1] in self._stops else new
        return self.chat.decode(kept)


def load_model(model: Model) -> tuple[Any, Any]:
    """The network, ready to answer on the GPU where there is one, and its tokenizer. Raises UserError."""
    import torch

    network, tokenizer = load_network(model)
    return network.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def load_network(model: Model) -> tuple[Any, Any]:
    """The network, still in main memory, and its tokenizer.

    Weights come from safetensors only: in the model's own type for a GPU, in float32 for the CPU. Raises UserError.
    """
    import torch
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    with loading(model):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model.source, revision=model.revision)
        network = transformers.AutoModelForCausalLM.from_pretrained(
            model.source,
            revision=model.revision,
            dtype="auto" if torch.cuda.is_available() else torch.float32,
            use_safetensors=True,
        )
    return network, tokenizer


def stop_ids(network: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a turn: the generation config's, and the tokenizer's end of sequence."""
    ends = network.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return frozenset(end for end in (*listed, tokenizer.eos_token_id) if end is not None)


def decode(
    network: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    seeds: list[int],
    stops: frozenset[int],
    limits: Sequence[int] | None = None,
    goes_on: Callable[[int, list[int]], bool] = lambda row, new: True,
    allowed: Callable[[int, list[int]], Collection[int]] = lambda row, new: (),
) -> list[list[int]]:
    """New token ids for each prompt, the stop token included where it came.

    limits: the most new tokens of each row (default: the sampling's). goes_on: told a row and its new tokens so far
    after each one, says whether the row is still wanted. allowed: told the same before each one, names the tokens that
    may come; none for any.
    What all prompts begin with is computed once and attended to as one block; a row leaves the batch when it stops.
    """
    import torch

    device = network.device
    prefix = _shared_prefix(prompts) if attends_plainly(network) else 0
    longest = max(map(len, prompts)) - prefix
    gaps = torch.tensor([longest - (len(prompt) - prefix) for prompt in prompts], device=device)
    ids = torch.tensor([[0] * (longest + prefix - len(prompt)) + prompt[prefix:] for prompt in prompts], device=device)
    mask = torch.arange(longest, device=device) >= gaps[:, None]
    seen = _seen(prompts, network.config.get_text_config().vocab_size).to(device)
    draws = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    limits = limits or [sampling.max_tokens] * len(prompts)
    with torch.inference_mode(), _prefix_attended(network, prompts[0][:prefix]):
        cache = None
        positions = (mask.cumsum(-1) - 1).clamp_min(0) + prefix
        for _ in range(max(limits)):
            output = network(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logits = output.logits[:, -1].float()
            for index, row in enumerate(rows):
                if tokens := list(allowed(row, answers[row])):
                    kept = logits[index, tokens]
                    logits[index] = -torch.inf
                    logits[index, tokens] = kept
            token = sample(logits, seen, sampling, draws)
            seen.scatter_(1, token[:, None], True)
            for row, value in zip(rows, token.tolist(), strict=True):
                answers[row].append(value)
            going = [
                index
                for index, row in enumerate(rows)
                if goes_on(row, answers[row]) and answers[row][-1] not in stops and len(answers[row]) < limits[row]
            ]
            if not going:
                break
            if len(going) < len(rows):
                keep = torch.tensor(going, device=device)
                cache.batch_select_indices(keep)
                token, mask, positions, seen = token[keep], mask[keep], positions[keep], seen[keep]
                rows, draws = [rows[index] for index in going], [draws[index] for index in going]
            ids, positions = token[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    return answers


def sample(logits: Any, seen: Any, sampling: Sampling, draws: list[Any]) -> Any:
    """One token per row. logits: (rows, vocabulary), float; seen: which tokens the row holds, of the same shape.

    draws: a random generator per row, so that a row's tokens do not depend on the others in its batch.
    """
    import torch

    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    weights = (logits / sampling.temperature).softmax(-1)
    # The likeliest few mostly hold all of top_p, and to find them is much less work than to sort the vocabulary.
    probabilities, order = weights.topk(min(LIKELIEST, weights.shape[1]))
    if (probabilities.sum(-1) < sampling.top_p).any():
        probabilities, order = weights.sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    points = torch.stack([torch.rand((), generator=draw) for draw in draws]).to(logits.device)
    targets = (points * probabilities.sum(-1))[:, None]
    chosen = torch.searchsorted(probabilities.cumsum(-1), targets, right=True).clamp_max(probabilities.shape[1] - 1)
    # Rounding may put the point past the last token that is allowed.
    chosen = torch.minimum(chosen, (probabilities > 0).sum(-1, keepdim=True) - 1)
    return order.gather(1, chosen)[:, 0]


def allowed_next(choices: Sequence[list[int]], new: list[int], stops: frozenset[int]) -> set[int]:
    """The tokens that may follow `new` on the way to one of `choices` with a stop token after it; none without choices."""
    begun = [choice for choice in choices if choice[: len(new)] == new]
    going = {choice[len(new)] for choice in begun if len(choice) > len(new)}
    return going | stops if new in begun else going


def _seen(prompts: list[list[int]], vocabulary: int) -> Any:
    import torch

    seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[prompt] = True
    return seen


def _shared_prefix(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with, one of each left over; 0 where too few to be worth a pass."""
    if len(prompts) == 1:
        return 0
    length = min(common_prefix(prompts[0], prompt) for prompt in prompts)
    length = min(length, min(map(len, prompts)) - 1)
    return length if length >= MIN_SHARED else 0


def _attention_layers(network: Any) -> list[Any]:
    return [module for module in network.modules() if hasattr(module, "q_proj") and hasattr(module, "layer_idx")]


def attends_plainly(network: Any) -> bool:
    """Whether every layer attends to everything before it, through the attention function that can be replaced."""
    config = network.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    simple = kinds == {"full_attention"} and not windowed
    return simple and network.config._attn_implementation == "sdpa" and bool(_attention_layers(network))


@contextlib.contextmanager
def _prefix_attended(network: Any, prefix: list[int]) -> Iterator[None]:
    """Within the block every layer attends to `prefix` too, whose keys and values are computed and held once."""
    if not prefix:
        yield
        return
    import torch
    import transformers

    base = getattr(network, "get_base_model", lambda: network)()
    transformers.AttentionInterface.register("shared_prefix", _prefix_attention)
    transformers.AttentionMaskInterface.register("shared_prefix", _whole_mask)
    ids = torch.tensor([prefix], device=network.device)
    cache = network(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    layers = _attention_layers(network)
    for layer in layers:
        held = cache.layers[layer.layer_idx]
        layer.prefix_keys, layer.prefix_values = held.keys[0], held.values[0]
    base.set_attn_implementation("shared_prefix")
    try:
        yield
    finally:
        base.set_attn_implementation("sdpa")
        for layer in layers:
            del layer.prefix_keys, layer.prefix_values


def _whole_mask(*args: Any, **settings: Any) -> Any:
    """The causal mask of a batch; without padding transformers would leave it out and rely on SDPA's own."""
    import transformers

    return transformers.masking_utils.sdpa_mask(*args, **settings | {"allow_is_causal_skip": False})


def _prefix_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any
) -> tuple[Any, None]:
    """Attention over [prefix, own tokens]; query (rows, heads, new, width), prefix keys (groups, length, width)."""
    import torch

    rows, heads, new, width = query.shape
    groups, length = module.prefix_keys.shape[:2]
    grouped = query.reshape(rows, groups, heads // groups * new, width)
    flat = grouped.transpose(0, 1).reshape(groups, -1, width)
    on_prefix = (flat @ module.prefix_keys.transpose(1, 2)).view(groups, rows, -1, length).transpose(0, 1)
    on_own = grouped @ key.transpose(2, 3)
    if attention_mask is not None:
        allowed = attention_mask.repeat(1, 1, heads // groups, 1)
        on_own = on_own.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else on_own + allowed
    weights = (torch.cat([on_prefix, on_own], dim=-1).float() * scaling).softmax(-1).to(query.dtype)
    from_prefix = weights[..., :length].transpose(0, 1).reshape(groups, -1, length) @ module.prefix_values
    output = from_prefix.view(groups, rows, -1, width).transpose(0, 1) + weights[..., length:] @ value
    return output.reshape(rows, heads, new, width).transpose(1, 2).contiguous(), None


def _out_of_memory(error: Exception) -> bool:
    return "out of memory" in str(error).lower() or "can't allocate memory" in str(error)
