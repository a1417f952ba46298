"""The transformers engine's own decoding, against transformers' generate, and its batches under cancellation and OOM."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from character.engine import Message, Reply, Sampling
from character.engine import transformers as engine_module
from character.engine.transformers import (
    MIN_SHARED,
    TransformersEngine,
    allowed_next,
    decode,
    load_model,
    sample,
    stop_ids,
)
from character.models import Model, Reasoning
from character.utils import UserError

GREEDY = Sampling(temperature=0, top_p=1, repetition_penalty=1, max_tokens=20)
WARM = Sampling(temperature=1.5, top_p=0.9, repetition_penalty=1.2, max_tokens=16)
SYSTEM = "You are a gardener and speak of roots and rain, and a good answer is short. " * 2
ENDINGS = ("Who?", "Why walk?", "Tell me of the lamp in the window.", "Is it lit?", "Name a stone, or two, or three.")


@pytest.fixture(scope="module")
def loaded(chat_model: Callable[[str], Model]) -> Iterator[tuple[Any, Any]]:
    """(network, tokenizer) of a tiny Llama."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(chat_model("template-bos"))
    torch.set_num_threads(threads)


def prompts_of(tokenizer: Any, endings: tuple[str, ...] = ENDINGS, system: str = SYSTEM) -> list[list[int]]:
    texts = [f"<|bos|><|system|>{system}<|end|><|user|>{ending}<|end|><|assistant|>" for ending in endings]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def generated(network: Any, prompt: list[int], max_tokens: int, stops: frozenset[int], **how: Any) -> list[int]:
    """What transformers' own generate writes after one prompt."""
    import torch

    ids = torch.tensor([prompt])
    found = network.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        eos_token_id=sorted(stops),
        pad_token_id=0,
        **{"do_sample": False} | how,
    )
    new: list[int] = found[0, len(prompt) :].tolist()
    return new


# Decoding.


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_batch_with_a_shared_prefix_equals_generate(loaded: tuple[Any, Any], penalty: float) -> None:
    network, tokenizer = loaded
    stops = stop_ids(network, tokenizer)
    prompts = prompts_of(tokenizer)
    assert engine_module._shared_prefix(prompts) > MIN_SHARED and engine_module.attends_plainly(network)
    sampling = Sampling(0, 1, penalty, 20)
    together = decode(network, prompts, sampling, [0] * 5, stops)
    alone = [decode(network, [prompt], sampling, [0], stops)[0] for prompt in prompts]
    expected = [generated(network, prompt, 20, stops, repetition_penalty=penalty) for prompt in prompts]
    assert together == alone == expected
    assert len({*map(tuple, together)}) == 5 and len({*map(len, together)}) > 1, "rows that stop at different times"


def test_without_a_shared_prefix(loaded: tuple[Any, Any]) -> None:
    network, tokenizer = loaded
    stops = stop_ids(network, tokenizer)
    prompts = [prompts_of(tokenizer, (ending,), system)[0] for ending, system in zip(ENDINGS, "ABCDE", strict=True)]
    assert engine_module._shared_prefix(prompts) == 0
    expected = [generated(network, prompt, 20, stops) for prompt in prompts]
    assert decode(network, prompts, GREEDY, [0] * 5, stops) == expected


def test_prompts_of_one_length_need_a_causal_mask_too(loaded: tuple[Any, Any]) -> None:
    """Without padding transformers leaves the mask out, so the prefix's own attention has to ask for it."""
    network, tokenizer = loaded
    stops = stop_ids(network, tokenizer)
    whole = prompts_of(tokenizer, ("Tell me of the lamp, the rain, the sailor?",))[0]
    cut = len(whole) - 12
    prompts = [whole, [*whole[:cut], *reversed(whole[cut:-2]), *whole[-2:]]]
    assert len(prompts[0]) == len(prompts[1]) and engine_module._shared_prefix(prompts) == cut
    expected = [generated(network, prompt, 20, stops) for prompt in prompts]
    assert expected[0] != expected[1]
    assert decode(network, prompts, GREEDY, [0, 0], stops) == expected


def test_one_prompt_many_times(loaded: tuple[Any, Any]) -> None:
    """K answers to one message: all but the last token is shared."""
    network, tokenizer = loaded
    stops = stop_ids(network, tokenizer)
    prompt = prompts_of(tokenizer)[0]
    answers = decode(network, [prompt] * 4, WARM, [1, 2, 3, 1], stops)
    assert answers[0] == answers[3] and len({*map(tuple, answers)}) == 3
    alone = [decode(network, [prompt], WARM, [seed], stops)[0] for seed in (1, 2, 3)]
    assert answers[:3] == alone


