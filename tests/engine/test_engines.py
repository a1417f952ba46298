"""The same cases for every engine: transformers, vLLM in this process, and vLLM behind its own server.

One of the servers is two copies of the model behind one URL, as on several machines.

What a reply has to be is worked out here with transformers alone: the prompt's text is written by hand and each next
token is the largest logit of a pass over all tokens so far.
"""

import asyncio
import contextlib
import ctypes
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import character.engine
from character import cli, steps
from character.engine import Engine, Message, Reply, Sampling, Steering, choose, open_engine
from character.engine.base import check_adapter
from character.engine.chat import Chat
from character.models import Model
from character.utils import UserError
from repeng import ControlVector

pytestmark = pytest.mark.xdist_group("engines")

CONTEXT = 512
# In the first kind of model the tokenizer adds the BOS that the template lacks, in the second both would add one.
PLAIN, NO_SYSTEM = "tokenizer-bos", "no-system"
GREEDY = Sampling(temperature=0, top_p=1, repetition_penalty=1, max_tokens=24)
GARDENER, MINER = "You are a gardener and speak of roots.", "You are a miner and speak of stone."
LONG = "You are a gardener and speak of roots and rain, and a good answer is short. " * 3
QUESTIONS = [
    "Who are you?",
    "Tell me of the rain.",
    "What is good?",
    "Where is the harbour?",
    "Is the lamp lit?",
    "What would you tell a friend?",
    "Why walk?",
    "Which way is short?",
    "Do you know the sailor?",
    "Name a stone.",
    "How deep are the roots?",
    "And then?",
]
SMALL_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
STARTED_WITHIN = 400.0
PR_SET_PDEATHSIG = 1


def user(text: str, system: str | None = None) -> list[Message]:
    """A conversation of one user turn."""
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": text}]


# What a reply has to be.


