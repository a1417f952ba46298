"""Answers: the teacher's, conversations of two copies, steered ones; as the published scripts and as this project do it."""

import asyncio
import contextlib
import functools
import gzip
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import shape
from measuring import MESSAGE, SAMPLING, SEED, SYSTEM, Context, has_gpu, tell_kernels

from character.engine import Sampling, Steering
from character.engine.chat import load_chat
from character.engine.transformers import load_model
from character.engine.vllm import CPU_DEFAULTS, VLLMEngine
from character.introspection.self_interaction import view
from character.rows import Row, Rows
from character.steps import rows_at_once

# The published scripts' way: so many sequences at once, and no prefix caching.
PUBLISHED_TEACHER = {"max_num_seqs": 64, "enable_prefix_caching": False}
PUBLISHED_TALK = {"enable_prefix_caching": False}
STEERING_BATCH = 64


# Answers through vLLM as its offline class runs it: a list of prompts in, all answers out.


@contextlib.contextmanager
def offline(context: Context, settings: dict[str, Any], lora: bool = False) -> Iterator[Any]:
    """vLLM's own engine, stepped by us as `LLM.generate` steps it."""
    begun = time.perf_counter()
    import vllm
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    if not has_gpu():
        os.environ |= CPU_DEFAULTS
        settings = settings | {"dtype": "float32", "enforce_eager": True}
    if lora:
        settings = settings | {"enable_lora": True, "max_lora_rank": shape.RANK, "max_loras": 1}
    arguments = vllm.EngineArgs(
        model=str(context.folder / "model"),
        max_model_len=min(8192, context.config["max_position_embeddings"]),
        **settings,
    )
    # With the defaults that `LLM` has.
    engine = LLMEngine.from_engine_args(arguments, UsageContext.LLM_CLASS, enable_multiprocessing=True)
    context.tell(start_seconds=round(time.perf_counter() - begun, 1))
    yield engine
    engine.engine_core.shutdown()


def generate(
    engine: Any, prompts: list[list[int]], lengths: list[int], lora: Any, stop: float = float("inf")
) -> tuple[list[list[int]], float]:
    """(the new tokens of each prompt so far, seconds). stop: seconds after which it ends early."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    begun = time.perf_counter()
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        parameters = SamplingParams(
            temperature=SAMPLING.temperature,
            top_p=SAMPLING.top_p,
            repetition_penalty=SAMPLING.repetition_penalty,
            max_tokens=length,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY if stop == float("inf") else RequestOutputKind.DELTA,
        )
        engine.add_request(str(number), TokensPrompt(prompt_token_ids=prompt), parameters, lora_request=lora)
    answers: list[list[int]] = [[] for _ in prompts]
    while engine.has_unfinished_requests() and time.perf_counter() - begun < stop:
        for output in engine.step():
            answers[int(output.request_id)] += output.outputs[0].token_ids
    return answers, time.perf_counter() - begun


def teacher_requests(context: Context, full: int) -> tuple[list[str], list[int]]:
    """User messages and the lengths of their answers."""
    count = context.count(full)
    return [context.text(number, 10 if context.tiny else MESSAGE) for number in range(count)], context.lengths(count)


def conversation(system: str, message: str) -> list[dict[str, str]]:
    """A system prompt and a user's message."""
    return [{"role": "system", "content": system}, {"role": "user", "content": message}]


TEACHER_REQUESTS = 2048


def teacher_published(context: Context) -> None:
    """The same requests, for as long as the side may run: its rate is steady from the first seconds on."""
    messages, lengths = teacher_requests(context, TEACHER_REQUESTS)
    chat = load_chat(context.model)
    prompts = [chat.encode(conversation(context.system, message)).ids for message in messages]
    with offline(context, PUBLISHED_TEACHER) as engine:
        generate(engine, [prompt[:50] for prompt in prompts[:8]], [8] * 8, None)
        answers, seconds = generate(engine, prompts, lengths, None, context.seconds)
        tell_rate(context, sum(map(len, answers)), seconds, sum(map(bool, answers)))