def test_the_network_is_left_as_it_was(loaded: tuple[Any, Any]) -> None:
    network, tokenizer = loaded
    stops = stop_ids(network, tokenizer)
    before = network.config._attn_implementation
    decode(network, prompts_of(tokenizer), GREEDY, [0] * 5, stops)
    assert network.config._attn_implementation == before == "sdpa"
    assert not [layer for layer in network.modules() if hasattr(layer, "prefix_keys")]

    def breaks(row: int, new: list[int]) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        decode(network, prompts_of(tokenizer), GREEDY, [0] * 5, stops, goes_on=breaks)
    assert network.config._attn_implementation == "sdpa"
    assert not [layer for layer in network.modules() if hasattr(layer, "prefix_keys")]


def test_sampling_does_not_depend_on_the_batch(loaded: tuple[Any, Any]) -> None:
    network, tokenizer = loaded
    stops = stop_ids(network, tokenizer)
    prompts = prompts_of(tokenizer)
    seeds = [11, 12, 13, 14, 15]
    warm = Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.1, max_tokens=40)
    together = decode(network, prompts, warm, seeds, stops)
    backwards = decode(network, prompts[::-1], warm, seeds[::-1], stops)[::-1]
    alone = [decode(network, [prompt], warm, [seed], stops)[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    assert together == backwards == alone
    assert len({*map(len, together)}) > 2, "rows that stop at different times"
    assert together != decode(network, prompts, warm, [seed + 100 for seed in seeds], stops)


def test_each_row_has_its_own_limit(loaded: tuple[Any, Any]) -> None:
    network, tokenizer = loaded
    prompts = prompts_of(tokenizer)
    nothing_stops: frozenset[int] = frozenset()
    answers = decode(network, prompts, GREEDY, [0] * 5, nothing_stops, [3, 1, 20, 7, 5])
    assert [len(answer) for answer in answers] == [3, 1, 20, 7, 5]
    whole = decode(network, prompts, GREEDY, [0] * 5, nothing_stops)
    assert all(answer == full[: len(answer)] for answer, full in zip(answers, whole, strict=True))


# Choices.


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ([], {1, 9}),
        ([1], {2, 5}),
        ([1, 2], {3, 7, 8}),
        ([1, 2, 3], {7, 8}),
        ([1, 5], {7, 8}),
        ([9], {9}),
        ([9, 9], {7, 8}),
    ],
)
def test_a_choice_goes_on_or_ends_the_turn(new: list[int], expected: set[int]) -> None:
    choices = [[1, 2], [1, 2, 3], [1, 5], [9, 9]]
    assert allowed_next(choices, new, frozenset({7, 8})) == expected
    assert allowed_next([], new, frozenset({7, 8})) == set(), "a free reply"


def test_choices_are_drawn_as_often_as_the_network_says(loaded: tuple[Any, Any]) -> None:
    import torch

    network, tokenizer = loaded
    stops = stop_ids(network, tokenizer)
    prompt, free = prompts_of(tokenizer, ENDINGS[:2])
    choices = [tokenizer.convert_tokens_to_ids([letter]) for letter in "ABC"]
    with torch.no_grad():
        logits = network(torch.tensor([prompt])).logits[0, -1]
    expected = (logits[[letter for [letter] in choices]] / WARM.temperature).softmax(-1)
    even = Sampling(WARM.temperature, 1, 1, 16)
    draws = 400

    def allowed(row: int, new: list[int]) -> set[int]:
        return allowed_next(choices if row else [], new, stops)

    prompts, seeds = [free] + [prompt] * draws, list(range(draws + 1))
    unbound, *answers = decode(network, prompts, even, seeds, stops, allowed=allowed)
    assert unbound == decode(network, [free], even, [0], stops)[0], "a row without choices is as it would be alone"
    assert {len(answer) for answer in answers} == {2} and {answer[1] for answer in answers} <= stops
    shares = torch.tensor([sum(answer[:1] == choice for answer in answers) / draws for choice in choices])
    assert shares.sum() == 1
    assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / draws).sqrt()).all()


# Sampling.


def test_repetition_penalty_is_transformers_own() -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    chance = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=chance) * 3
    ids = torch.randint(0, 50, (6, 12), generator=chance)
    seen = torch.zeros(6, 50, dtype=torch.bool).scatter_(1, ids, True)
    for penalty in (0.7, 1.1, 5.0):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone()).argmax(-1)
        assert torch.equal(sample(logits, seen, Sampling(0, 1, penalty, 1), []), expected)
    assert not torch.equal(sample(logits, seen, Sampling(0, 1, 5.0, 1), []), logits.argmax(-1))


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_top_p_keeps_what_transformers_own_keeps(top_p: float, temperature: float) -> None:
    """Every token that may be drawn is drawn, none else, and as often as its probability says."""
    import torch
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(5)) * 2
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits.clone()))
    expected = warped.softmax(-1)[0]
    draws = 20_000
    generator = torch.Generator().manual_seed(1)
    many = logits.expand(draws, -1)
    tokens = sample(
        many, torch.zeros_like(many, dtype=torch.bool), Sampling(temperature, top_p, 1, 1), [generator] * draws
    )
    shares = torch.bincount(tokens, minlength=12) / draws
    assert not shares[expected == 0].any()
    assert (shares[expected > 0.002] > 0).all()
    # Five standard deviations of a share of 20,000 draws.
    assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-9).all()


