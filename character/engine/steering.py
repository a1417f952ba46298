"""What vLLM's worker processes get to be steered: a method that the engine calls by its name.

Each request may have its own control vector: its number stands in the request's id, and is looked up for every token of
a batch. The model runs without compiled graphs, which would skip the hooks.
"""

from pathlib import Path
from typing import Any

from repeng import ControlVector
from repeng.control import decoder_layers

# In a request's id, before the number of its steering.
MARK = ".steered."


class SteeredWorker:
    """Becomes a base class of vLLM's worker."""

    steered: Any = None

    def steer(self, number: int, vector: str, strength: float) -> None:
        """Steer the requests with this number, from 1 up, by the control vector in a file."""
        if self.steered is None:
            self.steered = SteeredModel(self.model_runner)  # type: ignore[attr-defined]
        self.steered.add(number, ControlVector.load(Path(vector)) * strength)


class SteeredModel:
    """vLLM's model, whose layers add to each token's hidden state what its request asks for.

    runner: vLLM's first model runner, which holds the order of a batch in `input_batch` and `query_start_loc`.
    """

    def __init__(self, runner: Any):
        if not hasattr(runner, "query_start_loc"):
            raise RuntimeError("steering needs vLLM's first model runner; set VLLM_USE_V2_MODEL_RUNNER=0")
        self.runner = runner
        model = runner.get_model()
        self.layers = decoder_layers(model)
        # Layer → (steerings, hidden size), the first row for requests without one.
        self.shifts: dict[int, Any] = {}
        # The row of each token of the batch; None where no request is steered.
        self.rows: Any = None
        model.register_forward_pre_hook(self._find_rows)

    def add(self, number: int, vector: ControlVector) -> None:
        """Take in what requests of this number add."""
        import torch

        for layer, direction in vector.directions.items():
            if layer not in self.shifts:
                self.shifts[layer] = torch.zeros(1, len(direction))
                self.layers[layer].register_forward_hook(self._adding(layer))
        for layer, known in self.shifts.items():
            shifts = torch.cat([known, known.new_zeros(max(0, number + 1 - len(known)), known.shape[1])])
            if layer in vector.directions:
                shifts[number] = torch.from_numpy(vector.directions[layer]).to(shifts)
            self.shifts[layer] = shifts

    def _find_rows(self, model: Any, inputs: Any) -> None:
        import numpy as np
        import torch

        batch = self.runner.input_batch
        numbers = [number_in(name) for name in batch.req_ids]
        self.rows = None
        if any(numbers):
            lengths = np.diff(self.runner.query_start_loc.np[: len(numbers) + 1])
            self.rows = torch.from_numpy(np.repeat(numbers, lengths)).to(self.runner.device, non_blocking=True)

    def _adding(self, layer: int) -> Any:
        def add(module: Any, inputs: Any, output: Any) -> None:
            if self.rows is not None:
                # Two parts whose sum is the hidden state, padded at the end.
                hidden = output[0] if isinstance(output, tuple) else output
                self.shifts[layer] = shifts = self.shifts[layer].to(hidden)
                rows = self.rows[: len(hidden)]
                hidden[: len(rows)] += shifts[rows]

        return add


def number_in(request: str) -> int:
    """The steering's number in a request's id, to which vLLM adds an end of its own; 0 without one."""
    _, marked, rest = request.partition(MARK)
    return int(rest.split("-")[0]) if marked else 0
