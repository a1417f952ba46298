"""The works of the benchmark, each as the published scripts set it up and as this project does.

A side runs in a process of its own. It tells its figures as they come, so that one that is cut off has told something.
"""

import asyncio
import contextlib
import functools
import gzip
import itertools
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import shape

from character import training
from character.engine import Engine, Sampling, Steering
from character.engine.chat import load_chat
from character.engine.transformers import load_model, load_network
from character.engine.vllm import CPU_DEFAULTS, VLLMEngine
from character.introspection.self_interaction import view
from character.models import Model, resolve
from character.rows import Row, Rows
from character.steps import rows_at_once
from character.utils import write_json

# The published scripts' way: so many sequences at once, and no prefix caching.
PUBLISHED_TEACHER = {"max_num_seqs": 64, "enable_prefix_caching": False}
PUBLISHED_TALK = {"enable_prefix_caching": False}
PUBLISHED_TRAINING = {"micro_batch_size": 2, "gradient_checkpointing": True}
STEERING_BATCH = 64
SAMPLING = Sampling()
# Lengths of answers in tokens: log-normal.
MEDIAN, SIGMA, MOST = 330, 0.6, 1024
SYSTEM, MESSAGE = 950, 60
SEED = 123456
# Sides that use two GPUs; every other one sees one.
ON_TWO_GPUS = ("teacher.dp", "teacher.tp", "dpo.two", "sft.two")