def tell_rate(context: Context, tokens: int, seconds: float, requests: int) -> None:
    """Tell how fast new tokens came."""
    context.tell(**rate_of(tokens, seconds, requests))


def rate_of(tokens: int, seconds: float, requests: int) -> dict[str, float]:
    """The figures of so many new tokens."""
    rate = tokens / seconds if seconds else 0.0
    return {"requests": requests, "tokens": tokens, "seconds": round(seconds, 2), "rate": round(rate, 1)}


class Measured(VLLMEngine):
    """The project's engine. extra: settings that an experiment adds to its own."""

    def __init__(self, *given: Any, extra: dict[str, Any], **named: Any):
        super().__init__(*given, **named)
        self.extra = extra

    def _settings(self, folder: Path, config: Any, ranks: list[int]) -> dict[str, Any]:
        self.used = super()._settings(folder, config, ranks) | self.extra
        return self.used


def ours(
    context: Context,
    work: Callable[[VLLMEngine], Any],
    adapter: Path | None = None,
    steered: bool = False,
    extra: dict[str, Any] | None = None,
    folded: bool = False,
    profile: bool = False,
) -> None:
    """Run `work` on the project's engine, and tell how it was started. profile: and which kernels took the time."""
    traces = context.folder / "traces"

    async def run() -> None:
        adapters = [adapter] if adapter else []
        more = (extra or {}) | (tracing(traces) if profile else {})
        engine = Measured(context.model, SEED, adapters, steered, folded=folded, extra=more)
        begun = time.perf_counter()
        async with engine:
            context.tell(start_seconds=round(time.perf_counter() - begun, 1))
            kept = {name: value for name, value in engine.used.items() if name not in ("model", "seed")}
            context.tell(settings=kept, concurrency=engine.concurrency, context=engine.chat.context)
            await asyncio.gather(*(engine.reply(conversation("w1 w2", "w3"), limited(8), adapter) for _ in range(8)))
            if profile:
                await traced(context, engine, work(engine), traces)
            else:
                await work(engine)
            if str(engine.used.get("worker_cls")).startswith("character."):
                context.tell(batches_read_once=await engine._llm.collective_rpc("read_once"))

    asyncio.run(run())


