"""Folding an adapter into a model's weights while they are loaded, for an engine that answers with that adapter alone.

A kept-apart adapter costs small kernels beside each matrix product at every token; weights that hold it cost nothing.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from character.engine.base import adapter_config, safetensors_header, tensor_shapes
from character.utils import read_json

# vLLM's `load_format` for it; its loader gets the adapter's folder.
FOLDED = "folded"
WEIGHTS = "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"
# PEFT's name of a module begins so, transformers' does not; a checkpoint's tensor is the module's weight.
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# The language part of a model that reads pictures too: in the network, and in its checkpoint.
IN_NETWORK, IN_CHECKPOINT = "model.language_model.", "language_model.model."
# Weights that can be added to; those in 8 bits have scales of their own.
PLAIN = ("F32", "BF16", "F16")


def foldable(folder: Path, adapter: Path) -> bool:
    """Whether a checkpoint has the weight of each module that a plain LoRA adapter changes, unquantized.

    folder: of config.json and *.safetensors. An adapter of another kind (ranks of its own for some modules, DoRA, whole
    modules) must have been refused before. Raises UserError for a broken file.
    """
    if "quantization_config" in read_json(folder / "config.json") or adapter_config(adapter).get("fan_in_fan_out"):
        return False
    index = folder / INDEX
    files = set(read_json(index)["weight_map"].values()) if index.exists() else [*folder.glob("*.safetensors")]
    kinds = {
        module_of(name): entry["dtype"]
        for file in files
        for name, entry in safetensors_header(folder / file)[0].items()
    }
    names = tensor_shapes(adapter / WEIGHTS).keys()
    changed = {name.removesuffix(A).removesuffix(B) for name in names}
    # vLLM leaves out the head's tensor where the embedding is the head.
    return bool(changed) and all(
        {module + A, module + B} <= names and kinds.get(module) in PLAIN and not module.endswith("lm_head")
        for module in changed
    )


def module_of(name: str) -> str:
    """PEFT's name of the module whose weight is a checkpoint's tensor of this name."""
    module = name.removesuffix(".weight")
    if module.startswith(IN_CHECKPOINT):
        module = IN_NETWORK + module.removeprefix(IN_CHECKPOINT)
    return PREFIX + module


def with_adapter(weights: Iterator[tuple[str, Any]], adapter: Path, device: Any) -> Iterator[tuple[str, Any]]:
    """A checkpoint's tensors, those that the adapter changes with its change added: W + scaling · B A.

    weights: (name, tensor of any device). device: what adds them. A sum is in float32, for vLLM to round as it computes.
    Raises RuntimeError at the end where the checkpoint lacked what the adapter changes.
    """
    import torch
    from safetensors.torch import load_file

    config = adapter_config(adapter)
    rank = config["r"]
    scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    changes = load_file(adapter / WEIGHTS)
    left = set(changes)
    for name, weight in weights:
        parts = [module_of(name) + part for part in (A, B)]
        if parts[0] not in changes:
            yield name, weight
            continue
        left.difference_update(parts)
        a, b = (changes[part].to(device, torch.float32) for part in parts)
        # Moved as it is, since a move to another type has the processor make floats of it first.
        yield name, weight.to(device).float().addmm(b, a, alpha=scaling)
    if left:
        raise RuntimeError(f"the weights lack what adapter {adapter} changes: {min(left)}")