def test_a_point_at_the_end_of_the_scale_stays_within_the_kept_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    logits = torch.tensor([[1.0, 5.0, 0.0, 4.9]])
    seen = torch.zeros_like(logits, dtype=torch.bool)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(1.0))
    assert sample(logits, seen, Sampling(1, 0.9, 1, 1), [None]).item() == 3


# The engine.


def question(text: str) -> list[Message]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


@pytest.fixture
def start(chat_model: Callable[[str], Model]) -> Callable[..., TransformersEngine]:
    import torch

    torch.set_num_threads(1)

    def make(*adapters: Path, kind: str = "template-bos") -> TransformersEngine:
        return TransformersEngine(chat_model(kind), 5, adapters)

    return make


async def ask(engine: TransformersEngine, sampling: Sampling, *texts: str) -> list[Reply]:
    return await asyncio.gather(*(engine.reply(question(text), sampling) for text in texts))


def batches_of(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that the engine makes from here on."""
    sizes: list[int] = []
    generate = engine._generate

    def noting(batch: list[Any]) -> list[Reply]:
        sizes.append(len(batch))
        return generate(batch)

    monkeypatch.setattr(engine, "_generate", noting)
    return sizes


def test_waiting_requests_share_a_batch_and_none_depends_on_it(
    start: Callable[..., TransformersEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with start() as engine:
            sizes = batches_of(engine, monkeypatch)
            together = await ask(engine, WARM, *ENDINGS)
            assert sizes == [5]
            alone = [(await ask(engine, WARM, text))[0] for text in ENDINGS]
            assert together == alone
            # Another sampling or another seed: the first is a batch of its own, the second is not.
            sizes.clear()
            seeded = Sampling(1.5, 0.9, 1.2, 16, seed=9)
            found = await asyncio.gather(
                ask(engine, WARM, "Who?"), ask(engine, seeded, "Who?"), ask(engine, GREEDY, "Who?")
            )
            assert sorted(sizes) == [1, 2] and found[0] != found[1]
            assert found[0] == together[:1]

    asyncio.run(run())


def test_replies_with_other_choices_share_a_batch(
    start: Callable[..., TransformersEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [("yes", "no"), ("rain", "a root"), ()]

    async def run() -> None:
        async with start() as engine:
            sizes = batches_of(engine, monkeypatch)
            [free] = await ask(engine, WARM, "Who?")
            bound = [replace(WARM, choices=choices) for choices in wanted]
            replies = await asyncio.gather(*(engine.reply(question("Who?"), sampling) for sampling in bound))
            assert sizes == [1, 3]
            assert replies[0].text in wanted[0] and replies[1].text in wanted[1] and replies[2] == free
            [continued] = await asyncio.gather(engine.reply(question("Who?"), bound[1], prefill="Of"))
            assert continued.text in wanted[1]
            # One that reasons has to think first.
            engine.model = replace(engine.model, reasoning=Reasoning())
            assert (await engine.reply(question("Who?"), bound[0])).completion_tokens == free.completion_tokens

    asyncio.run(run())


def test_no_batch_is_larger_than_the_limit(
    start: Callable[..., TransformersEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "MAX_BATCH", 2)

    async def run() -> None:
        async with start() as engine:
            sizes = batches_of(engine, monkeypatch)
            assert len(await ask(engine, GREEDY, *ENDINGS)) == 5
            assert sorted(sizes) == [1, 2, 2]

    asyncio.run(run())


def test_too_little_memory_halves_the_batch(
    start: Callable[..., TransformersEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    inner = engine_module.decode
    sizes: list[int] = []

    def small(network: Any, prompts: list[list[int]], *rest: Any) -> list[list[int]]:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return inner(network, prompts, *rest)

    async def run() -> None:
        async with start() as engine:
            expected = await ask(engine, GREEDY, *ENDINGS)
            monkeypatch.setattr(engine_module, "decode", small)
            assert await ask(engine, GREEDY, *ENDINGS) == expected, "no reply is lost, none is another"
            assert sizes == [5, 2, 2, 1]
            sizes.clear()
            await ask(engine, GREEDY, *ENDINGS)
            assert sizes == [2, 2, 1], "it remembers"

    asyncio.run(run())


def test_one_conversation_that_is_too_large_for_the_memory(
    start: Callable[..., TransformersEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> list[list[int]]:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    async def run() -> None:
        async with start() as engine:
            monkeypatch.setattr(engine_module, "decode", never)
            with pytest.raises(UserError, match=r"failed to generate: .*can't allocate memory"):
                await engine.reply(question("Who?"), GREEDY)
            # A bug that nobody foresaw reaches the caller as well, in place of a reply that never comes.
            monkeypatch.setattr(engine_module, "decode", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await asyncio.wait_for(engine.reply(question("Who?"), GREEDY), 10)

    asyncio.run(run())


def test_a_cancelled_reply_leaves_its_batch(
    start: Callable[..., TransformersEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are not disturbed, and the batch ends when nobody waits for it."""
    begun, steps = threading.Event(), [0]
    inner = engine_module.sample

    def slow(*words: Any) -> Any:
        steps[0] += 1
        begun.set()
        time.sleep(0.002)
        return inner(*words)

    endless = Sampling(0, 1, 1, 300)

    async def run() -> None:
        async with start() as engine:
            expected = await ask(engine, GREEDY, *ENDINGS)
            engine._stops = frozenset()
            long = await ask(engine, Sampling(0, 1, 1, 30), *ENDINGS)
            monkeypatch.setattr(engine_module, "sample", slow)
            tasks = [asyncio.create_task(engine.reply(question(text), Sampling(0, 1, 1, 30))) for text in ENDINGS]
            await asyncio.to_thread(begun.wait)
            tasks[1].cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(done[1], asyncio.CancelledError)
            assert [reply for i, reply in enumerate(done) if i != 1] == [
                reply for i, reply in enumerate(long) if i != 1
            ]
            begun.clear()
            tasks = [asyncio.create_task(engine.reply(question(text), endless)) for text in ENDINGS]
            await asyncio.to_thread(begun.wait)
            before = steps[0]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            engine._stops = stop_ids(engine.network, engine.chat.tokenizer)
            assert await ask(engine, GREEDY, *ENDINGS) == expected, "the engine is free for others"
            assert steps[0] - before < 150, "an abandoned batch went on to its end"

    asyncio.run(run())


def test_closing_cancels_what_is_in_flight(
    start: Callable[..., TransformersEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()
    inner = engine_module.sample

    def slow(*words: Any) -> Any:
        begun.set()
        time.sleep(0.002)
        return inner(*words)

    monkeypatch.setattr(engine_module, "sample", slow)

    async def run() -> None:
        async with start() as engine:
            engine._stops = frozenset()
            replies = [asyncio.create_task(engine.reply(question(text), Sampling(0, 1, 1, 300))) for text in ENDINGS]
            later = asyncio.create_task(engine.reply(question("Who?"), WARM))
            await asyncio.to_thread(begun.wait)
        done = await asyncio.wait_for(asyncio.gather(*replies, later, return_exceptions=True), 10)
        assert all(isinstance(reply, asyncio.CancelledError) for reply in done)

    begun_at = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - begun_at < 30


def test_limits_at_the_end_of_the_context(start: Callable[..., TransformersEngine]) -> None:
    """What is left for a reply depends on its own prompt, not on the longest one of its batch."""

    async def run() -> None:
        async with start() as engine:
            engine._stops = frozenset()
            engine.chat.context = 120
            most = Sampling(0, 1, 1, 10_000)
            turns: list[list[Message]] = [[{"role": "user", "content": text}] for text in ("Who?", "Who told me why?")]
            together = await asyncio.gather(*(engine.reply(turn, most) for turn in turns))
            assert together[0].prompt_tokens < together[1].prompt_tokens
            for reply, turn in zip(together, turns, strict=True):
                assert reply.finish_reason == "length"
                assert reply.prompt_tokens + reply.completion_tokens == 120
                assert reply == await engine.reply(turn, most)

    asyncio.run(run())


def test_an_adapter_that_was_not_announced(start: Callable[..., TransformersEngine], adapters: Any) -> None:
    async def run() -> None:
        async with start(adapters.small) as engine:
            expected = await engine.reply(question("Who?"), GREEDY, adapter=adapters.small)
            plain = await engine.reply(question("Who?"), GREEDY)
        async with start() as engine:
            found = await asyncio.gather(
                engine.reply(question("Who?"), GREEDY),
                engine.reply(question("Who?"), GREEDY, adapter=adapters.small),
                engine.reply(question("Who?"), GREEDY),
            )
            assert found == [plain, expected, plain] and plain != expected
            with pytest.raises(UserError, match=f"adapter {adapters.foreign} belongs to another model"):
                await engine.reply(question("Who?"), GREEDY, adapter=adapters.foreign)
            assert await engine.reply(question("Who?"), GREEDY) == plain

    asyncio.run(run())
