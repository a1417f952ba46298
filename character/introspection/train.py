"""Step 9: SFT. A second LoRA, on top of the folded DPO adapter, learns from the model's own introspection.

DATA_PATH/sft_data/<student>/<constitution>.jsonl → LORA_PATH/<student>-introspection/<constitution>

python -m character.introspection.train --constitution humor --model llama-3.1-8b-it
torchrun --nproc_per_node gpu -m character.introspection.train --constitution humor --model llama-3.1-8b-it
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from character import cli, rows, steps, training
from character.constants import LORA_PATH
from character.distillation import train as dpo
from character.engine.base import Message
from character.engine.chat import Chat, common_prefix, context_of
from character.introspection import data
from character.models import Model, resolve, safe_name
from character.utils import UserError

IGNORED = -100


@dataclass
class Args(training.TrainArgs):
    """Arguments of SFT; the defaults are the method's."""

    max_length: int = cli.flag(3072, "tokens of a row; longer ones are cut at the end")
    packing: bool = cli.flag(
        False, "several rows per sequence, none seeing another; --batch-size then counts sequences"
    )


def path_of(name: str, student: str) -> Path:
    """Where the introspection adapter for a student and a constitution is. student: its short name."""
    return LORA_PATH / f"{safe_name(student)}-introspection" / name


def labelled(chat: Chat, messages: Sequence[Message], stops: frozenset[int]) -> dict[str, list[int]]:
    """{input_ids, labels} of a conversation: every assistant turn with its end-of-turn token is trained on, no more.

    Raises UserError where the template does not render a conversation as the beginning of a longer one.
    """
    ids = chat.ids(chat.text(messages, reply=False))
    labels = [IGNORED] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = chat.ids(chat.text(messages[:number]))
        start = common_prefix(before, ids)
        if start < len(before):
            raise UserError(
                f"the chat template of {chat.model.source} rewrites earlier turns, so that single turns cannot be "
                "trained on; use a template that renders each turn the same way whatever follows"
            )
        end = next((place for place in range(start, len(ids)) if ids[place] in stops), len(ids) - 1)
        labels[start : end + 1] = ids[start : end + 1]
    return {"input_ids": ids, "labels": labels}


def make_trainer(args: Args, model: Model, adapter: Path, conversations: list[list[Message]], checkpoints: Path) -> Any:
    """TRL's SFTTrainer on the student with its DPO adapter folded in, in memory."""
    import datasets
    import peft
    import torch
    import trl

    from character.engine.transformers import load_network, stop_ids

    datasets.disable_progress_bars()
    network, tokenizer = load_network(model)
    network = peft.PeftModel.from_pretrained(training.on_gpu(network), str(adapter)).merge_and_unload()
    chat = Chat(tokenizer, model, context_of(network.config, model))
    stops = stop_ids(network, tokenizer)
    encoded = [labelled(chat, messages, stops) for messages in conversations]
    cut = [{key: values[: args.max_length] for key, values in row.items()} for row in encoded]
    fed = datasets.Dataset.from_list(cut)
    if args.packing:
        # Position ids that begin anew with each row tell transformers' attention which tokens belong together.
        fed = trl.pack_dataset(fed, args.max_length)
    at_once = training.micro_batch_of(args, model, network, args.max_length, args.packing)
    config = training.on_one_gpu(
        trl.SFTConfig(
            **training.trainer_arguments(args, at_once, checkpoints, len(fed)),
            max_length=args.max_length,
            packing=args.packing,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
    )
    trainer = trl.SFTTrainer(
        model=network,
        peft_config=training.lora_config(model, args),
        args=config,
        train_dataset=fed,
        processing_class=tokenizer,
    )
    if torch.cuda.is_available() and not args.packing:
        training.speed_up(trainer, [len(row["input_ids"]) for row in cut], args.batch_size, at_once.tokens)
    return trainer


def main(args: Args) -> None:
    """Train one adapter per persona that has a DPO adapter."""
    model = resolve(args.model, args.name)
    for persona in dpo.distilled(args.constitution, model):
        train_one(args, persona, model)
    training.leave()


def train_one(args: Args, persona: dpo.Distilled, model: Model) -> None:
    """Train the introspection adapter of one persona, unless it is there."""
    name = persona.constitution.name
    source = data.path_of(name, model.short)
    command = f"python -m character.introspection.data --constitution {name} --model {args.model}"
    given = rows.read(source, "messages", made_by=command)[: args.limit]
    lengths = [row.get("most_tokens") or steps.message_tokens(row["messages"]) for row in given]
    training.finish(
        args,
        model,
        path_of(name, model.short),
        training.settings_of(args, model, source) | {"folded": rows.file_digest(persona.weights)},
        training.Amount("SFT on {} rows", source, lengths, args.max_length),
        lambda checkpoints: make_trainer(args, model, persona.adapter, [row["messages"] for row in given], checkpoints),
    )


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
