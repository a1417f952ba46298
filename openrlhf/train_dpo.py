"""DPO through the released OpenRLHF, with a squared log-ratio term and, if asked for, length normalization.

Runs OpenRLHF's own `openrlhf.cli.train_dpo` with its trainer class replaced by a subclass; every flag of that program
works here, and two are new: --model.sq_loss_coef and --model.length_normalized_enable.

In: pairs with ChatML columns `chosen` and `rejected`. Out: a LoRA adapter in --ckpt.output_dir.

    deepspeed openrlhf/train_dpo.py --model.sq_loss_coef 0.001 --model.nll_loss_coef 0.1 …
    finetuning/distillation/llama.sh humor      # all settings of the method
"""

import argparse
import importlib
import importlib.metadata
import runpy
import sys
from typing import Any, NoReturn

RELEASE = "0.11.2"


def add_flags() -> None:
    """Give the next parser that parses a command line, which is the release's, our flags besides its own."""
    parsers: Any = argparse.ArgumentParser
    release_parse_args = parsers.parse_args

    def parse_args(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        parsers.parse_args = release_parse_args
        parser.add_argument(
            "--model.sq_loss_coef", type=float, default=0, help="Weight of the squared log-ratio to the reference"
        )
        parser.add_argument(
            "--model.length_normalized_enable",
            action="store_true",
            default=False,
            help="DPO on each answer's mean log-probability per token instead of its sum",
        )
        return release_parse_args(parser, *args, **kwargs)

    parsers.parse_args = parse_args


def with_character_terms(release: Any) -> Any:
    """The release's DPOTrainer (`release`) as a subclass with the squared term and length normalization.

    The squared term is (log pi - log ref)^2, averaged over each answer's tokens, then over all answers, chosen and
    rejected. It is part of the logged and the evaluated `loss`, and also logged alone as `sq_loss`.
    The NLL term (mean over chosen answers of each answer's mean over its tokens) is the release's --model.nll_loss_coef.
    """

    class CharacterDPOTrainer(release):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.preference_loss: Any = self.loss_fn
            self.loss_fn: Any = self.preference_and_squared_loss
            self.passes: list[tuple[Any, ...]] = []
            self.squares: list[float] = []

        def _get_batch_logps(self, per_token_logps: Any, attention_mask: Any, prompt_id_lens: Any) -> tuple[Any, Any]:
            sums, means = super()._get_batch_logps(per_token_logps, attention_mask, prompt_id_lens)
            self.passes.append((per_token_logps, attention_mask, prompt_id_lens))
            return (means if self.args.model.length_normalized_enable else sums), means

        def preference_and_squared_loss(self, *logps: Any) -> tuple[Any, Any, Any]:
            # The release runs the policy, then the reference, then the loss; another order fails to unpack.
            (policy, *answers), (reference, *_) = self.passes
            self.passes.clear()
            loss, chosen_reward, rejected_reward = self.preference_loss(*logps)
            # The release's own reduction knows which tokens are the answer's.
            _, squares = super()._get_batch_logps((policy - reference) ** 2, *answers)
            if squares.requires_grad:
                self.squares.append(squares.mean().item())
            return loss + self.args.model.sq_loss_coef * squares.mean(), chosen_reward, rejected_reward

        def save_logs_and_checkpoints(
            self, args: Any, global_step: int, step_bar: Any, logs_dict: Any = None, client_states: Any = None
        ) -> None:
            mean = self.strategy.all_reduce({"sq_loss": sum(self.squares) / len(self.squares)})
            self.squares.clear()
            super().save_logs_and_checkpoints(args, global_step, step_bar, (logs_dict or {}) | mean, client_states)

    return CharacterDPOTrainer


def fail(message: str) -> NoReturn:
    """Print one line and exit with 2."""
    print("error:", message, file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Run the release's train_dpo with our trainer class and flags in place of its own."""
    try:
        installed = importlib.metadata.version("openrlhf")
        trainer: Any = importlib.import_module("openrlhf.trainer.dpo_trainer")
    except ImportError as missing:
        fail(f"{missing}; install openrlhf/requirements.txt")
    if installed != RELEASE:
        # The hooks above fit this release; another one might pass over them without a word.
        fail(f"openrlhf {RELEASE} is needed, {installed} is installed; install openrlhf/requirements.txt")

    trainer.DPOTrainer = with_character_terms(trainer.DPOTrainer)
    add_flags()
    runpy.run_module("openrlhf.cli.train_dpo", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
