"""vLLM's worker with what this project adds to it; imported in vLLM's own processes alone."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm.config import LoadConfig
from vllm.model_executor.model_loader import DefaultModelLoader, register_model_loader
from vllm.platforms import current_platform

from character.engine.folding import FOLDED, with_adapter
from character.engine.prefix import SharedPrefix, shared_prefix
from character.engine.steering import SteeredModel
from repeng import ControlVector

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as VLLMWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as VLLMWorker


@register_model_loader(FOLDED)
class FoldingLoader(DefaultModelLoader):
    """Folds an adapter into the weights. Each process does so with whole tensors, before vLLM splits or packs them."""

    def __init__(self, config: LoadConfig):
        self.adapter = Path(config.model_loader_extra_config["adapter"])
        super().__init__(dataclasses.replace(config, load_format="safetensors", model_loader_extra_config={}))

    def get_all_weights(self, *given: Any, **named: Any) -> Iterator[tuple[str, Any]]:
        weights = super().get_all_weights(*given, **named)
        return with_adapter(weights, self.adapter, current_platform.device_type)


class Worker(VLLMWorker):
    """Reads once per batch what all its prompts begin with, where the model runner allows it."""

    prefix: SharedPrefix | None = None

    def initialize_from_config(self, *given: Any, **named: Any) -> None:
        super().initialize_from_config(*given, **named)
        self.prefix = shared_prefix(self.model_runner)

    def execute_model(self, scheduled: Any) -> Any:
        if self.prefix is None:
            return super().execute_model(scheduled)
        self.prefix.scheduled = scheduled
        try:
            return super().execute_model(scheduled)
        finally:
            self.prefix.scheduled = None

    def read_once(self) -> tuple[int, int]:
        """(batches whose beginning was read once, all batches), so far; zeros where none can be."""
        return (self.prefix.read_once, self.prefix.batches) if self.prefix else (0, 0)


class SteeredWorker(Worker):
    """Hooks its model as soon as it is loaded."""

    def load_model(self, *given: Any, **named: Any) -> None:
        super().load_model(*given, **named)
        self.steered = SteeredModel(self.model_runner)
        if not current_platform.is_cpu():
            # vLLM 0.26 would otherwise count this memory among what is free for keys and values.
            self.model_runner.model_memory_usage += self.steered.shifts.nbytes

    def steer(self, number: int, vector: str, strength: float) -> None:
        """Steer the requests with this number by the control vector in a file."""
        self.steered.add(number, ControlVector.load(Path(vector)) * strength)
