"""Steering inside vLLM: hooks that add to each token's hidden state what its request asks for.

Each request may have its own control vector: its number stands in the request's id, and is looked up for every token of
a batch. The hooks read tensors that stay in their places, so that they become part of vLLM's CUDA graphs.
"""

from collections.abc import Callable, Sequence
from typing import Any

from repeng import ControlVector
from repeng.control import decoder_layers

# In a request's id, before the number of its steering.
MARK = ".steered."
# Control vectors and strengths, no steering included, that one engine can tell apart.
STEERINGS = 512


class SteeredModel:
    """vLLM's model, with every decoder layer hooked before its graphs are captured.

    runner: either of vLLM's model runners, with the model loaded.
    """

    def __init__(self, runner: Any):
        import torch

        layers = decoder_layers(runner.get_model())
        config = runner.model_config
        self.runner = runner
        # Layers × steerings × hidden size; the first row of each layer, for requests without one, stays 0.
        self.shifts = torch.zeros(
            len(layers), STEERINGS, config.get_hidden_size(), dtype=config.dtype, device=runner.device
        )
        # The number of each token of the batch.
        self.numbers = torch.zeros(runner.max_num_tokens, dtype=torch.long, device=runner.device)
        for layer, shifts in zip(layers, self.shifts, strict=True):
            layer.register_forward_hook(self._adding(shifts))
        # The first model runner's name of it, and the second's.
        name = "_prepare_inputs" if hasattr(runner, "_prepare_inputs") else "prepare_inputs"
        setattr(runner, name, self._numbering(getattr(runner, name)))

    def add(self, number: int, vector: ControlVector) -> None:
        """Take in what requests of this number add; from 1 up to STEERINGS - 1, each number once."""
        import torch

        for layer, direction in vector.directions.items():
            self.shifts[layer, number] = torch.from_numpy(direction).to(self.shifts)

    def _numbering(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        """What the runner does before each batch, and then the numbers of the batch's tokens."""

        def prepared(scheduled: Any, *more: Any) -> Any:
            batch = prepare(scheduled, *more)
            if hasattr(batch, "req_ids"):
                self._number(batch.req_ids, batch.num_scheduled_tokens)
            else:
                names = self.runner.input_batch.req_ids
                self._number(names, [scheduled.num_scheduled_tokens[name] for name in names])
            return batch

        return prepared

    def _number(self, names: Sequence[str], lengths: Sequence[int]) -> None:
        import numpy as np
        import torch

        numbers = np.repeat(np.array([number_in(name) for name in names]), lengths)
        self.numbers[: len(numbers)].copy_(torch.from_numpy(numbers), non_blocking=True)

    def _adding(self, shifts: Any) -> Callable[[Any, Any, Any], None]:
        def add(module: Any, inputs: Any, output: Any) -> None:
            # Two parts whose sum is the hidden state; padded at the end, and 1 × tokens × size in transformers' models.
            hidden = output[0] if isinstance(output, tuple) else output
            hidden += shifts[self.numbers[: hidden.shape[-2]]]

        return add


def number_in(request: str) -> int:
    """The steering's number in a request's id, to which vLLM adds an end of its own; 0 without one."""
    _, marked, rest = request.partition(MARK)
    return int(rest.split("-")[0]) if marked else 0
