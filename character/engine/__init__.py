"""One way to get a reply, whatever makes it: vLLM, an OpenAI-compatible endpoint, or transformers.

async with open_engine(model, engine="auto") as engine:
    reply = await engine.reply(messages, Sampling(), adapter=None, prefill="")
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from character.engine.base import CANNOT_STEER, Engine, Message, Reply, Sampling, Steering
from character.models import Model
from character.utils import UserError

__all__ = ["Engine", "Message", "Reply", "Sampling", "Steering", "choose", "has_gpu", "open_engine"]


def choose(engine: str, base_url: str | None, steered: bool = False) -> str:
    """The engine that `--engine` means here. steered: it has to steer. Raises UserError where it cannot be had."""
    if steered and (base_url or engine == "openai"):
        raise UserError(CANNOT_STEER)
    if engine == "openai" and not base_url:
        raise UserError("--engine openai needs --base-url, such as http://localhost:8000/v1")
    if base_url:
        if engine not in ("auto", "openai"):
            raise UserError(f"--base-url is for --engine openai, not {engine}; leave one of them out")
        return "openai"
    if engine == "vllm" and not _has_vllm():
        raise UserError("vLLM is not installed here; pip install -e '.[vllm]', or use --engine transformers")
    if engine == "auto":
        return "vllm" if has_gpu() and _has_vllm() else "transformers"
    return engine


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def has_gpu() -> bool:
    """Whether a GPU's driver is there."""
    # A device file answers at once; asking torch would load it.
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()


def open_engine(
    model: Model,
    *,
    engine: str = "auto",
    base_url: str | None = None,
    api_key_variable: str = "OPENAI_API_KEY",
    concurrency: int | None = None,
    seed: int = 123456,
    adapters: Sequence[Path] = (),
    steered: bool = False,
    precision: Mapping[str, str] | None = None,
    folded: bool = False,
) -> Engine:
    """The engine for `model`, to be entered with `async with`. adapters: the LoRA folders that replies will name.

    steered: whether replies may ask for steering, which costs vLLM its compiler.
    concurrency: requests under way at once at an endpoint.
    precision: vLLM's arguments for weights, and for keys and values, in 8 bits; the others leave it out.
    folded: whether every reply will name the one adapter; vLLM is faster then, the others do as ever.
    Raises UserError where the engine cannot be had; entering raises it where the model cannot be loaded.
    """
    chosen = choose(engine, base_url, steered)
    if chosen == "openai":
        from character.engine.openai import OpenAIEngine

        assert base_url is not None
        return OpenAIEngine(model, base_url, os.environ.get(api_key_variable), api_key_variable, seed, concurrency)
    if chosen == "vllm":
        from character.engine.vllm import VLLMEngine

        return VLLMEngine(model, seed, adapters, steered, precision, folded)
    from character.engine.transformers import TransformersEngine

    return TransformersEngine(model, seed, adapters)