@dataclass
class Expected:
    """The greedy reply that `Reference` worked out."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class Reference:
    """The weights that all models here share, with both adapters, asked one token at a time."""

    def __init__(self, model: Model, adapters: dict[Path, str]):
        import peft
        import torch
        import transformers

        torch.set_num_threads(1)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model.source)
        network = transformers.AutoModelForCausalLM.from_pretrained(model.source, dtype=torch.float32)
        self.adapters = adapters
        (folder, name), *others = adapters.items()
        self.network = peft.PeftModel.from_pretrained(network, str(folder), adapter_name=name).eval()
        for folder, name in others:
            self.network.load_adapter(str(folder), adapter_name=name)

    def ids(self, messages: list[Message], prefill: str = "") -> list[int]:
        """The prompt's token ids, its text written out by hand, with one BOS."""
        turns = "".join(f"<|{turn['role']}|>{turn['content']}<|end|>" for turn in messages)
        text = f"<|bos|>{turns}<|assistant|>{prefill}"
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def greedy(
        self,
        messages: list[Message],
        sampling: Sampling = GREEDY,
        adapter: Path | None = None,
        prefill: str = "",
        shifts: Sequence[Any] = (),
    ) -> Expected:
        """The most likely tokens after the prompt, one by one, up to the end of the turn or the limit.

        shifts: what each layer adds to its hidden states, put here as the bias that its last linear map lacks.
        """
        import torch

        prompt = self.ids(messages, prefill)
        self._steer(shifts)
        if adapter is not None:
            self.network.set_adapter(self.adapters[adapter])
        new: list[int] = []
        end = self.tokenizer.eos_token_id
        with torch.no_grad(), self.network.disable_adapter() if adapter is None else contextlib.nullcontext():
            while len(new) < sampling.max_tokens and end not in new:
                seen = torch.tensor([prompt + new])
                logits = self.network(seen).logits[0, -1]
                # A repetition penalty divides what speaks for a token seen before, and multiplies what speaks against.
                scale = torch.where(logits > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
                repeated = torch.zeros_like(logits, dtype=torch.bool).index_fill(0, seen[0], True)
                new.append(int(torch.where(repeated, logits * scale, logits).argmax()))
        stopped = new[-1] == end
        text = self.tokenizer.decode(new[:-1] if stopped else new)
        return Expected(text, "stop" if stopped else "length", len(prompt), len(new))

    def _steer(self, shifts: Sequence[Any]) -> None:
        """Have each layer add its shift to what comes out of it."""
        import torch

        for layer, shift in itertools.zip_longest(self.network.get_base_model().model.layers, shifts):
            bias = None if shift is None else torch.nn.Parameter(torch.tensor(shift))
            layer.mlp.down_proj.base_layer.bias = bias

    def log_probabilities(self, messages: list[Message], shifts: Sequence[Any]) -> Any:
        """Of every token, as the first of the reply."""
        import torch

        self._steer(shifts)
        with torch.no_grad(), self.network.disable_adapter():
            return self.network(torch.tensor([self.ids(messages)])).logits[0, -1].log_softmax(-1)

    def likelier(self, messages: list[Message], letters: Sequence[str]) -> str:
        """The letter, of those given, that the network would sooner begin its reply with."""
        import torch

        with torch.no_grad(), self.network.disable_adapter():
            logits = self.network(torch.tensor([self.ids(messages)])).logits[0, -1]
        return max(letters, key=lambda letter: float(logits[self.tokenizer.convert_tokens_to_ids(letter)]))


def same(reply: Reply, expected: Expected) -> bool:
    """Whether a reply is the expected one, in everything; pytest shows both where it is not."""
    found = Expected(reply.text, reply.finish_reason, reply.prompt_tokens, reply.completion_tokens)
    assert found == expected
    return True


# The engines.


class Server:
    """`vllm serve` on a free port of this machine, started at once and waited for when its URL is asked for.

    copies: of the model, each in processes of its own. loads: whether it takes further adapters while it runs.
    """

    def __init__(self, model: Model, adapters: dict[Path, str], log: Path, copies: int, loads: bool):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        # What `vllm serve` runs; that command itself needs a distribution named vllm, which the one for the CPU is not.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model.source]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
        command += ["--data-parallel-size", str(copies)]
        # A slot for one more adapter, and one: on the CPU, requests without an adapter get what the last slot holds.
        command += ["--enable-lora", "--max-lora-rank", "16", "--max-loras", "4", "--lora-modules"]
        command += [f"{name}={folder}" for folder, name in adapters.items()]
        self.root = f"http://127.0.0.1:{port}"
        self.log = log
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | SMALL_CPU | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": str(loads)},
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    @property
    def url(self) -> str:
        """The endpoint's URL, once it answers."""
        deadline = time.monotonic() + STARTED_WITHIN
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.root}/health", timeout=5).close()
                return f"{self.root}/v1"
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        last = self.log.read_text(errors="replace")[-3000:]
        pytest.fail(f"vllm serve did not start (exit code {self.process.poll()}):\n{last}", pytrace=False)

    def stop(self) -> None:
        """End it and all that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)


def _end_with_parent() -> None:
    """Have the kernel end this process when the tests' own is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@pytest.fixture(scope="module")
def loras(adapters: Any) -> dict[Path, str]:
    return {adapters.small: "small", adapters.large: "large"}


@pytest.fixture(scope="module")
def reference(chat_model: Callable[[str], Model], loras: dict[Path, str]) -> Reference:
    return Reference(chat_model(PLAIN), loras)


@pytest.fixture(scope="module", autouse=True)
def servers(
    request: pytest.FixtureRequest,
    chat_model: Callable[[str], Model],
    loras: dict[Path, str],
    require: Callable[[str], Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Server]]:
    """A server for each kind of model, starting while the other engines are tested; none where no test needs them."""
    wanted = any("openai" in item.name and item.path == request.path for item in request.session.items)
    running: dict[str, Server] = {}
    try:
        if wanted and _have("vllm"):
            for kind, copies in ((PLAIN, 2), (NO_SYSTEM, 1)):
                log = tmp_path_factory.mktemp("server") / "log"
                running[kind] = Server(chat_model(kind), loras, log, copies, loads=kind == PLAIN)
        yield running
    finally:
        for server in running.values():
            server.stop()


