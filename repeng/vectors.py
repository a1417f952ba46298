"""Control vectors: one direction per layer, read off pairs of texts, computed with, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from character.engine.base import safetensors_header
from character.engine.chat import common_prefix, token_ids
from character.utils import UserError, replacing, write_json
from repeng.control import decoder_layers

BATCH = 32
NAME = "layers.{}"
Directions = dict[int, NDArray[np.float32]]


@dataclass(frozen=True)
class DatasetEntry:
    """Two texts that differ in what the vector shall mean, rendered by the chat template up to the compared token."""

    positive: str
    negative: str


@dataclass
class ControlVector:
    """A direction for each of some layers. Vectors of one model add, subtract and scale, layer by layer.

    model_type: the config's, such as "llama". directions: layer, from 0 → (hidden size,), for the layer's output.
    """

    model_type: str
    directions: Directions

    @classmethod
    def train(
        cls,
        model: Any,
        tokenizer: Any,
        dataset: Sequence[DatasetEntry],
        hidden_layers: Iterable[int] | None = None,
        batch_size: int = BATCH,
    ) -> ControlVector:
        """The first principal component, at each layer, of the last token's hidden states around their pair's midpoint.

        It points from negative to positive, and is as long as the mean pair is apart along it: a strength of 1 moves
        a hidden state as far as the texts differ. hidden_layers: negative ones count from the end; None is every one.
        Source: Zou et al. 2023, arXiv 2310.01405.
        """
        count = len(decoder_layers(model))
        layers = sorted({number % count for number in (range(count) if hidden_layers is None else hidden_layers)})
        texts = [text for entry in dataset for text in (entry.positive, entry.negative)]
        states = last_states(model, [token_ids(tokenizer, text) for text in texts], layers, batch_size)
        directions = {layer: principal(found[0::2] - found[1::2]) for layer, found in states.items()}
        return cls(model.config.get_text_config().model_type, directions)

    def save(self, path: Path, meta: Mapping[str, Any]) -> None:
        """Write `meta` as JSON beside `path`, then `path` (safetensors): where the vector is, its meta file is too."""
        from safetensors.numpy import save_file

        write_json(path.with_suffix(".meta.json"), dict(meta))
        tensors = {NAME.format(layer): direction for layer, direction in self.directions.items()}
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"model_type": self.model_type})

    @classmethod
    def load(cls, path: Path) -> ControlVector:
        """The vector that `save` wrote. Raises UserError where the file is missing, broken or something else."""
        from safetensors import safe_open

        if not path.exists():
            raise UserError(f"{path} does not exist; make it with character/robustness/generate/steered.py")
        names = list(safetensors_header(path)[0])
        with safe_open(path, "np") as file:
            model_type = (file.metadata() or {}).get("model_type")
            if model_type is None or not all(name.startswith(NAME.format("")) for name in names):
                raise UserError(f"{path} holds no control vector; make one with robustness/generate/steered.py")
            found = {int(name.rpartition(".")[2]): file.get_tensor(name) for name in names}
        return cls(model_type, dict(sorted(found.items())))

    def check(self, hidden_size: int, layers: int, source: str) -> None:
        """Raise UserError where the vector is not for a model of this size; source: how the message names the model."""
        for layer, direction in self.directions.items():
            if layer >= layers or direction.shape != (hidden_size,):
                raise UserError(
                    f"the control vector belongs to another model: its layer {layer} with {direction.size} numbers does "
                    f"not fit {source}, which has {layers} layers of {hidden_size}"
                )

    def __add__(self, other: ControlVector) -> ControlVector:
        if self.model_type != other.model_type:
            raise ValueError(f"control vectors of two models, {self.model_type} and {other.model_type}, do not add")
        summed = dict(self.directions)
        for layer, direction in other.directions.items():
            summed[layer] = summed[layer] + direction if layer in summed else direction
        return ControlVector(self.model_type, dict(sorted(summed.items())))

    def __sub__(self, other: ControlVector) -> ControlVector:
        return self + -other

    def __neg__(self) -> ControlVector:
        return self * -1

    def __mul__(self, factor: float) -> ControlVector:
        scaled = {layer: (direction * factor).astype(np.float32) for layer, direction in self.directions.items()}
        return ControlVector(self.model_type, scaled)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> ControlVector:
        return self * (1 / divisor)


def last_states(model: Any, prompts: Sequence[Sequence[int]], layers: Sequence[int], batch_size: int) -> Directions:
    """Layer → (prompts, hidden size): what each layer hands on at the last token of each prompt.

    What the prompts of a batch begin with (a system prompt) is computed once.
    """
    import torch

    found = {
        layer: np.empty((len(prompts), model.config.get_text_config().hidden_size), np.float32) for layer in layers
    }
    taken: dict[int, Any] = {}

    def taking(layer: int) -> Callable[[Any, Any, Any], None]:
        def take(module: Any, inputs: Any, output: Any) -> None:
            taken[layer] = output[0] if isinstance(output, tuple) else output

        return take

    modules = decoder_layers(model)
    hooks = [modules[layer].register_forward_hook(taking(layer)) for layer in layers]
    # Neighbours in this order have much in common: the beginning, or else the length.
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), prompts[row]))
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            shared = min(common_prefix(prompts[rows[0]], prompts[row][:-1]) for row in rows)
            rest = [torch.tensor(prompts[row][shared:]) for row in rows]
            last = torch.tensor([len(tokens) - 1 for tokens in rest])
            with torch.inference_mode():
                cache = None
                if shared:
                    prefix = torch.tensor([prompts[rows[0]][:shared]], device=model.device)
                    cache = model(input_ids=prefix, use_cache=True, logits_to_keep=1).past_key_values
                    cache.batch_repeat_interleave(len(rows))
                # Padding on the right changes nothing before it.
                ids = torch.nn.utils.rnn.pad_sequence(rest, batch_first=True).to(model.device)
                mask = torch.arange(shared + ids.shape[1]) <= shared + last[:, None]
                model(input_ids=ids, attention_mask=mask.to(model.device), past_key_values=cache, logits_to_keep=1)
            for layer, hidden in taken.items():
                found[layer][rows] = hidden[torch.arange(len(rows)), last].float().cpu()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def principal(differences: NDArray[np.float32]) -> NDArray[np.float32]:
    """The first principal component of (pairs, hidden size) differences around 0, pointing their way.

    Its length is the mean difference along it.
    """
    component = np.linalg.svd(differences, full_matrices=False)[2][0]
    result: NDArray[np.float32] = (differences @ component).mean() * component
    return result
