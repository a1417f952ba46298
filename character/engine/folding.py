"""Folding an adapter into a model's weights while they are loaded, for an engine that answers with that adapter alone.

A kept-apart adapter costs small kernels beside each matrix product at every token; weights that hold it cost nothing.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from character.engine.base import adapter_config, safetensors_header, tensor_shapes

# vLLM's `load_format` for it; its loader gets the adapter's folder.
FOLDED = "folded"
WEIGHTS = "adapter_model.safetensors"
# PEFT's name of a module begins so, transformers' does not; a checkpoint's tensor is the module's weight.
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# What a sum can be rounded to; weights in 8 bits have scales of their own.
ROUNDED = ("F32", "BF16", "F16")


def foldable(folder: Path, adapter: Path) -> bool:
    """Whether a checkpoint has the weight of each module that the adapter changes, under the module's own name.

    folder: of *.safetensors. Raises UserError for a broken file.
    """
    kinds = {
        name: entry["dtype"]
        for file in folder.glob("*.safetensors")
        for name, entry in safetensors_header(file)[0].items()
    }
    names = tensor_shapes(adapter / WEIGHTS)
    changed = {name.removesuffix(A).removesuffix(B) for name in names}
    return all(
        {module + A, module + B} <= names.keys()
        and module.startswith(PREFIX)
        and kinds.get(f"{module.removeprefix(PREFIX)}.weight") in ROUNDED
        for module in changed
    )


def folded(weights: Iterator[tuple[str, Any]], adapter: Path, device: Any) -> Iterator[tuple[str, Any]]:
    """A checkpoint's tensors, those that the adapter changes with its change added: W + scaling · B A.

    weights: (name, tensor of any device). device: what adds them, in float32, before the sum is rounded as W was.
    """
    import torch
    from safetensors import safe_open

    config = adapter_config(adapter)
    rank = config["r"]
    scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        changed = set(file.keys())
        for name, weight in weights:
            module = PREFIX + name.removesuffix(".weight")
            if module + A not in changed:
                yield name, weight
                continue
            a, b = (file.get_tensor(module + part).to(device, torch.float32) for part in (A, B))
            yield name, weight.to(device, torch.float32).addmm(b, a, alpha=scaling).to(weight.dtype)
