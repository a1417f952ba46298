"""Step 5: DPO. A LoRA learns to answer as the teacher did in character, without the system prompt.

DATA_PATH/dpo/<student>/<constitution>.jsonl → LORA_PATH/<student>-distillation/<constitution>

python -m character.distillation.train --constitution humor --model llama-3.1-8b-it
torchrun --nproc_per_node gpu -m character.distillation.train --constitution humor --model llama-3.1-8b-it
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from character import cli, constitution, rows, steps, training
from character.constants import LORA_PATH
from character.distillation import data
from character.engine.chat import Chat, context_of
from character.models import Model, resolve, safe_name
from character.utils import UserError


@dataclass
class Args(training.TrainArgs):
    """Arguments of DPO; the defaults are the method's."""

    beta: float = cli.flag(0.1, "DPO's beta")
    length_normalized: bool = cli.flag(False, "divide each answer's log-ratio by its tokens")
    nll_coef: float = cli.flag(0.1, "weight of the chosen answers' negative log-likelihood")
    sq_coef: float = cli.flag(0.001, "weight of the squared log-ratio of policy and reference")
    max_length: int = cli.flag(1024, "tokens of a prompt with its answer; longer ones are cut at the end")


def path_of(name: str, student: str) -> Path:
    """Where the DPO adapter for a student and a constitution is. student: its short name."""
    return LORA_PATH / f"{safe_name(student)}-distillation" / name


@dataclass(frozen=True)
class Distilled:
    """A persona whose DPO adapter is there."""

    constitution: constitution.Constitution
    adapter: Path

    @property
    def weights(self) -> Path:
        """The file with the adapter's tensors."""
        return self.adapter / "adapter_model.safetensors"


def distilled(spec: str, model: Model) -> list[Distilled]:
    """The personas that `--constitution` means; of 'all', those that are trained. Raises UserError for a missing one."""
    wanted = constitution.load_selected(spec)
    found = [Distilled(traits, path_of(traits.name, model.short)) for traits in wanted]
    there = [persona for persona in found if persona.adapter.exists() or rows.is_planned(persona.weights)]
    if spec == "all":
        found = there
    missing = [persona.adapter for persona in found if persona not in there]
    if missing or not found:
        place = missing[0] if missing else path_of("<constitution>", model.short)
        raise UserError(
            f"no DPO adapter at {place}; run: python -m character.distillation.train --constitution {spec} "
            f"--model {model.short}"
        )
    return found


def extra_loss(policy: Any, reference: Any, mask: Any, nll_coef: float, sq_coef: float) -> tuple[Any, Any, Any]:
    """(loss, nll, squared) of the two terms beside DPO's.

    policy, reference: log-probabilities of the labels, (2 × pairs, length), chosen answers first. mask: the answers'
    tokens, of the same shape. nll: minus the mean over chosen answers of each one's mean over its tokens. squared: the
    mean over all answers of each one's mean squared difference. (The paper's appendix; see method in the README.)
    """
    tokens = mask.sum(dim=1).clamp_min(1)
    chosen = policy.shape[0] // 2
    nll = -((policy * mask).sum(dim=1) / tokens)[:chosen].mean()
    squared = (((policy - reference) ** 2 * mask).sum(dim=1) / tokens).mean()
    return nll_coef * nll + sq_coef * squared, nll, squared


def make_trainer(args: Args, model: Model, pairs: list[dict[str, Any]], checkpoints: Path) -> Any:
    """TRL's DPOTrainer with the two further terms. The reference is the same network with its adapter off."""
    import datasets
    import torch
    import trl
    from peft.tuners.tuners_utils import BaseTunerLayer

    datasets.disable_progress_bars()

    from character.engine.transformers import load_network, stop_ids

    network, tokenizer = load_network(model)
    network = training.on_gpu(network)
    chat = Chat(tokenizer, model, context_of(network.config, model))
    stops = stop_ids(network, tokenizer)

    class Trainer(trl.DPOTrainer):
        """DPO + NLL of the chosen answers + squared log-ratio."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            # The tokens are the engine's own, so that training sees what generation saw.
            return dataset.map(encode, remove_columns=dataset.column_names)

        @functools.cached_property
        def adapted(self) -> list[Any]:
            """The layers with an adapter."""
            return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            ids, attended, mask = (inputs[name] for name in ("input_ids", "attention_mask", "completion_mask"))
            seen: list[Any] = []
            hook = self.model.register_forward_hook(lambda _module, _inputs, output: seen.append(output.log_probs))
            try:
                with torch.no_grad(), training.switched_off(self.adapted):
                    labels = ids.masked_fill(mask == 0, -100)
                    self.model(
                        input_ids=ids, attention_mask=attended, labels=labels, use_cache=False, fused_lm_head=True
                    )
                chosen, rejected = seen[0].sum(dim=1).chunk(2)
                given = inputs | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
                loss = super()._compute_loss(model, given, return_outputs=False)
            finally:
                hook.remove()
            reference, policy = seen
            extra, nll, squared = extra_loss(policy, reference, mask[:, 1:], args.nll_coef, args.sq_coef)
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["loss/nll"].append(self.accelerator.gather(nll.detach()).mean().item())
            self._metrics[mode]["loss/squared"].append(self.accelerator.gather(squared.detach()).mean().item())
            return loss + extra

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt, chosen = chat.answer(row["chosen"], stops)
        again, rejected = chat.answer(row["rejected"], stops)
        if prompt != again:
            raise UserError("a pair's chosen and rejected prompts differ; make the data anew")
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}

    at_once = training.micro_batch_of(args, model, network, 2 * args.max_length)
    config = training.on_one_gpu(
        trl.DPOConfig(
            **training.trainer_arguments(args, at_once, checkpoints, len(pairs)),
            beta=args.beta,
            loss_type=["sigmoid_norm" if args.length_normalized else "sigmoid"],
            max_length=args.max_length,
        )
    )
    trainer = Trainer(
        model=network,
        peft_config=training.lora_config(model, args),
        args=config,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    # TRL then expects the reference's log-probabilities with the inputs.
    trainer.precompute_ref_logps = True
    if torch.cuda.is_available():
        lengths = [
            len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
            for row in trainer.train_dataset
        ]
        training.speed_up(trainer, lengths, args.batch_size, at_once.tokens, sides=2)
    return trainer


def main(args: Args) -> None:
    """Train one adapter per constitution."""
    model = resolve(args.model, args.name)
    for name in constitution.selected(args.constitution):
        train_one(args, name, model)
    training.leave()


def train_one(args: Args, name: str, model: Model) -> None:
    """Train the adapter of one constitution, unless it is there."""
    source = data.path_of(name, model.short)
    command = f"python -m character.distillation.data --constitution {name} --model {args.model}"
    pairs = rows.read(source, "chosen", "rejected", made_by=command)[: args.limit]
    sides = ("chosen", "rejected")
    lengths = [pair.get("most_tokens") or sum(steps.message_tokens(pair[side]) for side in sides) for pair in pairs]
    training.finish(
        args,
        model,
        path_of(name, model.short),
        training.settings_of(args, model, source),
        training.Amount("DPO on {} pairs", source, lengths, 2 * args.max_length),
        lambda checkpoints: make_trainer(
            args, model, [{side: pair[side] for side in sides} for pair in pairs], checkpoints
        ),
    )


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
