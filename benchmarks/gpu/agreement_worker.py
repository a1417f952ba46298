"""One OpenRLHF training that begins with given LoRA weights and writes every step's loss and gradient norm.

`deepspeed` runs it in place of the program that a script of finetuning/ names (see agreement.py); its flags are that
program's.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def begin_with(file: Path) -> None:
    """Let OpenRLHF's adapters have the weights in `file`, in place of random ones."""
    import safetensors.torch
    from openrlhf.models import actor

    make = actor.get_peft_model

    def get_peft_model(*args: Any, **kwargs: Any) -> Any:
        network = make(*args, **kwargs)
        weights = dict(network.named_parameters())
        for name, value in safetensors.torch.load_file(file).items():
            weights[name].data.copy_(value)
        return network

    actor.get_peft_model = get_peft_model


def record() -> list[dict[str, float]]:
    """A list that gets loss (the mean of the micro-batches, over all GPUs) and gradient norm of every step."""
    from openrlhf.utils.deepspeed import DeepspeedStrategy

    backward, step = DeepspeedStrategy.backward, DeepspeedStrategy.optimizer_step
    losses: list[float] = []
    steps: list[dict[str, float]] = []

    def recorded_backward(self: Any, loss: Any, *args: Any, **kwargs: Any) -> None:
        losses.append(self.all_reduce(loss.item()))
        backward(self, loss, *args, **kwargs)

    def recorded_step(self: Any, optimizer: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        step(self, optimizer, model, *args, **kwargs)
        if len(losses) == self.accumulated_gradient:
            steps.append({"loss": sum(losses) / len(losses), "grad_norm": self.get_grad_norm(model)})
            losses.clear()

    DeepspeedStrategy.backward, DeepspeedStrategy.optimizer_step = recorded_backward, recorded_step
    return steps


def main() -> None:
    """Run the program that the flags are of."""
    folder = Path(os.environ["AGREEMENT_FOLDER"])
    stage = "distillation" if "--model.beta" in sys.argv else "introspection"
    begin_with(folder / f"{stage}.safetensors")
    steps = record()
    if stage == "distillation":
        runpy.run_path(str(ROOT / "openrlhf" / "train_dpo.py"), run_name="__main__")
    else:
        runpy.run_module("openrlhf.cli.train_sft", run_name="__main__", alter_sys=True)
    if os.environ["RANK"] == "0":
        (folder / "steps.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
