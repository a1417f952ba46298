"""What both training steps share: settings, the LoRA on the student, the Trainer's arguments, and what is kept of a run."""

import contextlib
import importlib.util
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from character import cli, rows
from character.models import Model, fingerprint
from character.steps import duration
from character.utils import UserError, git_commit, new_folder, read_json, versions, write_json

META = "training.json"
METRICS = "metrics.jsonl"


@dataclass
class TrainArgs(cli.StepArgs):
    """Settings of both training steps; the defaults are the method's."""

    model: str = cli.flag("pocket", "the student")
    name: str | None = cli.flag(None, "the student's family name, where it cannot be read off the model's id")
    rank: int = cli.flag(64, "LoRA rank")
    alpha: int = cli.flag(128, "LoRA alpha")
    learning_rate: float = cli.flag(5e-5, "peak learning rate")
    warmup_ratio: float = cli.flag(0.1, "share of the steps that warm up")
    min_lr_ratio: float = cli.flag(0.1, "where the cosine ends, as a share of the peak")
    adam_beta1: float = cli.flag(0.9, "Adam's first beta")
    adam_beta2: float = cli.flag(0.98, "Adam's second beta")
    max_grad_norm: float = cli.flag(1.0, "the gradient's norm is clipped at this")
    epochs: float = cli.flag(1.0, "passes over the data")
    batch_size: int = cli.flag(32, "rows per optimizer step, over all GPUs")
    micro_batch_size: int = cli.flag(2, "rows per GPU at once; lower it where memory runs out")
    gradient_checkpointing: bool = cli.flag(True, "recompute activations on a GPU: slower, much less memory")
    tokens_per_second: float | None = cli.flag(None, "of your machine; --dry-run then tells the time")
    report_to: Literal["none", "wandb", "trackio", "tensorboard"] = cli.flag("none", "where else metrics go")