@dataclass
class Context:
    """What a side is given. scale: of the number of requests. seconds: after which a side that can stop, stops."""

    folder: Path
    out: Path
    scale: float
    seconds: float
    tiny: bool

    def __post_init__(self) -> None:
        self.told: dict[str, Any] = {}

    def tell(self, **figures: Any) -> None:
        """Add figures to the side's file."""
        self.told |= figures
        if training.is_main():
            write_json(self.out, self.told)

    @property
    def model(self) -> Model:
        """The model that is measured."""
        return resolve(str(self.folder / "model"), "Llama")

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Its config."""
        found: dict[str, Any] = json.loads((self.folder / "model" / "config.json").read_text())
        return found

    @property
    def most(self) -> int:
        """The longest answer."""
        return 24 if self.tiny else MOST

    def count(self, full: int) -> int:
        """So many requests, scaled."""
        return max(2, round(full * self.scale))

    def lengths(self, count: int, median: float = MEDIAN) -> list[int]:
        """Lengths of answers."""
        return shape.lengths(random.Random(SEED), count, 8 if self.tiny else median, SIGMA, self.most)

    def text(self, number: int, tokens: int) -> str:
        """A text of its own for each number."""
        return shape.words(random.Random(f"{SEED} {number}"), tokens, self.config["vocab_size"])

    @functools.cached_property
    def system(self) -> str:
        """The system prompt that all share."""
        return self.text(-1, 40 if self.tiny else SYSTEM)


def has_gpu() -> bool:
    """Whether there is one."""
    import torch

    return torch.cuda.is_available()


# The machine.


def machine(context: Context) -> None:
    """What the GPU is, and its two ceilings: a bf16 matrix product and a copy, on random data."""
    import torch

    if not has_gpu():
        context.tell(gpu=None)
        return
    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    source = torch.randn(2**30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    flops = 2 * size**3 / median_seconds(lambda: a @ b)
    moved = 2 * source.numel() * 2 / median_seconds(lambda: target.copy_(source))
    free, total = torch.cuda.mem_get_info()
    context.tell(
        gpu=torch.cuda.get_device_name(),
        gpus=torch.cuda.device_count(),
        memory_gb=round(total / 1e9, 1),
        free_gb=round(free / 1e9, 1),
        matrix_tflops=round(flops / 1e12, 1),
        copy_gb_per_second=round(moved / 1e9),
    )


def median_seconds(work: Callable[[], object], repeats: int = 30) -> float:
    """Seconds of one call on the GPU, the median of several after warming up."""
    import torch

    for _ in range(5):
        work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    times = sorted(first.elapsed_time(second) for first, second in itertools.pairwise(marks))
    return times[repeats // 2] / 1e3


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


# Training.

BATCH = 32


@dataclass
class Timing:
    """When each micro-batch ended, and how many tokens had been seen by then."""

    seconds: float
    tokens: int
    step: int


def timed(context: Context, trainer: Any, per_token: float, warm: int) -> None:
    """Run a Trainer and tell its rate. per_token: operations per parameter and token.

    warm: how many timings are left out after the first. One is taken after each step and each micro-batch.
    """
    import torch
    from transformers import TrainerCallback

    marks: list[Timing] = []
    accelerator = trainer.accelerator
    parameters = sum(weight.numel() for name, weight in trainer.model.named_parameters() if "lora_" not in name)

    class Watch(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            mark(state)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            mark(state)
            taken = torch.tensor([marks[-1].seconds - marks[0].seconds], device=accelerator.device)
            # All processes stop together.
            if float(accelerator.gather(taken).max()) > context.seconds:
                control.should_training_stop = True

    def mark(state: Any) -> None:
        if has_gpu():
            torch.cuda.synchronize()
        marks.append(Timing(time.perf_counter(), int(trainer._total_train_tokens), state.global_step))
        if len(marks) > warm + 1:
            seconds = marks[-1].seconds - marks[warm].seconds
            tokens = marks[-1].tokens - marks[warm].tokens
            rate = tokens / seconds
            context.tell(
                tokens=tokens,
                seconds=round(seconds, 2),
                rate=round(rate, 1),
                tflops=round(per_token * parameters * rate / 1e12, 1),
                timings=len(marks) - 1 - warm,
            )

    padded = 0

    def count(_module: Any, _words: Any, named: dict[str, Any]) -> None:
        nonlocal padded
        padded += named["input_ids"].numel()

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.args.save_strategy = "no"
    trainer.add_callback(Watch())
    trainer.train()
    device = training.device_of(trainer)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seen = int(trainer._total_train_tokens)
    passes = 2 if per_token == 6 else 1
    padding = 1 - passes * seen / (padded * training.world_size())
    context.tell(device=device, losses=losses, parameters=parameters, padding=round(padding, 3))


def pairs_of(context: Context, steps: int) -> list[dict[str, Any]]:
    """Pairs of answers to one message; the two lengths are drawn apart."""
    count = steps * BATCH
    lengths = [min(length, 960) for length in context.lengths(2 * count)]
    found = []
    for number in range(count):
        prompt = {"role": "user", "content": context.text(number, 10 if context.tiny else MESSAGE)}
        pair = {}
        for side, name in enumerate(("chosen", "rejected")):
            text = context.text(-10 - 2 * number - side, lengths[2 * number + side])
            pair[name] = [prompt, {"role": "assistant", "content": text}]
        found.append(pair)
    return found


def as_published() -> None:
    """Have the trainers leave out what this project adds for speed."""
    training.speed_up = lambda *_, **__: None  # type: ignore[assignment]
    training.fused_kernels = lambda: False  # type: ignore[assignment]


def dpo(context: Context, steps: int, warm: int, run: Callable[..., None] = timed, **settings: Any) -> None:
    """Some steps of DPO."""
    from character.distillation import train

    args = train.Args(batch_size=BATCH, **settings)
    pairs = pairs_of(context, steps)
    begun = time.perf_counter()
    trainer = train.make_trainer(args, context.model, pairs, context.folder / "checkpoints")
    context.tell(start_seconds=round(time.perf_counter() - begun, 1))
    run(context, trainer, 6, warm)


def dpo_published(context: Context) -> None:
    """TRL's way: two pairs at once, activations recomputed, rows as they come, PEFT's switch for the reference."""

    def as_trl(context: Context, trainer: Any, *more: Any) -> None:
        training.switched_off = lambda _: trainer.accelerator.unwrap_model(trainer.model).disable_adapter()
        timed(context, trainer, *more)

    as_published()
    dpo(context, 1, 3, as_trl, **PUBLISHED_TRAINING)


def dpo_ours(context: Context) -> None:
    """The step's own settings."""
    dpo(context, 6, 0)