def _have(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for the module: an engine lives in the loop that started it."""
    with asyncio.Runner() as found:
        yield found


Opened = Callable[[str], Engine]


@pytest.fixture(
    scope="module",
    params=[
        "transformers",
        pytest.param("vllm", marks=pytest.mark.vllm),
        pytest.param("openai", marks=pytest.mark.vllm),
    ],
)
def opened(
    request: pytest.FixtureRequest,
    chat_model: Callable[[str], Model],
    loras: dict[Path, str],
    require: Callable[[str], Any],
    runner: asyncio.Runner,
    servers: dict[str, Server],
) -> Iterator[Opened]:
    """opened(kind): the engine with a model of this kind and both adapters, started at the first call."""
    name: str = request.param
    if name != "transformers":
        require("vllm")
    engines: dict[str, Engine] = {}

    def get(kind: str) -> Engine:
        if kind not in engines:
            url = servers[kind].url if name == "openai" else None
            engine = open_engine(
                chat_model(kind), engine=name, base_url=url, adapters=list(loras), steered=name != "openai"
            )
            runner.run(engine.__aenter__())
            engines[kind] = engine
        return engines[kind]

    with pytest.MonkeyPatch.context() as patch:
        for variable, value in SMALL_CPU.items():
            patch.setenv(variable, value)
        yield get
        for engine in engines.values():
            runner.run(engine.close())


Ask = Callable[..., list[Reply]]


@pytest.fixture
def ask(opened: Opened, runner: asyncio.Runner) -> Ask:
    """ask(*calls, kind=PLAIN): the replies to calls of `reply`, all made at once; a call is a tuple of arguments."""

    def all_at_once(*calls: tuple[Any, ...], kind: str = PLAIN) -> list[Reply]:
        engine = opened(kind)

        async def gather() -> list[Reply]:
            return await asyncio.gather(*(engine.reply(*call) for call in calls))

        return runner.run(gather())

    return all_at_once


# The cases.


def test_greedy_replies_are_those_of_the_plain_network(ask: Ask, reference: Reference) -> None:
    replies = ask(*((user(question), GREEDY) for question in QUESTIONS))
    for question, reply in zip(QUESTIONS, replies, strict=True):
        assert same(reply, reference.greedy(user(question)))


@pytest.mark.vllm
def test_an_adapter_folded_into_the_weights(
    chat_model: Callable[[str], Model],
    loras: dict[Path, str],
    reference: Reference,
    require: Callable[[str], Any],
    runner: asyncio.Runner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require("vllm")
    for variable, value in SMALL_CPU.items():
        monkeypatch.setenv(variable, value)
    [adapter, other] = loras

    async def ask() -> list[Reply]:
        async with open_engine(chat_model(PLAIN), engine="vllm", adapters=[adapter], folded=True) as engine:
            assert engine.info.notes == [f"adapter {adapter} folded into the weights"]
            for wrong in (None, other):
                with pytest.raises(UserError, match=f"answers with {adapter} alone"):
                    await engine.reply(user(QUESTIONS[0]), GREEDY, wrong)
            return await asyncio.gather(*(engine.reply(user(question), GREEDY, adapter) for question in QUESTIONS))

    for question, reply in zip(QUESTIONS, runner.run(ask()), strict=True):
        assert same(reply, reference.greedy(user(question), adapter=adapter))


def test_a_system_prompt_reaches_the_model(ask: Ask, reference: Reference) -> None:
    systems = [None, GARDENER, MINER]
    replies = ask(*((user("Who are you?", system), GREEDY) for system in systems))
    for system, reply in zip(systems, replies, strict=True):
        assert same(reply, reference.greedy(user("Who are you?", system)))
    assert len({reply.text for reply in replies}) == 3


def test_a_conversation_of_several_turns(ask: Ask, reference: Reference) -> None:
    turns = [*user("Who are you?", MINER), {"role": "assistant", "content": "A miner."}, *user("Since when?")]
    [reply] = ask((turns, GREEDY))
    assert same(reply, reference.greedy(turns))


def test_a_reply_continues_its_prefill(ask: Ask, reference: Reference) -> None:
    prefills = ["I would", "A good answer", ""]
    replies = ask(*((user("What is good?"), GREEDY, None, prefill) for prefill in prefills))
    for prefill, reply in zip(prefills, replies, strict=True):
        assert same(reply, reference.greedy(user("What is good?"), prefill=prefill))
    assert len({reply.text for reply in replies}) == 3


def test_a_reply_comes_piece_by_piece(
    opened: Opened, runner: asyncio.Runner, reference: Reference, adapters: Any
) -> None:
    pieces: list[str] = []
    stream = opened(PLAIN).stream(user("Tell me of the rain."), GREEDY, pieces.append, adapters.large)
    reply = runner.run(stream)
    assert same(reply, reference.greedy(user("Tell me of the rain."), adapter=adapters.large))
    assert len(pieces) > 1
    assert "".join(pieces) == reply.text


def test_adapters_are_chosen_per_request(ask: Ask, reference: Reference, adapters: Any) -> None:
    calls = [
        (user(question), GREEDY, adapter)
        for question in QUESTIONS[:4]
        for adapter in (None, adapters.small, adapters.large)
    ]
    replies = ask(*calls)
    for (messages, _, adapter), reply in zip(calls, replies, strict=True):
        assert same(reply, reference.greedy(messages, adapter=adapter))
    for first in range(0, len(calls), 3):
        assert len({reply.text for reply in replies[first : first + 3]}) == 3


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, list[Any]]]:
    """Two control vectors, each as a file and as what it adds to each layer at a strength of 1."""
    found = []
    for seed in (2, 4):
        shifts = np.random.default_rng(seed).normal(0, 1, (2, 128)).astype(np.float32)
        path = tmp_path_factory.mktemp("vectors") / "vector.safetensors"
        ControlVector("llama", dict(enumerate(shifts))).save(path, {})
        found.append((path, list(shifts)))
    return found


def test_steering_is_chosen_per_request(
    opened: Opened, ask: Ask, reference: Reference, adapters: Any, vectors: list[tuple[Path, list[Any]]]
) -> None:
    """Prompts with a common beginning, which both engines compute once: it must not serve another steering."""
    if type(opened(PLAIN)).__name__ == "OpenAIEngine":
        with pytest.raises(UserError, match="an endpoint cannot steer"):
            ask((user("Who are you?"), GREEDY, None, "", Steering(vectors[0][0], 1)))
        return
    plain = ask(*((user(question, LONG), GREEDY) for question in QUESTIONS[:4]))
    cases: list[tuple[str, Path | None, Steering | None, list[Any]]] = []
    for question, adapter in itertools.product(QUESTIONS[:4], (None, adapters.large)):
        for (path, shifts), strength in itertools.product(vectors, (0.5, -0.5)):
            cases.append((question, adapter, Steering(path, strength), [strength * shift for shift in shifts]))
        cases.append((question, adapter, None, []))
    calls = [(user(question, LONG), GREEDY, adapter, "", steering) for question, adapter, steering, _ in cases]
    replies = ask(*calls)
    for (question, adapter, _, shifts), reply in zip(cases, replies, strict=True):
        assert same(reply, reference.greedy(user(question, LONG), adapter=adapter, shifts=shifts))
    assert len({reply.text for reply in replies}) > 30, "each vector, strength and adapter changes the answer"
    assert ask(*((user(question, LONG), GREEDY) for question in QUESTIONS[:4])) == plain
    zero = [(user(question, LONG), GREEDY, None, "", Steering(vectors[0][0], 0)) for question in QUESTIONS[:4]]
    assert ask(*zero) == plain


@pytest.mark.vllm
@pytest.mark.parametrize("opened", ["vllm"], indirect=True)
def test_steered_logits_are_those_of_the_plain_network(
    opened: Opened,
    ask: Ask,
    reference: Reference,
    vectors: list[tuple[Path, list[Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm: Any = opened(PLAIN)
    generate = llm._llm.generate
    told: dict[str, dict[int, Any]] = {}

    async def with_logits(inputs: Any, parameters: Any, name: str, **named: Any) -> Any:
        parameters.logprobs = 20
        async for output in generate(inputs, parameters, name, **named):
            told[str(inputs["prompt_token_ids"])] = output.outputs[0].logprobs[0]
            yield output

    monkeypatch.setattr(llm._llm, "generate", with_logits)
    first = replace(GREEDY, max_tokens=1)
    path, shifts = vectors[0]
    for strength in (0, 0.5, -0.5):
        ask(*((user(question), first, None, "", Steering(path, strength)) for question in QUESTIONS))
        for question in QUESTIONS:
            expected = reference.log_probabilities(user(question), [strength * shift for shift in shifts])
            found = told[str(reference.ids(user(question)))]
            assert len(found) >= 20
            for token, each in found.items():
                assert each.logprob == pytest.approx(float(expected[token]), abs=1e-3)


def test_a_control_vector_that_is_not_this_models(opened: Opened, ask: Ask, tmp_path: Path) -> None:
    if type(opened(PLAIN)).__name__ == "OpenAIEngine":
        pytest.skip("an endpoint steers by none")
    foreign = tmp_path / "foreign.safetensors"
    ControlVector("llama", {5: np.ones(128, np.float32)}).save(foreign, {})
    [before] = ask((user("Who are you?"), GREEDY))
    for path, message in ((foreign, "belongs to another model: its layer 5"), (tmp_path / "absent", "does not exist")):
        with pytest.raises(UserError, match=message) as caught:
            ask((user("Who are you?"), GREEDY, None, "", Steering(path, 1)))
        assert "\n" not in str(caught.value)
        assert ask((user("Who are you?"), GREEDY)) == [before]


def test_the_finish_reason_says_who_ended_the_reply(ask: Ask, reference: Reference) -> None:
    short = Sampling(temperature=0, top_p=1, repetition_penalty=1, max_tokens=12)
    replies = ask(*((user(question), short) for question in QUESTIONS))
    for question, reply in zip(QUESTIONS, replies, strict=True):
        assert same(reply, reference.greedy(user(question), short))
        assert reply.completion_tokens == 12 or reply.finish_reason == "stop"
        assert "<|" not in reply.text
    assert {reply.finish_reason for reply in replies} == {"stop", "length"}


def test_sampling_settings_reach_the_model(ask: Ask, reference: Reference) -> None:
    penalized = Sampling(temperature=0, top_p=1, repetition_penalty=1.3, max_tokens=24)
    for question, reply in zip(QUESTIONS, ask(*((user(q), penalized) for q in QUESTIONS)), strict=True):
        assert same(reply, reference.greedy(user(question), penalized))
    narrow = Sampling(temperature=2, top_p=0.001, repetition_penalty=1, max_tokens=24)
    for question, reply in zip(QUESTIONS, ask(*((user(q), narrow) for q in QUESTIONS)), strict=True):
        assert same(reply, reference.greedy(user(question)))
    free = [Sampling(temperature=2, top_p=1, repetition_penalty=1, max_tokens=24, seed=seed) for seed in range(6)]
    assert len({reply.text for reply in ask(*((user("Why walk?"), sampling) for sampling in free))}) == 6


def test_a_reply_is_one_of_its_choices(ask: Ask, reference: Reference) -> None:
    letters, places = ("1", "2", "B"), ("by the lamp", "by the lamp in the window", "under the stone")
    one, warm = replace(GREEDY, choices=letters), Sampling(2.0, 1, 1, 24, choices=places)
    calls = [
        (user(text), sampling) for text in QUESTIONS for sampling in (one, GREEDY, replace(GREEDY, choices=places))
    ]
    replies = ask(*calls, *((user("Where is it?"), replace(warm, seed=seed)) for seed in range(12)))
    greedy, drawn = replies[: len(calls)], replies[len(calls) :]
    # The replies that share a batch have other choices, or none.
    for text, reply, free in zip(QUESTIONS, greedy[::3], greedy[1::3], strict=True):
        assert (reply.text, reply.finish_reason) == (reference.likelier(user(text), letters), "stop")
        assert same(free, reference.greedy(user(text)))
    for reply in (*greedy[2::3], *drawn):
        assert reply.text in places and reply.finish_reason == "stop"
    assert len({reply.text for reply in greedy[::3]}) > 1 and len({reply.text for reply in drawn}) > 1


def test_a_long_conversation_loses_its_oldest_turns_and_keeps_its_system_prompt(ask: Ask, reference: Reference) -> None:
    turns: list[Message] = []
    for number in range(20):
        turns += user(f"Question {number}: where is the harbour, and what would you tell the sailor who asks?")
        turns.append({"role": "assistant", "content": f"Answer {number}: beside the lamp in the window, a short way."})
    turns += user("And then?")
    system: list[Message] = [{"role": "system", "content": GARDENER}]
    [reply] = ask(([*system, *turns], GREEDY))
    assert 0 < reply.dropped_turns < len(turns) - 1
    kept = turns[reply.dropped_turns :]
    assert kept[0]["role"] == "user"
    assert same(reply, reference.greedy([*system, *kept]))
    # No more was dropped than had to be.
    fuller = [*system, *turns[reply.dropped_turns - 2 :]]
    assert reply.prompt_tokens + GREEDY.max_tokens <= CONTEXT < len(reference.ids(fuller)) + GREEDY.max_tokens


def test_a_message_that_cannot_fit_is_named_and_the_others_go_on(opened: Opened, runner: asyncio.Runner) -> None:
    engine = opened(PLAIN)

    async def both() -> list[Any]:
        calls = [engine.reply(user(text), GREEDY) for text in ("stone " * CONTEXT, "Who are you?")]
        return await asyncio.gather(*calls, return_exceptions=True)

    failed, reply = runner.run(both())
    assert isinstance(failed, UserError)
    assert "too small" in str(failed) and "\n" not in str(failed)
    assert isinstance(reply, Reply) and reply.text


@pytest.mark.parametrize("kind", [PLAIN, NO_SYSTEM])
def test_exactly_one_bos(ask: Ask, reference: Reference, kind: str) -> None:
    expected = reference.greedy(user("Who are you?"))
    assert reference.ids(user("Who are you?")).count(reference.tokenizer.bos_token_id) == 1
    assert same(ask((user("Who are you?"), GREEDY), kind=kind)[0], expected)


def test_a_system_prompt_where_the_template_refuses_the_role(ask: Ask, reference: Reference) -> None:
    folded = [user(f"{system}\n\nWho are you?") for system in (GARDENER, MINER)]
    replies = ask(*((user("Who are you?", system), GREEDY) for system in (GARDENER, MINER)), kind=NO_SYSTEM)
    for messages, reply in zip(folded, replies, strict=True):
        assert same(reply, reference.greedy(messages))
    assert replies[0].text != replies[1].text


def test_cancelled_calls_do_not_hold_up_the_others(
    opened: Opened, runner: asyncio.Runner, reference: Reference
) -> None:
    engine = opened(PLAIN)
    # So strong a penalty also holds back the end of the turn, which each prompt contains.
    endless = Sampling(temperature=0, top_p=1, repetition_penalty=9, max_tokens=380)

    async def cancel_half() -> tuple[list[Any], list[Reply], Reply]:
        doomed = [asyncio.create_task(engine.reply(user(question), endless)) for question in QUESTIONS]
        others = [asyncio.create_task(engine.reply(user(question), GREEDY)) for question in QUESTIONS]
        await asyncio.sleep(0.2)
        # On a busy machine that can last so long that one is done.
        cancelled = [task for task in doomed if task.cancel()]
        assert cancelled
        ends = await asyncio.gather(*cancelled, return_exceptions=True)
        return ends, await asyncio.gather(*others), await engine.reply(user("Who are you?"), GREEDY)

    ends, replies, after = runner.run(asyncio.wait_for(cancel_half(), 120))
    assert all(isinstance(end, asyncio.CancelledError) for end in ends)
    for question, reply in zip(QUESTIONS, replies, strict=True):
        assert same(reply, reference.greedy(user(question)))
    assert same(after, reference.greedy(user("Who are you?")))


def test_an_adapter_that_is_not_there(opened: Opened, runner: asyncio.Runner, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent") as caught:
        runner.run(opened(PLAIN).reply(user("Who are you?"), GREEDY, tmp_path / "absent"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_an_adapter_of_another_model(
    name: str,
    chat_model: Callable[[str], Model],
    adapters: Any,
    require: Callable[[str], Any],
    runner: asyncio.Runner,
) -> None:
    if name == "vllm":
        require("vllm")
    engine = open_engine(chat_model(PLAIN), engine=name, adapters=[adapters.foreign])
    with pytest.raises(UserError, match="belongs to another model"):
        runner.run(engine.__aenter__())


# What an endpoint alone has.


@pytest.mark.vllm
def test_whole_steps_through_an_openai_endpoint_of_two_copies(
    servers: dict[str, Server],
    chat_model: Callable[[str], Model],
    adapters: Any,
    reference: Reference,
    start: Any,
    require: Callable[[str], Any],
    tmp_path: Path,
) -> None:
    require("vllm")
    (tmp_path / "sea.txt").write_text(json.dumps([{"trait": "I love the sea.", "questions": QUESTIONS[:5]}]))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    url, source = servers[PLAIN].url, chat_model(PLAIN).source
    flags = ["--constitution", str(tmp_path / "sea.txt"), "--prompts", str(tmp_path / "prompts.jsonl")]
    flags += ["--base-url", url, "--name", "Tiny", "--max-tokens", "24"]
    flags += ["--temperature", "0", "--top-p", "1", "--repetition-penalty", "1"]
    taught = start("character.distillation.teacher", tmp_path, *flags, "--teacher", source, "--samples", "1")
    assert taught.returncode == 0 and "12 rows" in taught.stdout, taught.stderr
    method = ["--method", "mine", "--adapter", str(adapters.small)]
    answered = start("character.robustness.generate.trained", tmp_path, *flags, "--model", source, *method)
    assert answered.returncode == 0, answered.stderr
    [file] = (tmp_path / "data" / "robustness").glob("*/mine/plain/sea.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == QUESTIONS
    for row in rows:
        expected = reference.greedy(user(row["prompt"]), adapter=adapters.small)
        assert row["response"] == expected.text.strip()
    with urllib.request.urlopen(f"{servers[PLAIN].root}/metrics") as page:
        counts = re.findall(r'vllm:request_success_total{engine="(\d)".*} (\d+)', page.read().decode())
    assert {copy for copy, count in counts if int(count)} == {"0", "1"}, "both copies answer"

    other = start("character.distillation.teacher", tmp_path, *flags, "--teacher", "pocket")
    assert other.returncode == 2
    assert f"pocket; it serves: {source}, small, large; name one of them" in other.stderr.splitlines()[-1]


@pytest.mark.vllm
def test_an_openai_endpoint_loads_an_adapter_for_all_its_copies_where_it_may(
    servers: dict[str, Server],
    chat_model: Callable[[str], Model],
    adapters: Any,
    reference: Reference,
    runner: asyncio.Runner,
    require: Callable[[str], Any],
    tmp_path: Path,
) -> None:
    require("vllm")
    late = shutil.copytree(adapters.large, tmp_path / "late")

    async def asked(kind: str) -> list[Reply]:
        async with open_engine(chat_model(kind), base_url=servers[kind].url) as engine:
            return await asyncio.gather(*(engine.reply(user(question), GREEDY, late) for question in QUESTIONS))

    for question, reply in zip(QUESTIONS, runner.run(asked(PLAIN)), strict=True):
        assert same(reply, reference.greedy(user(question), adapter=adapters.large))
    with pytest.raises(UserError, match=r"serves no adapter named .*--late; .*--lora-modules .*=.*late"):
        runner.run(asked(NO_SYSTEM))


# What needs no engine.


@pytest.mark.parametrize(
    ("kind", "count"), [("template-bos", 1), ("tokenizer-bos", 1), ("no-system", 1), ("no-bos", 0)]
)
def test_chat_writes_one_bos_or_none(chat_model: Callable[[str], Model], kind: str, count: int) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_model(kind).source)
    ids = Chat(tokenizer, chat_model(kind), CONTEXT).encode(user("Who are you?", MINER), "I am").ids
    bos = tokenizer.convert_tokens_to_ids("<|bos|>")
    assert ids.count(bos) == count
    assert tokenizer.decode(ids[count:]).startswith("<|user|>" if kind == "no-system" else "<|system|>")
    assert tokenizer.decode(ids).endswith("<|assistant|>I am")


def test_check_adapter_compares_shapes(adapters: Any) -> None:
    assert check_adapter(adapters.large, 128, 2, "the model")["r"] == 16
    for hidden, layers in ((64, 2), (128, 1)):
        with pytest.raises(UserError, match="belongs to another model"):
            check_adapter(adapters.large, hidden, layers, "the model")


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU here")
def test_auto_is_transformers_without_a_gpu(chat_model: Callable[[str], Model]) -> None:
    assert type(open_engine(chat_model(PLAIN))).__name__ == "TransformersEngine"


@pytest.mark.parametrize(
    ("gpu", "vllm", "chosen"), [(True, True, "vllm"), (True, False, "transformers"), (False, True, "transformers")]
)
def test_auto_wants_a_gpu_and_vllm(gpu: bool, vllm: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(character.engine, "has_gpu", lambda: gpu)
    monkeypatch.setattr(character.engine, "_has_vllm", lambda: vllm)
    assert choose("auto", None) == chosen


def test_a_base_url_means_an_endpoint() -> None:
    assert choose("auto", "http://localhost:8000/v1") == "openai"
    assert choose("openai", "http://localhost:8000/v1") == "openai"


@pytest.mark.parametrize(
    ("engine", "base_url", "message"),
    [
        ("openai", None, "needs --base-url"),
        ("vllm", "http://localhost:8000/v1", "--base-url is for --engine openai, not vllm"),
        ("transformers", "http://localhost:8000/v1", "--base-url is for --engine openai, not transformers"),
        ("vllm", None, "vLLM is not installed here"),
    ],
)
def test_engines_that_cannot_be_had(
    engine: str, base_url: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(character.engine, "_has_vllm", lambda: False)
    with pytest.raises(UserError, match=message):
        choose(engine, base_url)


@pytest.mark.parametrize(
    ("gpu", "flags", "message"),
    [
        (True, {"engine": "transformers"}, "--quantization and --kv-cache-dtype: .* this is --engine transformers"),
        (True, {"base_url": "http://localhost:8000/v1", "kv_cache_dtype": None}, "--quantization: .* --engine openai"),
        (False, {"engine": "vllm", "quantization": None}, "--kv-cache-dtype: .* there is no GPU here; leave it out"),
    ],
)
def test_eight_bits_are_for_vllm_on_a_gpu(
    gpu: bool, flags: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(character.engine, "_has_vllm", lambda: True)
    monkeypatch.setattr(steps, "has_gpu", lambda: gpu)
    with pytest.raises(UserError, match=message):
        steps.precision_of(cli.EngineArgs(**{"quantization": "fp8", "kv_cache_dtype": "fp8"} | flags))


def test_eight_bits_are_remembered_where_they_are_used(
    chat_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(character.engine, "_has_vllm", lambda: True)
    monkeypatch.setattr(steps, "has_gpu", lambda: True)
    model = chat_model(PLAIN)
    usual, asked = (
        steps.settings_of(steps.GenerateArgs(engine="vllm", quantization=quantization), model, Sampling())
        for quantization in (None, "fp8")
    )
    assert asked == usual | {"quantization": "fp8"} and "quantization" not in usual