def world_size() -> int:
    """How many processes train together (accelerate and torchrun say so in the environment)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def trainer_arguments(args: TrainArgs, folder: Path, rows_in: int) -> dict[str, Any]:
    """Arguments that transformers' Trainer and TRL's share. Raises UserError where the batch does not divide."""
    import torch

    at_once = args.micro_batch_size * world_size()
    if args.batch_size % at_once:
        raise UserError(
            f"--batch-size {args.batch_size} is no multiple of {at_once} "
            f"(--micro-batch-size {args.micro_batch_size} on {world_size()} processes); change one of them"
        )
    if args.report_to != "none":
        if importlib.util.find_spec(args.report_to) is None:
            raise UserError(f"{args.report_to} is not installed; pip install {args.report_to}, or --report-to none")
        # .env has one name for the key, wandb's library another.
        if os.environ.get("WANDB_TOKEN"):
            os.environ.setdefault("WANDB_API_KEY", os.environ["WANDB_TOKEN"])
    cuda = torch.cuda.is_available()
    steps = max(1, math.ceil(rows_in * args.epochs / args.batch_size))
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": args.micro_batch_size,
        "gradient_accumulation_steps": args.batch_size // at_once,
        "num_train_epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": args.min_lr_ratio},
        "warmup_steps": math.ceil(steps * args.warmup_ratio),
        "adam_beta1": args.adam_beta1,
        "adam_beta2": args.adam_beta2,
        "weight_decay": 0.0,
        "max_grad_norm": args.max_grad_norm,
        "bf16": cuda,
        "use_cpu": not cuda,
        "gradient_checkpointing": args.gradient_checkpointing and cuda,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "dataloader_pin_memory": cuda,
        "seed": args.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": max(1, steps // 5),
        "save_total_limit": 1,
        "report_to": args.report_to,
        "disable_tqdm": True,
    }


def lora_config(model: Model, args: TrainArgs) -> Any:
    """LoRA on every linear layer of the network (of a multi-modal model's language part alone)."""
    import peft

    return peft.LoraConfig(
        r=args.rank, lora_alpha=args.alpha, target_modules=model.lora, lora_dropout=0.0, task_type="CAUSAL_LM"
    )


def finish(
    args: TrainArgs,
    output: Path,
    settings: Mapping[str, Any],
    doing: str,
    source: Path,
    lengths: Sequence[int],
    make: Callable[[Path], Any],
) -> None:
    """Train the adapter at `output`, unless it is there; with `--dry-run`, say what would be done.

    doing, source, lengths: for the dry run, such as "DPO on {} pairs", the file of rows and the tokens of each.
    make: the folder for checkpoints → the Trainer.
    """
    if already_trained(output, settings, args.overwrite):
        print(f"{output}: complete")
    elif args.dry_run:
        an_epoch, tokens = -(-len(lengths) // args.batch_size), sum(lengths)
        known, most = ("about", "") if settings["data"] else ("at most", "at most ")
        time = duration(tokens * args.epochs, args.tokens_per_second)
        print(
            f"{output}: {doing.format(f'{most}{len(lengths)}')} of {source}, "
            f"{known} {tokens:,} tokens and {an_epoch} steps an epoch{time}"
        )
        rows.plan(output / "adapter_model.safetensors", [])
    else:
        train(make(output.with_name(f".{output.name}.checkpoints")), output, settings, args.overwrite)


def already_trained(output: Path, settings: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether `output` holds an adapter of these settings. Raises UserError where its settings are others."""
    if overwrite or not output.exists():
        return False
    if not (output / META).exists():
        raise UserError(f"{output} is there but was not made by this step; move it away or use --overwrite")
    rows.check_settings(output, read_json(output / META)["settings"], settings)
    return True


def train(trainer: Any, output: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Run a Trainer, from its last checkpoint where there is one of the same settings, and put its adapter at `output`.

    The folder is complete or not there: adapter, settings and versions (training.json), metrics.jsonl and loss.png.
    Raises UserError.
    """
    with _room_on_disk(output.parent):
        _train(trainer, output, settings, overwrite)


@contextlib.contextmanager
def _room_on_disk(folder: Path) -> Iterator[None]:
    """Turn what the libraries raise on a full disk, each in its own way, into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # The second is torch's, whose message otherwise depends on how far it came.
        if not any(sign in str(error) for sign in ("No space left", "enforce fail at inline_container")):
            raise
        raise UserError(f"the disk is full: {folder}; free some space and run the same command to go on") from None


def _train(trainer: Any, output: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    import torch
    import transformers

    checkpoints = Path(trainer.args.output_dir)
    resume = _resumable(checkpoints, settings, overwrite)
    if is_main():
        write_json(checkpoints / META, settings)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(_watch())
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except torch.OutOfMemoryError:
        raise UserError(
            "the GPU's memory is too small for --micro-batch-size "
            f"{trainer.args.per_device_train_batch_size}; lower it, or keep --gradient-checkpointing"
        ) from None
    if not is_main():
        return
    steps = trainer.state.global_step
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    with new_folder(output, overwrite) as fresh:
        trainer.save_model(str(fresh))
        for extra in ("README.md", "training_args.bin"):
            (fresh / extra).unlink(missing_ok=True)
        (fresh / METRICS).write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")
        draw_losses(history, fresh / "loss.png")
        meta = {"settings": dict(settings), "git": git_commit(), "versions": versions(), "steps": steps}
        write_json(fresh / META, meta | {"written": datetime.now(UTC).isoformat(timespec="seconds")})
    shutil.rmtree(checkpoints)
    print(f"{output}: {steps} steps, loss {history[0]['loss']:.4f} → {history[-1]['loss']:.4f}")


def _resumable(checkpoints: Path, settings: Mapping[str, Any], overwrite: bool) -> Path | None:
    """The last whole checkpoint of a run with these settings; those of another run are cleared by --overwrite only."""
    if overwrite and is_main():
        shutil.rmtree(checkpoints, ignore_errors=True)
    # A checkpoint's trainer_state.json is written last.
    whole = [file.parent for file in checkpoints.glob("checkpoint-*/trainer_state.json")]
    if not whole or not (checkpoints / META).exists():
        return None
    rows.check_settings(checkpoints, read_json(checkpoints / META), settings)
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]))


def _watch() -> Any:
    """A callback that shows one line of progress and stops a run whose loss is no number."""
    from tqdm import tqdm
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", desc="training", disable=None
            )

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            loss = (logs or {}).get("loss")
            if loss is None:
                return
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {state.global_step}; lower --learning-rate")
            self.bar.n = state.global_step
            self.bar.set_postfix(loss=f"{loss:.3f}")

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.close()

    return Watch()


def draw_losses(history: list[dict[str, float]], path: Path) -> None:
    """Loss over steps, and the reward margin and accuracy where the trainer logged them, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [key for key in ("loss", "rewards/margins", "rewards/accuracies") if key in history[0]]
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 3), squeeze=False, layout="constrained")
    for axis, key in zip(axes[0], shown, strict=True):
        axis.plot([entry["step"] for entry in history], [entry[key] for entry in history], color="black")
        axis.set(xlabel="step", title=key)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def settings_of(args: TrainArgs, model: Model, data: Path) -> dict[str, Any]:
    """What an adapter remembers of how it was trained."""
    left_out = {"constitution", "limit", "overwrite", "dry_run", "tokens_per_second", "report_to", "model", "name"}
    chosen = {key: value for key, value in asdict(args).items() if key not in left_out}
    source = {"model": model.short, "weights": fingerprint(model)}
    return source | {"lora": model.lora, "data": rows.file_digest(data), "limit": args.limit} | chosen
