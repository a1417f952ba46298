"""Robustness, trained methods: the model with an adapter, and 'base', the model without one, both with no system prompt.

evaluation prompts → DATA_PATH/robustness/<student>/<method>/<variant>/<constitution>.jsonl ('none' for base)

python -m character.robustness.generate.trained --constitution humor --model llama-3.1-8b-it --method base distilled
python -m character.robustness.generate.trained --method mine --adapter path/to/adapter
python -m character.robustness.generate.trained --method theirs --adapter org/name --model llama-3.1-8b-it
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from character import cli, constitution, steps
from character.constants import LORA_PATH
from character.distillation import teacher
from character.engine import Steering, choose
from character.engine.base import adapter_config, find_adapter
from character.models import Model, safe_name
from character.robustness.generate import steered, variants
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


@dataclass(frozen=True)
class Voice:
    """Who answers: a method's model for a persona ('none' for base), with its system prompt, adapter or steering."""

    method: str
    name: str
    system: str = ""
    adapter: Path | None = None
    steering: Steering | None = None

    @property
    def settings(self) -> dict[str, str | float | None]:
        """What an output file's settings remember of the weights that were added to the model's."""
        if self.steering:
            return steered.settings_of(self.steering)
        return {"adapter": file_digest(self.adapter / "adapter_model.safetensors")} if self.adapter else {}


def voices(args: Any, model: Model) -> list[Voice]:
    """A voice per method and persona that the flags --method, --adapter and --constitution name. Raises UserError."""
    if args.adapter and len(args.method) != 1:
        raise UserError("--adapter goes with one --method, which names it")
    found = []
    for method in args.method:
        if method == "base":
            found.append(Voice(method, "none"))
        elif method == "prompted":
            for traits in constitution.load_selected(args.constitution):
                found.append(Voice(method, traits.name, system=teacher.system_prompt(traits, model)))
        elif method == "steered":
            choose(args.engine, args.base_url, steered=True)
            for name in constitution.selected(args.constitution):
                found.append(Voice(method, name, steering=steered.steering_of(model.short, name)))
        else:
            for name in constitution.selected(args.constitution):
                found.append(Voice(method, name, adapter=adapter_of(args.adapter, method, name, model)))
    return found


def generate(jobs: Sequence[steps.Job], args: Any, model: Model, speakers: Sequence[Voice]) -> None:
    """Finish every job with one engine that has what the voices need. Raises UserError."""
    adapters = [voice.adapter for voice in speakers if voice.adapter]
    steps.generate(jobs, args, model, adapters, steered=any(voice.steering for voice in speakers))


def main(args: Args) -> None:
    """Answer plain and under every suffix, all methods and personas through one engine."""
    model = steps.model_of(args, args.model)
    speakers = voices(args, model)
    jobs: list[steps.Job] = []
    for voice in speakers:
        how = voice.system, voice.adapter, voice.settings, voice.steering
        jobs += variants.jobs(args, model, voice.method, voice.name, *how)
    generate(jobs, args, model, speakers)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
