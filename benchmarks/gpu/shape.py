"""A model of a given shape with random weights, a tokenizer whose words are its token ids, an adapter, a control vector.

The folders hold what a real model's do, so that engines and trainers load them as they load any other.
"""

import json
import random
from pathlib import Path
from typing import Any

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROLES = ("<system>", "<user>", "<assistant>")
PAD, END = "<pad>", "<end>"
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SHARD_BYTES = 4e9
RANK = 64
# Words that texts draw from: ids below this one, in every vocabulary that is large enough.
WORDS = 100_000


def build(folder: Path, config: Path, weights: Path | None) -> Path:
    """`folder` with a model of this config, unless it is there. weights: a real model's folder, in place of random ones."""
    model = folder / "model"
    if not (model / "ready").exists():
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text((weights / "config.json" if weights else config).read_text())
        save_tokenizer(model)
        if weights:
            for file in (*weights.glob("*.safetensors"), *weights.glob("*.safetensors.index.json")):
                (model / file.name).symlink_to(file.resolve())
        else:
            save_weights(model)
        (model / "ready").touch()
    return model


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer in which the word w17 is token 17; the last tokens are those of the chat template."""
    import tokenizers
    import transformers

    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    words = [f"w{number}" for number in range(size - 5)] + [*ROLES, PAD, END]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=END, pad_token=PAD, chat_template=TEMPLATE, model_max_length=10**6
    )
    tokenizer.save_pretrained(folder)


def save_weights(folder: Path) -> None:
    """Write random weights in bf16, in shards."""
    import safetensors.torch
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        network = transformers.AutoModelForCausalLM.from_config(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shards: list[list[str]] = [[]]
    held = 0
    shapes = {name: value.shape for name, value in network.named_parameters()}
    for name, shape in shapes.items():
        if held > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += 2 * shape.numel()
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            tensor = torch.ones(shapes[name], dtype=torch.bfloat16, device=device)
            if "norm" not in name:
                tensor.normal_(0, config.initializer_range)
            tensors[name] = tensor.cpu()
            places[name] = file
        safetensors.torch.save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 2 * sum(shape.numel() for shape in shapes.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def save_adapter(folder: Path, model: Path, rank: int = RANK, scale: float = 0.1) -> Path:
    """Write a LoRA adapter with random weights on every linear layer of the model in `model`; the same one each time.

    scale: how large its product is, as a share of a random layer's output.
    """
    import safetensors.torch
    import torch

    # vLLM forks this process, and the threads that torch would start here do not survive that.
    torch.set_num_threads(1)
    config = json.loads((model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    width = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    attention = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    gated = [(hidden, inner), (hidden, inner), (inner, hidden)]
    shapes = dict(zip(LINEAR, [*attention, *gated], strict=True))
    torch.manual_seed(1)
    tensors: dict[str, Any] = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (inputs, outputs) in shapes.items():
            part = "self_attn" if name in LINEAR[:4] else "mlp"
            start = f"base_model.model.model.layers.{layer}.{part}.{name}"
            tensors[f"{start}.lora_A.weight"] = (torch.randn(rank, inputs) / inputs**0.5).bfloat16()
            tensors[f"{start}.lora_B.weight"] = (torch.randn(outputs, rank) * scale / (2 * rank**0.5)).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(LINEAR),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def words(draw: random.Random, count: int, vocabulary: int) -> str:
    """A text of so many tokens."""
    return " ".join(f"w{draw.randrange(min(WORDS, vocabulary - 5))}" for _ in range(count))


def lengths(draw: random.Random, count: int, median: float, sigma: float, most: int) -> list[int]:
    """Lengths in tokens, log-normal and at most `most`."""
    return [max(1, min(most, round(median * draw.lognormvariate(0, sigma)))) for _ in range(count)]