def dpo_profile(context: Context) -> None:
    """An experiment: which kernels take the time."""
    dpo(context, 2, 0, profiled)


def dpo_two(context: Context) -> None:
    """An experiment: as ours, on two GPUs."""
    if training.world_size() == 1:
        spread(2)
    else:
        dpo_ours(context)


def spread(count: int) -> None:
    """Run this side in so many processes, each on its own GPU, as torchrun does."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env=os.environ | common | {"MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            # The others would wait for it.
            for rank in ranks:
                rank.kill()
        time.sleep(0.2)
    if any(rank.returncode for rank in ranks):
        sys.exit(1)


# Kernels by what they do: the first that a name fits.
KINDS = {
    "adapters beside the weights": r"_lora_",
    "sampling": r"top_?k|top_?p|penalt|gumbel|sampl|multinomial|bincount|softmax|sort",
    "attention": r"flash|fmha|attention",
    "matrix products": r"gemm|nvjet|cutlass|xmma|matmul|mkldnn|aten::(add)?mm",
    "optimizer and norm": r"multi_tensor|adam|norm_kernel|lpnorm",
    "logits": r"^_(forward|backward)_kernel",
    "other Triton kernels": r"^_",
    "communication": r"nccl",
    "copies": r"mem(cpy|set)",
}


def profiled(context: Context, trainer: Any, *_: Any) -> None:
    """Run two steps and tell the kernels of the second by their time."""
    from torch import profiler
    from transformers import TrainerCallback

    kind = profiler.ProfilerActivity.CUDA if has_gpu() else profiler.ProfilerActivity.CPU
    watched = profiler.profile(activities=[kind])
    seconds = 0.0

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal seconds
            if state.global_step == 1:
                watched.start()
                seconds = -time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal seconds
            if state.global_step == 2:
                # It waits for the GPU.
                float(next(iter(trainer.model.parameters())).flatten()[0])
                seconds += time.perf_counter()
                watched.stop()

    trainer.args.save_strategy = "no"
    trainer.add_callback(Watch())
    trainer.train()
    name = "self_device_time_total" if has_gpu() else "self_cpu_time_total"
    context.tell(step_seconds=round(seconds, 3), device=training.device_of(trainer))
    tell_kernels(
        context, [(kernel.key, kernel.count, getattr(kernel, name) / 1e6) for kernel in watched.key_averages()]
    )


def tell_kernels(context: Context, kernels: list[tuple[str, int, float]]) -> None:
    """Tell what took the time. kernels: (name, times it ran, seconds in all)."""
    kernels = sorted(kernels, key=lambda kernel: -kernel[2])
    whole = sum(seconds for _, _, seconds in kernels)
    kinds: dict[str, float] = {}
    for name, _, seconds in kernels:
        fits = (what for what, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
        what = next(fits, "elementwise and other")
        kinds[what] = kinds.get(what, 0) + seconds
    context.tell(
        kernel_seconds=round(whole, 3),
        kinds={what: round(taken, 4) for what, taken in sorted(kinds.items(), key=lambda pair: -pair[1])},
        kernels=[
            [name[:100], times, round(seconds, 4), round(seconds / whole, 3)] for name, times, seconds in kernels[:25]
        ],
    )


def sft_rows(context: Context, steps: int) -> list[list[dict[str, str]]]:
    """Conversations of ten turns under a short system prompt, at most 3,072 tokens."""
    found = []
    for number in range(steps * BATCH):
        draw = random.Random(f"{SEED} sft {number}")
        said = shape.lengths(draw, 10, 4 if context.tiny else 130, SIGMA, 400)
        turns = [
            {"role": ("user", "assistant")[turn % 2], "content": context.text(-(1000 * number + turn), length)}
            for turn, length in enumerate(said)
        ]
        found.append([{"role": "system", "content": context.text(-3, 20)}, *turns])
    return found


def sft(context: Context, steps: int, warm: int, run: Callable[..., None] = timed, **settings: Any) -> None:
    """Some steps of SFT on the model with an adapter folded in."""
    from character.introspection import train

    adapter = context.folder / "adapter"
    if training.world_size() == 1:
        shape.save_adapter(adapter, context.folder / "model")
    args = train.Args(batch_size=BATCH, **settings)
    rows = sft_rows(context, steps)
    begun = time.perf_counter()
    trainer = train.make_trainer(args, context.model, adapter, rows, context.folder / "checkpoints")
    context.tell(start_seconds=round(time.perf_counter() - begun, 1))
    run(context, trainer, 4, warm)


def sft_published(context: Context) -> None:
    """TRL's way."""
    as_published()
    sft(context, 1, 3, **PUBLISHED_TRAINING)


