"""What both generating steps of introspection share: the persona that speaks, and what its files remember of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from character import cli, constitution, steps
from character.distillation import train
from character.engine import Sampling
from character.models import Model
from character.rows import file_digest
from character.utils import digest


@dataclass
class PersonaArgs(steps.GenerateArgs):
    """Flags of both steps."""

    model: str = cli.flag("pocket", "the student; with --no-adapter any model")
    adapter: bool = cli.flag(True, "as DPO left it; without, the model itself, in character by its system prompt alone")


@dataclass(frozen=True)
class Persona:
    """Who speaks: a constitution, and the model's DPO adapter, None for the model itself."""

    constitution: constitution.Constitution
    adapter: Path | None


A = TypeVar("A", bound=PersonaArgs)


def settings_of(args: PersonaArgs, persona: Persona, model: Model, sampling: Sampling, prompt: Any) -> dict[str, Any]:
    """The settings that a file of a persona's own words remembers. prompt: the texts of its system prompt."""
    return steps.settings_of(args, model, sampling) | {
        "constitution": persona.constitution.hash,
        "adapter": persona.adapter and file_digest(persona.adapter / "adapter_model.safetensors"),
        "system_prompt": digest(prompt),
    }


def generate(args: A, job: Callable[[A, Persona, Model], steps.Job]) -> None:
    """Write one file per persona, all adapters in one engine. Raises UserError for a missing adapter."""
    model = steps.model_of(args, args.model)
    if args.adapter:
        found = [Persona(one.constitution, one.adapter) for one in train.distilled(args.constitution, model)]
    else:
        found = [Persona(traits, None) for traits in constitution.load_selected(args.constitution)]
    adapters = [persona.adapter for persona in found if persona.adapter]
    jobs = [job(args, persona, model) for persona in found]
    steps.generate(jobs, args, model, adapters, folded=len(adapters) == len(found) == 1)