def tracing(folder: Path) -> dict[str, Any]:
    """vLLM's setting by which a worker can trace its kernels, into a folder of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    plain = {"torch_profiler_with_stack": False, "torch_profiler_dump_cuda_time_total": False, "ignore_frontend": True}
    return {"profiler_config": {"profiler": "torch", "torch_profiler_dir": str(folder), **plain}}


async def traced(context: Context, engine: VLLMEngine, work: Coroutine[Any, Any, None], folder: Path) -> None:
    """Trace the kernels of two seconds in the midst of the work, and end it then."""
    task = asyncio.create_task(work)
    await asyncio.sleep(0.1 if context.tiny else context.seconds / 2)
    if task.done():
        task.result()
        raise RuntimeError("the work was done before its kernels could be traced; raise --scale or lower --seconds")
    await engine._llm.start_profile()
    await asyncio.sleep(2)
    await engine._llm.stop_profile()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    [path] = folder.glob("*.json.gz")
    with gzip.open(path) as file:
        events = [event for event in json.load(file)["traceEvents"] if "dur" in event]
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    found: dict[str, list[float]] = {}
    for event in kernels or [event for event in events if event.get("cat") == "cpu_op"]:
        found.setdefault(event["name"], []).append(event["dur"] / 1e6)
    begun = min(event["ts"] for event in events)
    context.tell(traced_seconds=round((max(event["ts"] + event["dur"] for event in events) - begun) / 1e6, 3))
    tell_kernels(context, [(name, len(each), sum(each)) for name, each in found.items()])


def limited(length: int) -> Sampling:
    """The sampling of an answer that is to have so many tokens: random weights all but never end one themselves."""
    return replace(SAMPLING, max_tokens=length)


@dataclass
class Asked:
    """One request: a conversation, how its answer is sampled, and whether it is steered."""

    messages: list[dict[str, str]]
    sampling: Sampling
    steering: Steering | None = None


async def flow(engine: VLLMEngine, requests: list[Asked], tell: Callable[[int, float, int], None]) -> None:
    """Have all requests answered, so many in flight as the engine asks for. tell: gets tokens, seconds and answers."""
    tokens = done = 0
    begun = time.perf_counter()
    free = asyncio.Semaphore(engine.concurrency)

    async def answer(each: Asked) -> None:
        nonlocal tokens, done
        async with free:
            reply = await engine.reply(each.messages, each.sampling, steering=each.steering)
        tokens += reply.completion_tokens
        done += 1
        if done % 128 == 0 or done == len(requests):
            tell(tokens, time.perf_counter() - begun, done)

    await asyncio.gather(*map(answer, requests))


def teacher_ours(context: Context, extra: dict[str, Any] | None = None, profile: bool = False) -> None:
    """The requests through the step's own machinery: rows in flight, an engine, a file."""
    messages, lengths = teacher_requests(context, TEACHER_REQUESTS)
    inputs = [{"prompt": message, "length": length} for message, length in zip(messages, lengths, strict=True)]
    system = context.system

    async def work(engine: VLLMEngine) -> None:
        marks: list[tuple[float, int]] = []

        async def answer(row: Row) -> Row:
            reply = await engine.reply(conversation(system, row["prompt"]), limited(row["length"]))
            marks.append((time.perf_counter(), reply.completion_tokens))
            if len(marks) % 256 == 0:
                tell()
            return reply.row()

        def tell() -> None:
            tell_rate(context, sum(tokens for _, tokens in marks), time.perf_counter() - begun, len(marks))

        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            rows = Rows(Path(folder) / "rows.jsonl", inputs, {})
            await rows.fill(answer, concurrency=engine.concurrency)
        tell()
        if steady := steady_rate(marks, engine.concurrency):
            context.tell(steady_rate=steady)

    ours(context, work, extra=extra, profile=profile)


def steady_rate(marks: list[tuple[float, int]], at_once: int) -> float | None:
    """New tokens per second while the batch is full; None where there are too few answers for such a time.

    marks: when each answer ended, in order, and its tokens. at_once: answers in flight.
    """
    # The first to end are the short ones, and when nothing waits any more the batch empties.
    full = marks[at_once:-at_once]
    if len(full) < 2 * at_once:
        return None
    return round(sum(tokens for _, tokens in full[1:]) / (full[-1][0] - full[0][0]), 1)


# Experiments: fewer and shorter answers, so that one takes about half a minute after the engine's start.

TRIED, TRIED_MEDIAN = 1536, 130