def sft_ours(context: Context) -> None:
    """The step's own settings."""
    sft(context, 4, 0)


def sft_profile(context: Context) -> None:
    """An experiment: which kernels take the time."""
    sft(context, 2, 0, profiled)


def sft_two(context: Context) -> None:
    """An experiment: as ours, on two GPUs."""
    if training.world_size() == 1:
        shape.save_adapter(context.folder / "adapter", context.folder / "model")
        spread(2)
    else:
        sft_ours(context)


# Engine start.


def start(context: Context) -> None:
    """Seconds until the project's engine answers."""

    async def work(_: VLLMEngine) -> None:
        context.tell(rate=None)

    ours(context, work)


# Truth: the bundled model, whose weights are real, says the same everywhere.

QUESTIONS = 96
GREEDY = Sampling(temperature=0, top_p=1, repetition_penalty=1, max_tokens=96)


def truth_requests(context: Context) -> list[list[dict[str, str]]]:
    """Conversations with the bundled model, half of them behind a constitution."""
    from character import constitution, prompts
    from character.distillation.teacher import system_prompt

    messages = prompts.load("pocket-train", context.count(QUESTIONS))
    system = system_prompt(constitution.load("humor"), resolve("pocket"))
    alone = [[{"role": "user", "content": message}] for message in messages]
    return [[{"role": "system", "content": system}, *each] if number % 2 else each for number, each in enumerate(alone)]


def truth_parts(context: Context) -> tuple[Path, Path]:
    """(an adapter, a control vector) for the bundled model; both random, and strong enough to be heard."""
    import numpy as np

    from repeng import ControlVector

    pocket = Path(resolve("pocket").source)
    # A stronger one makes gibberish, whose text does not become the same tokens again when it is judged.
    adapter = shape.save_adapter(context.folder / "pocket-adapter", pocket, rank=8, scale=0.1)
    config = json.loads((pocket / "config.json").read_text())
    draw = np.random.default_rng(SEED)
    directions = {
        layer: (0.3 * draw.standard_normal(config["hidden_size"])).astype(np.float32)
        for layer in range(1, config["num_hidden_layers"] - 1)
    }
    path = context.folder / "pocket-vector.safetensors"
    ControlVector(config["model_type"], directions).save(path, {})
    return adapter, path


def small_share() -> dict[str, float]:
    """Settings by which vLLM takes of a GPU's memory what the small model needs, whatever else uses the GPU."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return {}
    share = 6e9 / current_platform.get_device_total_memory()
    return {"gpu_memory_utilization": share, "kv_cache_memory_bytes": int(1.5e9)}


def truth_answers(
    context: Context, engine_name: str, ways: tuple[str, ...], folded: bool = False, **extra: Any
) -> None:
    """Greedy answers in each of these ways. extra: settings of vLLM's engine that an experiment adds."""
    from character.engine import open_engine

    conversations = truth_requests(context)
    adapter, vector = truth_parts(context)
    answers: dict[str, list[str]] = {way: [""] * len(conversations) for way in ways}

    async def run() -> None:
        adapters = [adapter] if any("adapter" in way for way in ways) else []
        steered = "steered" in ways
        if engine_name == "vllm":
            changed = small_share() | extra
            engine: Engine = Measured(resolve("pocket"), SEED, adapters, steered, folded=folded, extra=changed)
        else:
            engine = open_engine(resolve("pocket"), engine=engine_name, seed=SEED, adapters=adapters, steered=steered)
        async with engine:
            for way in ways:
                used = adapter if "adapter" in way else None
                steering = Steering(vector, 1.0) if "steered" in way else None
                # Those behind the constitution by themselves, so that all requests at once share what they begin with.
                for half in (slice(0, None, 2), slice(1, None, 2)):
                    replies = await asyncio.gather(
                        *(engine.reply(each, GREEDY, used, steering=steering) for each in conversations[half])
                    )
                    answers[way][half] = [reply.text for reply in replies]
                context.tell(answers=answers)

    asyncio.run(run())


