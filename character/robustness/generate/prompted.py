"""Robustness, method 'prompted': the untrained model answers with the constitution as its system prompt.

evaluation prompts → DATA_PATH/robustness/<student>/prompted/<variant>/<constitution>.jsonl

python -m character.robustness.generate.prompted --constitution humor --model llama-3.1-8b-it
"""

from dataclasses import dataclass

from character import cli, constitution, steps
from character.distillation import teacher
from character.robustness.generate import variants


@dataclass
class Args(variants.AnswerArgs):
    """Arguments of the prompted method."""


def main(args: Args) -> None:
    """Answer plain and under every suffix, all personas through one engine."""
    model = steps.model_of(args, args.model)
    jobs: list[steps.Job] = []
    for traits in constitution.load_selected(args.constitution):
        system = teacher.system_prompt(traits, model)
        jobs += variants.jobs(args, model, "prompted", traits.name, system=system)
    steps.generate(jobs, args, model)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
