"""Steer a model: its decoder layers add a control vector to the hidden states that they hand on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repeng.vectors import ControlVector

# How models of several modalities name the towers that are not their language model.
TOWERS = ("vision", "visual", "audio", "encoder")


class ControlModel:
    """A causal language model of transformers, with PEFT's adapters or without, or vLLM's own, that can be steered.

    model: changed in place, until `unwrap`. layer_ids: the decoder layers that may add a vector, counted from 0, or from
    the end where negative. Calls and attributes are passed on to the model. Raises ValueError for a layer it lacks.
    """

    def __init__(self, model: Any, layer_ids: Iterable[int]):
        layers = decoder_layers(model)
        if wrong := [number for number in layer_ids if not -len(layers) <= number < len(layers)]:
            raise ValueError(f"no layer {wrong[0]}: the model has {len(layers)} layers")
        self.model = model
        self.layer_ids = sorted({number % len(layers) for number in layer_ids})
        self._controls: dict[int, Any] = {}
        self._hooks = [layers[number].register_forward_hook(self._adding(number)) for number in self.layer_ids]

    def set_control(self, vector: ControlVector, coeff: float = 1.0) -> None:
        """From now on add `coeff` times the vector's direction after each layer, in place of an earlier one.

        Raises ValueError where the vector lacks a direction for one of the layers.
        """
        import torch

        if missing := [number for number in self.layer_ids if number not in vector.directions]:
            raise ValueError(f"the control vector has no direction for layer {missing[0]}")
        self._controls = {
            number: torch.from_numpy(coeff * vector.directions[number]).float() for number in self.layer_ids
        }

    def reset(self) -> None:
        """Add nothing from now on."""
        self._controls = {}

    def unwrap(self) -> Any:
        """Leave the model as it was before, and return it."""
        for hook in self._hooks:
            hook.remove()
        return self.model

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return self.model(*args, **settings)

    def __getattr__(self, name: str) -> Any:
        if name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)

    def _adding(self, number: int) -> Callable[[Any, Any, Any], Any]:
        def add(layer: Any, inputs: Any, output: Any) -> Any:
            if number not in self._controls:
                return output
            # vLLM's layers return two parts whose sum is the hidden state; the next layer adds them up.
            hidden, *rest = output if isinstance(output, tuple) else (output,)
            self._controls[number] = control = self._controls[number].to(hidden)
            return (hidden + control, *rest) if isinstance(output, tuple) else hidden + control

        return add


def decoder_layers(model: Any) -> Any:
    """The list of the language model's decoder layers. Raises ValueError where none is found."""
    import torch

    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        is_list = isinstance(module, torch.nn.ModuleList) and len(module) == count
        if is_list and not any(tower in name for tower in TOWERS):
            return module
    raise ValueError(f"{type(model).__name__} has no list of {count} decoder layers")
