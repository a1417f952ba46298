"""Robustness, trained methods: the model with an adapter, and 'base', the model without one, both with no system prompt.

evaluation prompts → DATA_PATH/robustness/<student>/<method>/<variant>/<constitution>.jsonl ('none' for base)

python -m character.robustness.generate.trained --constitution humor --model llama-3.1-8b-it --method base distilled
python -m character.robustness.generate.trained --method mine --adapter path/to/adapter
python -m character.robustness.generate.trained --method theirs --adapter org/name --model llama-3.1-8b-it
"""

from dataclasses import dataclass
from pathlib import Path

from character import cli, constitution, steps
from character.constants import LORA_PATH
from character.engine.base import adapter_config, find_adapter
from character.models import Model, safe_name
from character.robustness.generate import variants
from character.rows import file_digest, is_planned
from character.utils import UserError

FOLDERS = {"distilled": "distillation", "merged": "personas", "sequential": "sequential"}


@dataclass
class Args(variants.AnswerArgs):
    """Arguments of the trained methods."""

    method: list[str] = cli.flag(
        ["distilled"], "base, distilled (DPO), merged or sequential (DPO + introspection), or a name for --adapter"
    )
    adapter: str | None = cli.flag(
        None, "a LoRA adapter: a folder, or org/name[/subfolder][@revision] on the hub (default: the method's own)"
    )


def adapter_of(given: str | None, method: str, name: str, model: Model) -> Path:
    """The adapter that a method means for a persona. given: --adapter. Raises UserError where it is not there."""
    if given:
        return find_adapter(given)
    if method not in FOLDERS:
        raise UserError(f"--method {method} needs --adapter (known without: base, {', '.join(FOLDERS)})")
    adapter = LORA_PATH / f"{safe_name(model.short)}-{FOLDERS[method]}" / name
    if not is_planned(adapter / "adapter_model.safetensors"):
        adapter_config(adapter)
    return adapter


def main(args: Args) -> None:
    """Answer plain and under every suffix, all methods and personas through one engine."""
    model = steps.model_of(args, args.model)
    if args.adapter and len(args.method) != 1:
        raise UserError("--adapter goes with one --method, which names it")
    jobs: list[steps.Job] = []
    adapters: list[Path] = []
    for method in args.method:
        if method == "base":
            jobs += variants.jobs(args, model, "base", "none")
            continue
        for name in constitution.selected(args.constitution):
            adapter = adapter_of(args.adapter, method, name, model)
            adapters.append(adapter)
            weights = {"adapter": file_digest(adapter / "adapter_model.safetensors")}
            jobs += variants.jobs(args, model, method, name, adapter=adapter, settings=weights)
    steps.generate(jobs, args, model, adapters)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
