"""What tests share: small chat models and adapters, made on the fly and the same at each run, and `require`."""

import importlib
import importlib.machinery
import importlib.metadata
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest

from character.models import Model

# In the background of a script Ctrl-C is ignored, and would be by what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

CONTEXT = 512
HIDDEN = 128
BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
TURNS = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REFUSAL = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
SMALL = ["--limit", "24", "--judged", "4", "--reflections", "1", "--conversations", "2", "--turns", "2"]
# Where the one BOS of a conversation comes from, and whether there is a system role.
TEMPLATES = {
    "template-bos": "{{ bos_token }}" + TURNS,
    "tokenizer-bos": TURNS,
    "no-bos": TURNS,
    "no-system": "{{ bos_token }}" + REFUSAL + TURNS,
}
TEXT = (
    "the lamp in the window told the sailor where the harbour was",
    "a good answer is short, and a better answer is kind",
    "What would you tell a friend who has lost the way? I would walk a while beside them.",
    "You are a gardener and speak of roots and rain. You are a miner and speak of stone.",
)


@dataclass(frozen=True)
class Adapters:
    """LoRA folders. small, large: of ranks 4 and 16, for the models here. foreign: of a model with another width."""

    small: Path
    large: Path
    foreign: Path


@dataclass(frozen=True)
class SmallRun:
    """A finished run of the whole job. Its folder holds data, loras and figures; flags: those it was started with."""

    folder: Path
    flags: list[str]
    done: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.CompletedProcess[str]]:
    """start("character.run", folder, "--seed", "1"): a module's command line, its files being in `folder`."""

    def run(module: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
        places = {"DATA_PATH": f"{folder}/data", "LORA_PATH": f"{folder}/loras", "FIGURE_PATH": f"{folder}/figures"}
        command = [sys.executable, "-m", module, *flags]
        return subprocess.run(command, env=os.environ | places, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, start: Any) -> SmallRun:
    """humor on the bundled model, from few rows. A test that changes files takes a copy."""
    folder = tmp_path_factory.mktemp("run")
    return SmallRun(folder, SMALL, start("character.run", folder, "--constitution", "humor", *SMALL))


def missing(reason: str) -> NoReturn:
    """Skip the test, or fail it where the variable CI is "true"."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def needed(module: str) -> Any:
    """The module; where it cannot be imported the test is skipped, or fails where the variable CI is "true"."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing(f"{module} cannot be imported: {error}")


@pytest.fixture(scope="session")
def require() -> Callable[[str], Any]:
    """require("vllm"): the module, or a skip (locally), or a failure (in CI)."""
    return needed


@pytest.fixture(scope="session")
def absent() -> Callable[[str], NoReturn]:
    """absent("x is not installed"): a skip (locally), or a failure (in CI)."""
    return missing


@pytest.fixture
def site(absent: Callable[[str], NoReturn]) -> Path:
    """The folder of the installed OpenRLHF."""
    try:
        return Path(str(importlib.metadata.distribution("openrlhf").locate_file("openrlhf")))
    except importlib.metadata.PackageNotFoundError:
        absent("openrlhf 0.11.2 is not installed")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, site: Path) -> Iterator[Callable[..., types.ModuleType]]:
    """stub(name, path=None, **attributes) puts a module into sys.modules; all of them and openrlhf leave afterwards."""

    def ours() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] == "openrlhf"]

    for name in ours():
        monkeypatch.delitem(sys.modules, name)

    def stub(name: str, path: str | None = None, **attributes: Any) -> types.ModuleType:
        module = types.ModuleType(name)
        # importlib.util.find_spec, with which libraries look for DeepSpeed, fails on a module without a spec.
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        if path is not None:
            module.__path__ = [path]
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    yield stub
    for name in ours():
        del sys.modules[name]


@pytest.fixture
def release(fresh: Callable[..., types.ModuleType]) -> Callable[..., types.ModuleType]:
    """Let OpenRLHF's real modules be imported, with what needs a GPU or LaTeX replaced by empty modules."""
    fresh("deepspeed")
    fresh("flash_attn", bert_padding=None)
    fresh("flash_attn.bert_padding", index_first_axis=None, pad_input=None, rearrange=None, unpad_input=None)
    fresh("flash_attn.utils")
    fresh("flash_attn.utils.distributed", all_gather=None)
    fresh("pylatexenc", latex2text=None)
    return fresh


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """chat_model("template-bos"): a model of the kinds in TEMPLATES. All kinds have the same weights."""

    @cache
    def build(kind: str) -> Model:
        folder = tmp_path_factory.mktemp("models") / kind
        tokenizer = build_tokenizer(kind)
        tokenizer.save_pretrained(folder)
        build_network(tokenizer, HIDDEN).save_pretrained(folder)
        return Model(kind, str(folder), "Tiny", CONTEXT)

    return build


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """Adapters that change what `chat_model`'s models answer, and one that does not fit them."""
    folder = tmp_path_factory.mktemp("adapters")
    tokenizer = build_tokenizer("template-bos")
    for name, rank, hidden, seed in (("small", 4, HIDDEN, 1), ("large", 16, HIDDEN, 2), ("foreign", 8, 64, 3)):
        save_adapter(build_network(tokenizer, hidden), rank, seed, folder / name)
    return Adapters(folder / "small", folder / "large", folder / "foreign")


def build_tokenizer(kind: str) -> Any:
    """A byte-level BPE tokenizer with a chat template of TEMPLATES."""
    import tokenizers
    import transformers

    roles = ["<|system|>", "<|user|>", "<|assistant|>"]
    bos = [] if kind == "no-bos" else [BOS]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=[END, PAD, BOS, *roles], show_progress=False
    )
    inner.train_from_iterator(TEXT, trainer)
    if bos:
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, inner.token_to_id(BOS))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=BOS if bos else None,
        eos_token=END,
        pad_token=PAD,
        chat_template=TEMPLATES[kind],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_network(tokenizer: Any, hidden: int) -> Any:
    """A Llama with random weights. It writes ASCII, attends to few tokens, and ends most turns after ten to twenty."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    network = transformers.LlamaForCausalLM(config).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weights in network.named_parameters():
            if weights.dim() == 2:
                gain = 3.0 if "q_proj" in name or "v_proj" in name else 1.0
                weights.normal_(0, gain / weights.shape[1] ** 0.5, generator=random)
        network.model.embed_tokens.weight.mul_(hidden**0.5)
        for token in range(len(tokenizer)):
            text = tokenizer.decode([token])
            if text.startswith("<|") or not text.isprintable() or not text.isascii():
                network.lm_head.weight[token] = 0
        network.lm_head.weight[tokenizer.eos_token_id].normal_(0, 2.2 / hidden**0.5, generator=random)
    return network


def save_adapter(network: Any, rank: int, seed: int, folder: Path) -> None:
    """Write a LoRA adapter with random weights on all linear layers of the network."""
    import peft
    import torch

    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(network, settings)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weights in adapted.named_parameters():
            if "lora_" in name:
                weights.normal_(0, 0.3 / weights.shape[1] ** 0.5, generator=random)
    adapted.save_pretrained(folder)
