"""What vLLM's worker processes get to be steered: a method that the engine calls by its name."""

from pathlib import Path
from typing import Any

from repeng import ControlModel, ControlVector


class SteeredWorker:
    """Becomes a base class of vLLM's worker. vLLM runs the model without compiled graphs, which would skip the hooks."""

    steered_model: Any = None

    def steer(self, vector: str | None, strength: float) -> None:
        """Steer from now on by the control vector in this file; None ends it."""
        if self.steered_model is not None:
            self.steered_model.unwrap()
            self.steered_model = None
        if vector is not None:
            loaded = ControlVector.load(Path(vector))
            self.steered_model = ControlModel(self.get_model(), loaded.directions)  # type: ignore[attr-defined]
            self.steered_model.set_control(loaded, strength)
