"""Whether the bundled model, whose weights are real, says the same everywhere."""

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import shape
from measuring import SEED, Context
from serving import UNSHARED, Measured

from character.engine import Engine, Sampling, Steering
from character.engine.chat import load_chat
from character.engine.transformers import load_network
from character.models import resolve

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