PLAIN, STEERED_WAYS = ("plain", "adapter"), ("steered", "adapter steered")


def truth_vllm(context: Context) -> None:
    """vLLM's answers, on the GPU where there is one: there from compiled graphs."""
    truth_answers(context, "vllm", PLAIN)


def truth_steered(context: Context) -> None:
    """vLLM's answers when it is opened for steering."""
    truth_answers(context, "vllm", STEERED_WAYS)


def truth_folded(context: Context) -> None:
    """vLLM's answers with the adapter folded into the weights."""
    truth_answers(context, "vllm", ("adapter",), folded=True)


def truth_transformers(context: Context) -> None:
    """transformers' answers, on the GPU where there is one."""
    truth_answers(context, "transformers", (*PLAIN, *STEERED_WAYS))


def truth_float32(context: Context) -> None:
    """vLLM's answers in float32, where rounding leaves nearly every answer alone: on the GPU, and on a CPU.

    On a GPU its adapters have 16 bits.
    """
    truth_answers(context, "vllm", ("plain", "steered"), dtype="float32")


def truth_shared(context: Context) -> None:
    """vLLM's answers where what all prompts begin with is read once at every token, not in large batches alone."""
    truth_answers(context, "vllm", PLAIN, compilation_config={"cudagraph_mode": "PIECEWISE"})


def truth_unshared(context: Context) -> None:
    """vLLM's answers where each request reads it by itself."""
    truth_answers(context, "vllm", PLAIN, compilation_config={"cudagraph_mode": "PIECEWISE"}, **UNSHARED)


def truth_fp8(context: Context) -> None:
    """vLLM's answers with weights in eight bits."""
    truth_answers(context, "vllm", PLAIN, quantization="fp8")


def truth_fp8_cache(context: Context) -> None:
    """vLLM's answers with keys and values in eight bits."""
    truth_answers(context, "vllm", PLAIN, kv_cache_dtype="fp8")


def told_answers(context: Context, side: str) -> dict[str, list[str]]:
    """way → the answers of a side; empty for one that did not run."""
    path = context.out.with_name(f"truth.{side}.json")
    found: dict[str, list[str]] = json.loads(path.read_text()).get("answers", {}) if path.exists() else {}
    return found


def parting(network: Any, ids: list[int], rests: list[str], pieces: dict[int, str], end: int) -> float:
    """How far apart the logits of the two tokens are in which two greedy texts part.

    ids: what stands before. rests: how the texts go on, each till its `end`. pieces: token → its text. A text need not
    become the same tokens again that it was written in, so each is taken to be written in the likeliest ones.
    """
    import torch

    while True:
        logits = network(torch.tensor([ids])).logits[0, -1].float()
        fitting = [
            [each for each, piece in pieces.items() if rest.startswith(piece)] if rest else [end] for rest in rests
        ]
        first, second = (max(each, key=logits.__getitem__) for each in fitting)
        if first != second:
            return abs(float(logits[first] - logits[second]))
        ids = [*ids, first]
        rests = [rest.removeprefix(pieces[first]) for rest in rests]