def tried_requests(context: Context, times: int = 1, answers: int = 1, system: bool = True) -> list[Asked]:
    """The teacher's requests in small. times: as many. answers: to each message. system: behind the system prompt."""
    lengths = context.lengths(times * context.count(TRIED), TRIED_MEDIAN)
    found = []
    for number, length in enumerate(lengths):
        text = context.text(number // answers, 10 if context.tiny else MESSAGE)
        messages = conversation(context.system, text) if system else [{"role": "user", "content": text}]
        found.append(Asked(messages, limited(length)))
    return found


def teacher_tried(context: Context, extra: dict[str, Any] | None = None, times: int = 1) -> None:
    """The teacher's requests in small. extra: settings of the engine. times: as many requests."""

    async def work(engine: VLLMEngine) -> None:
        await flow(engine, tried_requests(context, times), functools.partial(tell_rate, context))

    ours(context, work, extra=extra)


def teacher_parts(context: Context) -> None:
    """The project's engine, whose rate the other experiments compare with; and with one part of the work left out."""
    ways: dict[str, tuple[list[Asked], dict[str, float]]] = {
        "as it is": (tried_requests(context), {}),
        "no system prompt": (tried_requests(context, system=False), {}),
        "top-p 1": (tried_requests(context), {"top_p": 1.0}),
        "greedy": (tried_requests(context), {"top_p": 1.0, "temperature": 0.0}),
        "five answers to each message": (tried_requests(context, answers=5), {}),
        "no repetition penalty": (tried_requests(context), {"repetition_penalty": 1.0}),
    }

    async def work(engine: VLLMEngine) -> None:
        for way, (requests, change) in ways.items():
            await engine._llm.reset_prefix_cache()
            changed = [replace(each, sampling=replace(each.sampling, **change)) for each in requests]
            await flow(engine, changed, lambda *figures, way=way: context.tell(**{way: rate_of(*figures)}))
            context.tell(rate=context.told["as it is"]["rate"])

    ours(context, work)


def teacher_profile(context: Context) -> None:
    """An experiment: which kernels take the time."""
    teacher_ours(context, profile=True)


# vLLM's own worker, which has every request read the system prompt's keys and values by itself.
UNSHARED = {"worker_cls": "auto"}
# vLLM's own CUDA graphs, which end at 512 tokens.
FEW_GRAPHS: dict[str, Any] = {"compilation_config": {}}


def teacher_few_graphs(context: Context) -> None:
    """An experiment: as ours, with vLLM's own CUDA graphs."""
    teacher_ours(context, FEW_GRAPHS)


def teacher_one_process(context: Context) -> None:
    """An experiment: as ours, with one process that schedules and launches kernels, as vLLM has it for one GPU."""
    teacher_ours(context, {"distributed_executor_backend": "uni"})


def teacher_unshared(context: Context) -> None:
    """As ours, but for the system prompt, which every request reads by itself."""
    teacher_ours(context, UNSHARED)


def teacher_fp8(context: Context) -> None:
    """Weights in eight bits."""
    teacher_tried(context, {"quantization": "fp8"})


def teacher_fp8_cache(context: Context) -> None:
    """Keys and values in eight bits."""
    teacher_tried(context, {"kv_cache_dtype": "fp8"})


def teacher_dp(context: Context) -> None:
    """Twice the requests on two GPUs, each with a whole copy of the model."""
    teacher_tried(context, {"tensor_parallel_size": 1, "data_parallel_size": 2}, times=2)


def teacher_tp(context: Context) -> None:
    """Twice the requests on two GPUs that share one copy, which then has room for twice the sequences."""
    teacher_tried(context, {"tensor_parallel_size": 2, "data_parallel_size": 1, "max_num_seqs": 2048}, times=2)


# Two copies talk.

CONVERSATIONS, TURNS = 384, 6


def talk_lengths(context: Context) -> list[list[int]]:
    """conversation → the lengths of its turns."""
    count = context.count(CONVERSATIONS)
    drawn = context.lengths(count * TURNS)
    return [drawn[number * TURNS : (number + 1) * TURNS] for number in range(count)]


def interaction_published(context: Context) -> None:
    """All conversations wait at each turn for the slowest."""
    from vllm.lora.request import LoRARequest

    lengths = talk_lengths(context)
    chat = load_chat(context.model)
    turns: list[list[str]] = [[] for _ in lengths]
    tokens, begun = 0, 0.0
    adapter = shape.save_adapter(context.folder / "adapter", context.folder / "model")
    lora = LoRARequest("adapter", 1, str(adapter))
    with offline(context, PUBLISHED_TALK, lora=True) as engine:
        generate(engine, [chat.ids("w1 w2 w3")] * 8, [8] * 8, lora)
        begun = time.perf_counter()
        for number in range(TURNS):
            prompts = [chat.encode(seen(context, said)).ids for said in turns]
            answers, _ = generate(engine, prompts, [each[number] for each in lengths], lora)
            for said, answer in zip(turns, answers, strict=True):
                said.append(chat.decode(answer))
            tokens += sum(map(len, answers))
            tell_rate(context, tokens, time.perf_counter() - begun, len(lengths) * (number + 1))


def seen(context: Context, turns: list[str]) -> list[dict[str, str]]:
    """The conversation as the one who speaks next sees it."""
    greeting = context.text(-2, 8)
    opened = f" {greeting}" if len(turns) % 2 else ""
    messages = view(greeting, turns, "greeter" if len(turns) % 2 else "other")
    return [{"role": "system", "content": context.system + opened}, *messages]


def interaction_ours(
    context: Context, extra: dict[str, Any] | None = None, folded: bool = True, profile: bool = False
) -> None:
    """Each conversation goes on at its own pace, no more at once than the memory keeps prefixes of."""
    lengths = talk_lengths(context)
    adapter = shape.save_adapter(context.folder / "adapter", context.folder / "model")

    async def work(engine: VLLMEngine) -> None:
        tokens, done = 0, 0
        begun = time.perf_counter()
        at_once = rows_at_once(engine, TURNS, context.most)
        free = asyncio.Semaphore(at_once)
        context.tell(room=engine.room, at_once=at_once, counted_seconds=counted_seconds(context, lengths, at_once))

        async def talk(each: list[int]) -> None:
            nonlocal tokens, done
            async with free:
                turns: list[str] = []
                for length in each:
                    reply = await engine.reply(seen(context, turns), limited(length), adapter)
                    turns.append(reply.text)
                    tokens += reply.completion_tokens
                    done += 1
                if done % 128 == 0:
                    tell_rate(context, tokens, time.perf_counter() - begun, done)

        await asyncio.gather(*map(talk, lengths))
        tell_rate(context, tokens, time.perf_counter() - begun, done)

    ours(context, work, adapter, extra=extra, folded=folded, profile=profile)


def counted_seconds(context: Context, lengths: list[list[int]], at_once: int) -> float | None:
    """How long conversations would take by counting, at the ceilings that the machine's side measured; None without it.

    A step reads the weights once or multiplies its tokens with them, whichever takes longer, and reads its keys and values,
    those of the system prompt once. Its tokens are one of each conversation under way, and the reply before of each that
    begins a turn. lengths: conversation → tokens of its turns.
    """
    path = context.folder / "machine.machine.json"
    ceilings = json.loads(path.read_text()) if path.exists() else {}
    if not ceilings.get("gpu"):
        return None
    weights = sum(file.stat().st_size for file in (context.folder / "model").glob("*.safetensors"))
    config = context.config
    kept = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    read, multiplied = ceilings["copy_gb_per_second"] * 1e9, ceilings["matrix_tflops"] * 1e12
    # Of each conversation: tokens written so far and in all, and the length of the turn that ends after so many.
    waiting = [[0, sum(turns), dict(zip(itertools.accumulate(turns), turns, strict=True))] for turns in lengths]
    running: list[list[Any]] = []
    taken, new = 0.0, SYSTEM
    while waiting or running:
        begun = waiting[: at_once - len(running)]
        del waiting[: len(begun)]
        running += begun
        tokens = len(running) + new + MESSAGE * len(begun)
        # Two operations for each weight of two bytes.
        taken += max(weights / read, tokens * weights / multiplied)
        taken += (SYSTEM + sum(MESSAGE + written for written, _, _ in running)) * kept / read
        for each in running:
            each[0] += 1
        running = [each for each in running if each[0] < each[1]]
        new = sum(ends.get(written, 0) for written, _, ends in running)
    return round(taken, 1)


def interaction_profile(context: Context) -> None:
    """An experiment: which kernels take the time."""
    interaction_ours(context, profile=True)


def interaction_apart_profile(context: Context) -> None:
    """An experiment: which kernels take the time with the adapter beside the weights."""
    interaction_ours(context, folded=False, profile=True)


def interaction_apart(context: Context) -> None:
    """An experiment: with the adapter beside the weights, as where several personas share an engine."""
    interaction_ours(context, folded=False)


def interaction_few_graphs(context: Context) -> None:
    """An experiment: as apart, with vLLM's own CUDA graphs."""
    interaction_ours(context, FEW_GRAPHS, folded=False)


def interaction_unshared(context: Context) -> None:
    """An experiment: as apart, but for the system prompt, which every request reads by itself."""
    interaction_ours(context, UNSHARED, folded=False)


# Steered answers.

STEERED = 2048


def control_vector(context: Context) -> Path:
    """A random control vector for the middle three quarters of the layers."""
    import numpy as np

    from repeng import ControlVector

    count = context.config["num_hidden_layers"]
    draw = np.random.default_rng(SEED)
    layers = range(count // 8, count - count // 8)
    path = context.folder / "vector.safetensors"
    directions = {
        layer: (0.01 * draw.standard_normal(context.config["hidden_size"])).astype(np.float32) for layer in layers
    }
    ControlVector("llama", directions).save(path, {})
    return path


def steering_requests(context: Context) -> tuple[list[list[dict[str, str]]], list[int]]:
    """Conversations of one message, and the lengths of their answers."""
    count = context.count(STEERED)
    messages = [[{"role": "user", "content": context.text(number, MESSAGE)}] for number in range(count)]
    return messages, context.lengths(count)


def steering_published(context: Context) -> None:
    """transformers' generate with a hook, in batches of 64 that run to the longest; what is past an answer is waste."""
    import torch

    from repeng import ControlModel, ControlVector

    messages, lengths = steering_requests(context)
    chat = load_chat(context.model)
    begun = time.perf_counter()
    network, _ = load_model(context.model)
    context.tell(start_seconds=round(time.perf_counter() - begun, 1))
    vector = ControlVector.load(control_vector(context))
    steered = ControlModel(network, vector.directions)
    steered.set_control(vector, 1.0)
    tokens = made = 0
    begun = time.perf_counter()
    for start in range(0, len(messages), STEERING_BATCH):
        prompts = [chat.encode(message).ids for message in messages[start : start + STEERING_BATCH]]
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=network.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=network.device)
        wanted = lengths[start : start + STEERING_BATCH]
        with torch.inference_mode():
            network.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max(wanted),
                min_new_tokens=max(wanted),
                do_sample=True,
                temperature=SAMPLING.temperature,
                top_p=SAMPLING.top_p,
                top_k=0,
                repetition_penalty=SAMPLING.repetition_penalty,
            )
        tokens += sum(wanted)
        made += max(wanted) * len(wanted)
        tell_rate(context, tokens, time.perf_counter() - begun, start + len(wanted))
        context.tell(tokens_made=made)
        if time.perf_counter() - begun > context.seconds / 2:
            break


def steering_ours(context: Context, extra: dict[str, Any] | None = None) -> None:
    """The engine, which steers while a reply is written."""
    messages, lengths = steering_requests(context)
    steering = Steering(control_vector(context), 1.0)
    requests = [Asked(*each, steering) for each in zip(messages, map(limited, lengths), strict=True)]

    async def work(engine: VLLMEngine) -> None:
        await flow(engine, requests, functools.partial(tell_rate, context))

    ours(context, work, steered=True, extra=extra)


def steering_eager(context: Context) -> None:
    """An experiment: the same without CUDA graphs."""
    steering_ours(context, {"enforce_eager": True})


# Engine start.


def start(context: Context) -> None:
    """Seconds until the project's engine answers."""

    async def work(_: VLLMEngine) -> None:
        context.tell(rate=None)

    ours(context, work)
