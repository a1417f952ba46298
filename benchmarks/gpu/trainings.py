"""DPO and SFT, as TRL's defaults and the published settings have them and as this project's steps do them."""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import shape
from measuring import MESSAGE, SEED, SIGMA, Context, has_gpu, tell_kernels

from character import training

PUBLISHED_TRAINING = {"micro_batch_size": 2, "gradient_checkpointing": True}
BATCH = 32


@dataclass
class Timing:
    """When each micro-batch ended, and how many tokens had been seen by then."""

    seconds: float
    tokens: int
    step: int


def timed(context: Context, trainer: Any, per_token: float, warm: int) -> None:
    """Run a Trainer and tell its rate. per_token: operations per parameter and token.

    warm: how many timings are left out after the first. One is taken after each step and each micro-batch.
    """
    import torch
    from transformers import TrainerCallback

    marks: list[Timing] = []
    accelerator = trainer.accelerator
    parameters = sum(weight.numel() for name, weight in trainer.model.named_parameters() if "lora_" not in name)

    class Watch(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            mark(state)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            mark(state)
            taken = torch.tensor([marks[-1].seconds - marks[0].seconds], device=accelerator.device)
            # All processes stop together.
            if float(accelerator.gather(taken).max()) > context.seconds:
                control.should_training_stop = True

    def mark(state: Any) -> None:
        if has_gpu():
            torch.cuda.synchronize()
        marks.append(Timing(time.perf_counter(), int(trainer._total_train_tokens), state.global_step))
        if len(marks) > warm + 1:
            seconds = marks[-1].seconds - marks[warm].seconds
            tokens = marks[-1].tokens - marks[warm].tokens
            rate = tokens / seconds
            context.tell(
                tokens=tokens,
                seconds=round(seconds, 2),
                rate=round(rate, 1),
                tflops=round(per_token * parameters * rate / 1e12, 1),
                timings=len(marks) - 1 - warm,
            )

    padded = 0

    def count(_module: Any, _words: Any, named: dict[str, Any]) -> None:
        nonlocal padded
        padded += named["input_ids"].numel()

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.args.save_strategy = "no"
    trainer.add_callback(Watch())
    trainer.train()
    device = training.device_of(trainer)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seen = int(trainer._total_train_tokens)
    passes = 2 if per_token == 6 else 1
    padding = 1 - passes * seen / (padded * training.world_size())
    context.tell(device=device, losses=losses, parameters=parameters, padding=round(padding, 3))


def pairs_of(context: Context, steps: int) -> list[dict[str, Any]]:
    """Pairs of answers to one message; the two lengths are drawn apart."""
    count = steps * BATCH
    lengths = [min(length, 960) for length in context.lengths(2 * count)]
    found = []
    for number in range(count):
        prompt = {"role": "user", "content": context.text(number, 10 if context.tiny else MESSAGE)}
        pair = {}
        for side, name in enumerate(("chosen", "rejected")):
            text = context.text(-10 - 2 * number - side, lengths[2 * number + side])
            pair[name] = [prompt, {"role": "assistant", "content": text}]
        found.append(pair)
    return found


def as_published() -> None:
    """Have the trainers leave out what this project adds for speed."""
    training.speed_up = lambda *_, **__: None  # type: ignore[assignment]
    training.fused_kernels = lambda: False  # type: ignore[assignment]


def dpo(context: Context, steps: int, warm: int, run: Callable[..., None] = timed, **settings: Any) -> None:
    """Some steps of DPO."""
    from character.distillation import train

    args = train.Args(batch_size=BATCH, **settings)
    pairs = pairs_of(context, steps)
    begun = time.perf_counter()
    trainer = train.make_trainer(args, context.model, pairs, context.folder / "checkpoints")
    context.tell(start_seconds=round(time.perf_counter() - begun, 1))
    run(context, trainer, 6, warm)


def dpo_published(context: Context) -> None:
    """TRL's way: two pairs at once, activations recomputed, rows as they come, PEFT's switch for the reference."""

    def as_trl(context: Context, trainer: Any, *more: Any) -> None:
        training.switched_off = lambda _: trainer.accelerator.unwrap_model(trainer.model).disable_adapter()
        timed(context, trainer, *more)

    as_published()
    dpo(context, 1, 3, as_trl, **PUBLISHED_TRAINING)


def dpo_ours(context: Context) -> None:
    """The step's own settings."""
    dpo(context, 6, 0)


def dpo_profile(context: Context) -> None:
    """An experiment: which kernels take the time."""
    dpo(context, 2, 0, profiled)


def dpo_two(context: Context) -> None:
    """An experiment: as ours, on two GPUs."""
    if training.world_size() == 1:
        spread(2)
    else:
        dpo_ours(context)


def spread(count: int) -> None:
    """Run this side in so many processes, each on its own GPU, as torchrun does."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env=os.environ | common | {"MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            # The others would wait for it.
            for rank in ranks:
                rank.kill()
        time.sleep(0.2)
    if any(rank.returncode for rank in ranks):
        sys.exit(1)


def profiled(context: Context, trainer: Any, *_: Any) -> None:
    """Run two steps and tell the kernels of the second by their time."""
    from torch import profiler
    from transformers import TrainerCallback

    kind = profiler.ProfilerActivity.CUDA if has_gpu() else profiler.ProfilerActivity.CPU
    watched = profiler.profile(activities=[kind])
    seconds = 0.0

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal seconds
            if state.global_step == 1:
                watched.start()
                seconds = -time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal seconds
            if state.global_step == 2:
                # It waits for the GPU.
                float(next(iter(trainer.model.parameters())).flatten()[0])
                seconds += time.perf_counter()
                watched.stop()

    trainer.args.save_strategy = "no"
    trainer.add_callback(Watch())
    trainer.train()
    name = "self_device_time_total" if has_gpu() else "self_cpu_time_total"
    context.tell(step_seconds=round(seconds, 3), device=training.device_of(trainer))
    tell_kernels(
        context, [(kernel.key, kernel.count, getattr(kernel, name) / 1e6) for kernel in watched.key_averages()]
    )


def sft_rows(context: Context, steps: int) -> list[list[dict[str, str]]]:
    """Conversations of ten turns under a short system prompt, at most 3,072 tokens."""
    found = []
    for number in range(steps * BATCH):
        draw = random.Random(f"{SEED} sft {number}")
        said = shape.lengths(draw, 10, 4 if context.tiny else 130, SIGMA, 400)
        turns = [
            {"role": ("user", "assistant")[turn % 2], "content": context.text(-(1000 * number + turn), length)}
            for turn, length in enumerate(said)
        ]
        found.append([{"role": "system", "content": context.text(-3, 20)}, *turns])
    return found


def sft(context: Context, steps: int, warm: int, run: Callable[..., None] = timed, **settings: Any) -> None:
    """Some steps of SFT on the model with an adapter folded in."""
    from character.introspection import train

    adapter = context.folder / "adapter"
    if training.world_size() == 1:
        shape.save_adapter(adapter, context.folder / "model")
    args = train.Args(batch_size=BATCH, **settings)
    rows = sft_rows(context, steps)
    begun = time.perf_counter()
    trainer = train.make_trainer(args, context.model, adapter, rows, context.folder / "checkpoints")
    context.tell(start_seconds=round(time.perf_counter() - begun, 1))
    run(context, trainer, 4, warm)


def sft_published(context: Context) -> None:
    """TRL's way."""
    as_published()
    sft(context, 1, 3, **PUBLISHED_TRAINING)


def sft_ours(context: Context) -> None:
    """The step's own settings."""
    sft(context, 4, 0)


def sft_profile(context: Context) -> None:
    """An experiment: which kernels take the time."""
    sft(context, 2, 0, profiled)


def sft_two(context: Context) -> None:
    """An experiment: as ours, on two GPUs."""
    if training.world_size() == 1:
        shape.save_adapter(context.folder / "adapter", context.folder / "model")
        spread(2)
    else:
        sft_ours(context)