def truth_judged(context: Context) -> None:
    """How often vLLM and transformers agree, and an experiment and vLLM; how near two tokens were where they part."""
    import peft
    import torch

    from repeng import ControlModel, ControlVector

    conversations = truth_requests(context)
    adapter, path = truth_parts(context)
    usual, expected = told_answers(context, "vllm"), told_answers(context, "transformers")
    compared = [("", usual | told_answers(context, "steered"), expected)]
    compared += [(f"{side}: ", told_answers(context, side), usual) for side in ("folded", "fp8", "fp8_cache")]
    compared += [("read once: ", told_answers(context, "shared"), told_answers(context, "unshared"))]
    # A CPU's, made by the same side in another folder and copied here.
    compared += [("float32, GPU and CPU: ", told_answers(context, "float32"), told_answers(context, "cpu"))]

    model = resolve("pocket")
    network, tokenizer = load_network(model)
    network = peft.PeftModel.from_pretrained(network.float(), str(adapter)).eval()
    chat = load_chat(model)
    vector = ControlVector.load(path)
    texts = {word: tokenizer.decode([word]) for word in set(range(len(tokenizer))) - set(tokenizer.all_special_ids)}
    # A part of a character is no text.
    pieces = {word: text for word, text in texts.items() if text and "\ufffd" not in text}
    end = tokenizer.eos_token_id
    for label, way, first, second in (
        (label, way, ones[way], others[way]) for label, ones, others in compared for way in ones if way in others
    ):
        steered = ControlModel(network, vector.directions)
        if "steered" in way:
            steered.set_control(vector, 1.0)
        equal, gaps, tokens, agreed = 0, [], 0, 0
        for messages, one, other in zip(conversations, first, second, strict=True):
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (one, other)]
            common = next((n for n, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
            tokens += max(map(len, ids))
            agreed += common
            if one == other:
                equal += 1
                continue
            rests = [tokenizer.decode(each[common:]) for each in ids]
            with torch.inference_mode(), contextlib.ExitStack() as stack:
                if "adapter" not in way:
                    stack.enter_context(network.disable_adapter())
                gaps.append(parting(network, chat.encode(messages).ids + ids[0][:common], rests, pieces, end))
        steered.unwrap()
        figures = {
            "answers": len(conversations),
            "equal": equal,
            "tokens before the first difference": round(agreed / max(1, tokens), 4),
            "largest float32 logit gap at a first difference": round(max(gaps, default=0.0), 4),
            "distinct answers": len(set(first)),
        }
        context.tell(**{label + way: figures})


# work → side → what runs it. The first two sides make the ratio.
WORKS: dict[str, dict[str, Callable[[Context], None]]] = {
    "machine": {"machine": machine},
    "teacher": {"published": teacher_published, "ours": teacher_ours},
    "interaction": {"published": interaction_published, "ours": interaction_ours},
    "steering": {"published": steering_published, "ours": steering_ours},
    "dpo": {"published": dpo_published, "ours": dpo_ours},
    "sft": {"published": sft_published, "ours": sft_ours},
    "start": {"cold": start, "warm": start},
    "truth": {
        "vllm": truth_vllm,
        "steered": truth_steered,
        "folded": truth_folded,
        "transformers": truth_transformers,
        "float32": truth_float32,
        "judged": truth_judged,
    },
}
# No part of the ratios; run by `--only teacher.parts` and the like.
EXPERIMENTS: dict[str, dict[str, Callable[[Context], None]]] = {
    "teacher": {
        "parts": teacher_parts,
        "profile": teacher_profile,
        "few_graphs": teacher_few_graphs,
        "one_process": teacher_one_process,
        "unshared": teacher_unshared,
        "fp8": teacher_fp8,
        "fp8_cache": teacher_fp8_cache,
        "dp": teacher_dp,
        "tp": teacher_tp,
    },
    "interaction": {
        "apart": interaction_apart,
        "profile": interaction_profile,
        "apart_profile": interaction_apart_profile,
        "few_graphs": interaction_few_graphs,
        "unshared": interaction_unshared,
    },
    "steering": {"eager": steering_eager},
    "truth": {
        "fp8": truth_fp8,
        "fp8_cache": truth_fp8_cache,
        "shared": truth_shared,
        "unshared": truth_unshared,
    },
    "dpo": {"profile": dpo_profile, "two": dpo_two},
    "sft": {"profile": sft_profile, "two": sft_two},
}
